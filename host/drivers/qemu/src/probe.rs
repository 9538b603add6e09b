//! Whether KVM can be used, found by trying it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `KVM_GET_API_VERSION` and `KVM_CREATE_VM` (linux/kvm.h): `_IO(0xAE, 0x00)` and `_IO(0xAE, 0x01)`.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
const KVM_CREATE_VM: libc::c_ulong = 0xae01;
/// The only version there is.
const KVM_API_VERSION: libc::c_int = 12;

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvmState {
    /// It works.
    Usable,
    /// It does not, and why.
    Unusable(String),
}

/// Tries KVM: opens the device, asks its version, makes an empty machine, and looks for the processor's own
/// virtualisation. A module that only emulates that (PVM) runs no distribution's kernel in useful time.
#[must_use]
pub fn probe_kvm() -> KvmState {
    match try_kvm() {
        Ok(()) => KvmState::Usable,
        Err(reason) => KvmState::Unusable(reason),
    }
}

fn try_kvm() -> Result<(), String> {
    let device =
        std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "/dev/kvm is not there: load the module kvm_intel or kvm_amd".to_owned(),
            std::io::ErrorKind::PermissionDenied => "/dev/kvm may not be opened: join the group kvm".to_owned(),
            _ => format!("/dev/kvm can't be opened: {error}"),
        })?;
    let call = |request, step: &str| {
        // SAFETY: both requests take no pointer; the descriptor is the KVM device's or answers ENOTTY.
        #[expect(unsafe_code, reason = "ioctl")]
        let result = unsafe { libc::ioctl(device.as_raw_fd(), request, 0) };
        if result < 0 { Err(format!("{step}: {}", std::io::Error::last_os_error())) } else { Ok(result) }
    };
    let version = call(KVM_GET_API_VERSION, "/dev/kvm does not answer")?;
    if version != KVM_API_VERSION {
        return Err(format!("/dev/kvm has version {version}, not {KVM_API_VERSION}"));
    }
    let machine = call(KVM_CREATE_VM, "/dev/kvm makes no machine")?;
    // SAFETY: the kernel has just made this descriptor for us.
    #[expect(unsafe_code, reason = "a received descriptor has no safe constructor")]
    drop(unsafe { OwnedFd::from_raw_fd(machine) });
    let processors = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has_virtualisation = processors
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
    if has_virtualisation {
        Ok(())
    } else {
        Err("the processor offers neither vmx nor svm, so /dev/kvm is an emulation".into())
    }
}

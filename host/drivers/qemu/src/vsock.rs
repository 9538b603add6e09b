//! The guest's vsock: the kernel's where it is there, else a server of our own.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use coracle_machine::{AgentAddress, Error, MachineSpec, Result};
use coracle_process::{Child, Confinement, Output, Ring, Role, Spawn};

use crate::Config;
use crate::command::VsockKind;

/// The socket on which the server waits for QEMU, in the machine's folder.
pub(crate) const MONITOR_SOCKET: &str = "vsock-qemu.sock";
/// The socket on which host programs reach the guest, in the machine's folder.
const PROGRAMS_SOCKET: &str = "vsock.sock";

/// The guest's context identifier where the server is ours: there is one guest behind each server.
const SERVER_CID: u32 = 3;

/// `VHOST_VSOCK_SET_GUEST_CID` (linux/vhost.h): `_IOW(0xAF, 0x60, __u64)`.
const SET_GUEST_CID: libc::c_ulong = 0x4008_af60;

/// What the guest's vsock consists of on the host.
pub(crate) struct Vsock {
    pub(crate) kind: VsockKind,
    pub(crate) address: AgentAddress,
    /// The port on which this host hears the guest.
    pub(crate) hello_port: u32,
    /// The kernel's device, for QEMU.
    pub(crate) device: Option<OwnedFd>,
    pub(crate) server: Option<Child>,
    /// Socket files to remove.
    pub(crate) files: Vec<PathBuf>,
}

/// Makes the guest's vsock ready, before the machine starts.
pub(crate) fn prepare(config: &Config, spec: &MachineSpec) -> Result<Vsock> {
    if config.kernel_vsock
        && let Some((cid, device)) = claim_kernel_cid()?
    {
        return Ok(Vsock {
            kind: VsockKind::Kernel(cid),
            address: AgentAddress::Vsock { cid },
            hello_port: cid,
            device: Some(device),
            server: None,
            files: Vec::new(),
        });
    }
    let listen = |name: &str| {
        let path = spec.folder.join(name);
        std::os::unix::net::UnixListener::bind(&path)
            .map(|listener| (path.clone(), listener))
            .map_err(Error::system(format!("listen at {}", path.display())))
    };
    let (monitor, for_qemu) = listen(MONITOR_SOCKET)?;
    let files = vec![monitor];
    let mut vsock = Vsock {
        kind: VsockKind::Server,
        address: AgentAddress::Hybrid(spec.folder.join(PROGRAMS_SOCKET)),
        hello_port: SERVER_CID,
        device: None,
        server: None,
        files,
    };
    let (programs, for_programs) = match listen(PROGRAMS_SOCKET) {
        Ok(bound) => bound,
        Err(error) => {
            vsock.remove_files();
            return Err(error);
        }
    };
    vsock.files.push(programs.clone());
    let mut hello = programs.clone().into_os_string();
    hello.push(format!("_{SERVER_CID}"));
    vsock.files.push(hello.into());
    let started = start_server(config, programs.into_os_string(), for_qemu.into(), for_programs.into());
    match started {
        Ok(server) => vsock.server = Some(server),
        Err(error) => {
            vsock.remove_files();
            return Err(error);
        }
    }
    Ok(vsock)
}

impl Vsock {
    pub(crate) fn remove_files(&self) {
        for file in &self.files {
            // A file that is gone already is what is wanted.
            let _ = std::fs::remove_file(file);
        }
    }
}

fn start_server(config: &Config, path: OsString, for_qemu: OwnedFd, for_programs: OwnedFd) -> Result<Child> {
    let Some((program, first)) = config.vsock_server.split_first() else {
        return Err(Error::Missing("no vsock server is configured and the kernel has no vhost-vsock".into()));
    };
    let mut spawn = Spawn::new(program)
        .arguments(first.iter().cloned())
        .argument(SERVER_CID.to_string())
        .argument(path)
        .with_capabilities(Role::Vsock.capabilities_at_start())
        .descriptor(3, for_qemu)
        .descriptor(4, for_programs);
    if Confinement::is_possible() {
        spawn.confinement = Some(Confinement::of_server());
        spawn = spawn.in_own_pid_namespace();
    }
    spawn.stderr = Output::Ring(Ring::new(4096).logged("monitor::vsock"));
    spawn.start().map_err(|error| Error::Missing(format!("the vsock server: {error}")))
}

/// A context identifier that no other guest has, claimed with the open device; `None` without the kernel's vhost-vsock.
fn claim_kernel_cid() -> Result<Option<(u32, OwnedFd)>> {
    let Ok(device) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/vhost-vsock") else {
        return Ok(None);
    };
    for _ in 0..64 {
        let mut bytes = [0; 4];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(Error::system("get randomness"))?;
        // Above the numbers with a meaning and the ports that need a privilege; below the numbers of "any" and "none".
        let cid = (u32::from_le_bytes(bytes) >> 1) | 1 << 20;
        let wanted = u64::from(cid);
        // SAFETY: the request reads one 64-bit number from the pointer, which is to a live one.
        #[expect(unsafe_code, reason = "ioctl")]
        let result = unsafe { libc::ioctl(device.as_raw_fd(), SET_GUEST_CID, &raw const wanted) };
        if result == 0 {
            return Ok(Some((cid, device.into())));
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EADDRINUSE) {
            return Err(Error::system("claim a vsock context identifier")(error));
        }
    }
    Err(Error::Monitor("no free vsock context identifier was found".into()))
}

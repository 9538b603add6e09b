//! QEMU's words for PCI devices of the host's (QEMU: docs/system/devices/vfio.rst, docs/devel/vfio-iommufd.rst).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use coracle_machine::{Device, Error, MachineSpec, PciAddress, Result};
use coracle_process::monitor_user;
use serde_json::{Value, json};

use crate::{Config, MachineType};

/// Slots on the first bus for what is there from the start, each with a port of PCI Express: it has all of its configuration space then.
const SLOTS: std::ops::RangeInclusive<u8> = 0x10..=0x1d;

/// What the kernel's IOMMUFD is asked by, by QEMU's name.
const IOMMUFD: &str = "iommufd";

/// Whether this machine can have such devices: one whose memory is not the host's to reach can't.
pub(crate) fn is_possible(config: &Config, spec: &MachineSpec) -> bool {
    config.machine_type == MachineType::Q35 && !spec.access_platform
}

fn passed(spec: &MachineSpec) -> impl Iterator<Item = (PciAddress, bool)> {
    spec.devices.iter().filter_map(|device| match device {
        Device::Vfio { address, by_iommufd } => Some((*address, *by_iommufd)),
        _ => None,
    })
}

/// Whether a device is asked for by IOMMUFD.
pub(crate) fn wants_iommufd(spec: &MachineSpec) -> bool {
    passed(spec).any(|(_, by_iommufd)| by_iommufd)
}

/// QEMU's name for a device, by its address.
pub(crate) fn name(address: PciAddress) -> String {
    format!("vfio-{}", address.to_string().replace([':', '.'], "-"))
}

/// Adds the arguments for the devices that are there from the start.
pub(crate) fn add(arguments: &mut Vec<OsString>, spec: &MachineSpec, iommufd: Option<RawFd>) -> Result<()> {
    let mut add = |option: &str, word: String| arguments.extend([option.into(), word.into()]);
    if let Some(number) = iommufd {
        add("-object", format!("{IOMMUFD},id={IOMMUFD},fd={number}"));
    }
    let mut slots = SLOTS;
    for (chassis, (address, by_iommufd)) in passed(spec).enumerate() {
        let slot = slots.next().ok_or_else(|| {
            Error::Unsupported(format!("more than {} PCI devices of the host's from its start", SLOTS.count()))
        })?;
        let (name, chassis) = (name(address), chassis + 1);
        let object = if by_iommufd { format!(",iommufd={IOMMUFD}") } else { String::new() };
        add(
            "-device",
            format!("pcie-root-port,id=port-{name},bus=pcie.0,addr={slot:#x},chassis={chassis},slot={chassis}"),
        );
        add("-device", format!("vfio-pci,host={address},id={name},bus=port-{name}{object}"));
    }
    Ok(())
}

/// The object to add before the first device that is asked for by IOMMUFD, which was handed over under its own name.
pub(crate) fn iommufd() -> Value {
    json!({ "qom-type": IOMMUFD, "id": IOMMUFD, "fd": IOMMUFD })
}

/// What the kernel's IOMMUFD is asked by.
///
/// # Errors
/// [`Error::Missing`] where the host has none.
pub(crate) fn open_iommufd() -> Result<OwnedFd> {
    const FILE: &str = "/dev/iommu";
    let missing = |error| Error::Missing(format!("open {FILE} (`modprobe iommufd`): {error}"));
    File::options().read(true).write(true).open(FILE).map(OwnedFd::from).map_err(missing)
}

/// The devices whose files were given to the user as which QEMU runs. They are root's again when the last clone of this goes, or before.
#[derive(Debug, Clone, Default)]
pub(crate) struct Given(Arc<Mutex<Files>>);

/// Files by which devices are taken, by the devices' addresses.
#[derive(Debug, Default)]
struct Files(BTreeMap<PciAddress, PathBuf>);

impl Drop for Files {
    fn drop(&mut self) {
        self.0.values().for_each(|file| take_back(file));
    }
}

fn take_back(file: &Path) {
    // Mostly it has gone with the device's driver; and it may be another pod's by now.
    if std::fs::metadata(file).is_ok_and(|data| data.uid() == monitor_user()) {
        let _ = std::os::unix::fs::chown(file, Some(0), None);
    }
}

impl Given {
    /// Gives the file of a device.
    ///
    /// # Errors
    /// [`Error::Missing`] where the host has no such file, or does not let this process.
    pub(crate) fn give(&self, address: PciAddress, by_iommufd: bool) -> Result<()> {
        let failed = |error| Error::Missing(format!("give QEMU the PCI device {address}: {error}"));
        let file = file(address, by_iommufd).map_err(failed)?;
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::os::unix::fs::chown(&file, Some(monitor_user()), None).map_err(failed)?;
        files.0.insert(address, file);
        Ok(())
    }

    /// Gives those of a machine's devices from its start.
    pub(crate) fn give_all(&self, spec: &MachineSpec) -> Result<()> {
        passed(spec).try_for_each(|(address, by_iommufd)| self.give(address, by_iommufd))
    }

    /// Takes all back: QEMU is no more.
    pub(crate) fn take_all(&self) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut files.0).into_values().for_each(|file| take_back(&file));
    }

    /// Takes one back, where QEMU has let go of it. One of the same group that it still has keeps the file.
    pub(crate) fn take(&self, address: PciAddress) {
        let mut files = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.0.remove(&address)
            && !files.0.values().any(|other| *other == file)
        {
            take_back(&file);
        }
    }
}

fn file(address: PciAddress, by_iommufd: bool) -> std::io::Result<PathBuf> {
    let own = Path::new("/sys/bus/pci/devices").join(address.to_string());
    let nothing = || std::io::Error::other("it has no driver for that: is it vfio-pci's?");
    if by_iommufd {
        let names = std::fs::read_dir(own.join("vfio-dev"))?.flatten();
        let name = names.map(|entry| entry.file_name()).next().ok_or_else(nothing)?;
        return Ok(Path::new("/dev/vfio/devices").join(name));
    }
    let group = std::fs::read_link(own.join("iommu_group"))?;
    Ok(Path::new("/dev/vfio").join(group.file_name().ok_or_else(nothing)?))
}

/// Whether the machine has such a device from its start.
pub(crate) fn has_any(spec: &MachineSpec) -> bool {
    passed(spec).next().is_some()
}

/// A device for a machine that runs, without its name and place.
pub(crate) fn front(address: PciAddress, by_iommufd: bool) -> Value {
    let host = address.to_string();
    if by_iommufd {
        json!({ "driver": "vfio-pci", "host": host, "iommufd": IOMMUFD })
    } else {
        json!({ "driver": "vfio-pci", "host": host })
    }
}

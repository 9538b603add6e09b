//! QEMU's words for PCI devices of the host's (QEMU: docs/system/devices/vfio.rst, docs/devel/vfio-iommufd.rst).

use std::ffi::OsString;

use coracle_machine::{Device, Error, MachineSpec, PciAddress, Result};
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
pub(crate) fn add(arguments: &mut Vec<OsString>, spec: &MachineSpec) -> Result<()> {
    let mut add = |option: &str, word: String| arguments.extend([option.into(), word.into()]);
    if wants_iommufd(spec) {
        add("-object", format!("{IOMMUFD},id={IOMMUFD}"));
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

/// The object to add before the first device that is asked for by IOMMUFD.
pub(crate) fn iommufd() -> Value {
    json!({ "qom-type": IOMMUFD, "id": IOMMUFD })
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

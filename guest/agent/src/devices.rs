//! Devices of the wire: what the host has given to the machine becomes a device of a container, by the number that it has here.

use coracle_protocol::agent::Device;
use coracle_protocol::oci;

use crate::storage::block;
use crate::{Error, Result, pci};

/// What the wire calls a virtio disk.
const BLOCK: &str = "blk";
/// What it calls a PCI device of the host's that this kernel's own driver serves. Its options say where it is on either side:
/// `0000:01:00.0=1e/04`.
const PASSED: &str = "vfio-pci-gk";

/// Whether there is anything for [`resolve`].
pub(crate) fn names_any(devices: &[Device], spec: &oci::Spec) -> bool {
    !devices.is_empty() || spec.Mounts.iter().any(|mount| block::is_name(&mount.source))
}

/// Puts the guest's numbers for those of the host, in the container's devices and in its rules for them, and its names of disks that are
/// mounted. It may wait for the kernel
/// to see a device.
pub(crate) fn resolve(devices: &[Device], spec: &mut oci::Spec) -> Result<()> {
    let mut numbers = Vec::new();
    for device in devices {
        match device.type_.as_str() {
            BLOCK => {}
            PASSED => {
                for option in &device.options {
                    let place = option.split_once('=').map(|(_, place)| place).unwrap_or_default();
                    pci::await_at(&pci::slots(place)?, |_| Ok(()))?;
                }
                continue;
            }
            other => return Err(Error::Unsupported(format!("a device of the type {}", other.escape_default()))),
        }
        let linux = spec.Linux.as_mut().map(|linux| linux.Devices.as_mut_slice()).unwrap_or_default();
        let found = linux.iter_mut().find(|own| own.Type == "b" && own.Path == device.container_path);
        let own = found.ok_or_else(|| {
            Error::Invalid(format!("the specification has no device {}", device.container_path.escape_default()))
        })?;
        let number = number(&block::of_device(device)?.number)?;
        numbers.push(((own.Major, own.Minor), number));
        (own.Major, own.Minor) = number;
    }
    // Disks that are mounted as they are.
    for mount in spec.Mounts.iter_mut().filter(|mount| block::is_name(&mount.source)) {
        mount.source = block::find(&mount.source)?.path();
    }
    let resources = spec.Linux.as_mut().and_then(|linux| linux.Resources.as_mut());
    for rule in resources.map(|resources| resources.Devices.as_mut_slice()).unwrap_or_default() {
        let Some(host) = rule.Major.zip(rule.Minor).filter(|_| rule.Type == "b") else { continue };
        if let Some((_, guest)) = numbers.iter().find(|(number, _)| *number == host) {
            (rule.Major, rule.Minor) = (Some(guest.0), Some(guest.1));
        }
    }
    Ok(())
}

/// `MAJOR:MINOR`.
fn number(text: &str) -> Result<(i64, i64)> {
    let parts = text.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parts.ok_or_else(|| Error::State(format!("the kernel says {text} for a device's number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_disk_or_is_not_named_is_refused() {
        let json = r#"{"linux":{"devices":[{"path":"/dev/xvda","type":"b","major":8,"minor":16}]}}"#;
        let mut spec: oci::Spec = coracle_protocol::from_json(json).unwrap();
        let device = |kind: &str, path: &str, id: &str| Device {
            type_: kind.into(),
            container_path: path.into(),
            id: id.into(),
            ..Default::default()
        };
        let mut refused = |device: Device| resolve(&[device], &mut spec).unwrap_err();
        assert!(matches!(refused(device("scsi", "/dev/xvda", "02")), Error::Unsupported(_)));
        assert!(matches!(refused(device(BLOCK, "/dev/xvdb", "02")), Error::Invalid(_)));
        let nowhere = Device { options: vec!["0000:01:00.0".into()], ..device(PASSED, "/dev/vfio/1", "1") };
        assert!(matches!(refused(nowhere), Error::Invalid(_)));
        assert!(matches!(refused(device(BLOCK, "/dev/xvda", "zz")), Error::Invalid(_)));
        assert_eq!(number("254:16").unwrap(), (254, 16));
        assert!(number("254").is_err());
    }
}

//! PCI devices of the host's that a container is given.

use coracle_machine::Device;
use coracle_protocol::{agent, oci};
use coracle_vfio::{Function, Host, Node};

use crate::{Error, Result};

/// What the wire calls a device that the guest's own driver serves.
const KIND: &str = "vfio-pci-gk";

/// A device file of a specification, and the functions that it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Passed {
    path: String,
    functions: Vec<Function>,
}

impl Passed {
    /// As devices of the machine.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Device> {
        self.functions
            .iter()
            .map(|Function { address, by_iommufd }| Device::Vfio { address: *address, by_iommufd: *by_iommufd })
    }
}

impl From<coracle_vfio::Error> for Error {
    fn from(error: coracle_vfio::Error) -> Self {
        match error {
            coracle_vfio::Error::Invalid(text) => Self::Invalid(text),
            coracle_vfio::Error::Unsupported(text) => Self::Unsupported(text),
        }
    }
}

/// What a device file stands for, where it is one of VFIO's.
pub(crate) fn node(device: &oci::LinuxDevice) -> Option<Node> {
    matches!(device.Type.as_str(), "c" | "u").then(|| Host::default().node(device.Major, device.Minor)).flatten()
}

/// The devices that a container is given: those of its files that are VFIO's.
///
/// # Errors
/// Where one is not to be had.
pub(crate) fn plan(devices: &[oci::LinuxDevice]) -> Result<Vec<Passed>> {
    let host = Host::default();
    let of = |device: &oci::LinuxDevice| {
        let functions = match node(device) {
            None | Some(Node::Control) => return None,
            Some(node) => host.functions(&node),
        };
        Some(functions.map(|functions| Passed { path: device.Path.clone(), functions }).map_err(Error::from))
    };
    let mut all: Vec<Passed> = devices.iter().filter_map(of).collect::<Result<_>>()?;
    distinct(&mut all)?;
    Ok(all)
}

/// Leaves each function to the first file that stands for it.
fn distinct(all: &mut [Passed]) -> Result<()> {
    let mut seen: Vec<Function> = Vec::new();
    for passed in all {
        for function in &passed.functions {
            if seen.iter().any(|other| other.address == function.address && other.by_iommufd != function.by_iommufd) {
                return Err(Error::Invalid(format!(
                    "the PCI device {} is asked for both by its group and by itself: give the container one of the two files",
                    function.address
                )));
            }
        }
        passed.functions.retain(|function| !seen.contains(function));
        seen.extend(passed.functions.iter().cloned());
    }
    Ok(())
}

/// What the guest is told of them: where on its own bus it has each. `place` says where a device is, where it came while the machine ran;
/// one that was there from the start needs no waiting.
pub(crate) fn told(passed: &[Passed], place: impl Fn(&Device) -> Option<String>) -> Vec<agent::Device> {
    let of = |passed: &Passed| {
        let placed = passed.devices().zip(&passed.functions);
        let options: Vec<String> =
            placed.filter_map(|(device, function)| Some(format!("{}={}", function.address, place(&device)?))).collect();
        let (type_, container_path) = (KIND.into(), passed.path.clone());
        (!options.is_empty()).then(|| agent::Device { type_, container_path, options, ..Default::default() })
    };
    passed.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_goes_once_to_the_machine() {
        let function = |by_iommufd| Function { address: "0000:01:00.0".parse().unwrap(), by_iommufd };
        let passed = |path: &str, by_iommufd| Passed { path: path.into(), functions: vec![function(by_iommufd)] };
        let mut twice = [passed("/dev/vfio/1", false), passed("/dev/other", false)];
        distinct(&mut twice).unwrap();
        assert_eq!(twice.iter().flat_map(Passed::devices).count(), 1);
        let both = distinct(&mut [passed("/dev/vfio/1", false), passed("/dev/vfio/devices/vfio0", true)]).unwrap_err();
        assert!(both.to_string().contains("0000:01:00.0"), "{both}");
    }

    #[test]
    fn the_guest_is_told_where_what_came_later_is() {
        let function = |address: &str| Function { address: address.parse().unwrap(), by_iommufd: false };
        let passed = [
            Passed { path: "/dev/vfio/12".into(), functions: vec![function("0000:01:00.0"), function("0000:01:00.1")] },
            Passed { path: "/dev/vfio/13".into(), functions: vec![function("0000:02:00.0")] },
        ];
        let place = |device: &Device| match device {
            Device::Vfio { address, .. } if address.bus == 1 => Some(format!("1e/{:02x}", address.function + 4)),
            _ => None,
        };
        let told = told(&passed, place);
        assert_eq!(told.len(), 1, "the other one was there from the start");
        assert_eq!(told[0].container_path, "/dev/vfio/12");
        assert_eq!(told[0].options, ["0000:01:00.0=1e/04", "0000:01:00.1=1e/05"]);
    }
}

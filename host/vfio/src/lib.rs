//! PCI devices of the host that a machine has for itself (Linux: Documentation/driver-api/vfio.rst), planned: which devices a file of
//! `/dev/vfio` stands for, and what it takes to give one to the machine and back. Nothing here has an effect.
//!
//! ```text
//! /dev/vfio/12 ────────── /sys/kernel/iommu_groups/12/devices/* ─┐
//! /dev/vfio/devices/vfio0 ─ /sys/class/vfio-dev/vfio0/device ────┼─▶ functions on vfio-pci ─▶ devices of the machine
//! a link of a namespace ─── /sys/bus/pci/devices/ADDRESS ────────┘   (a link's driver is changed before, and back after)
//! ```

mod rebind;

use std::path::{Path, PathBuf};

use coracle_machine::PciAddress;

pub use rebind::{Rebind, Write};

/// The driver that hands devices over.
const DRIVER: &str = "vfio-pci";

/// The class of bridges (PCI Code and ID Assignment, 1.7), which belong to a group and are handed to nobody.
const BRIDGES: &str = "0x06";

/// Why a device can't be handed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not there, or not as it has to be.
    #[error("{0}")]
    Invalid(String),
    /// It is one that no machine takes.
    #[error("{0}")]
    Unsupported(String),
}

/// What a character device of `/dev/vfio` stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A group of devices that an IOMMU can't keep apart: `/dev/vfio/NUMBER`.
    Group(u32),
    /// One device, by IOMMUFD: `/dev/vfio/devices/NAME`.
    Device(String),
    /// What all of them are asked through, and no device: `/dev/vfio/vfio`, `/dev/iommu`.
    Control,
}

/// A function of a PCI device that is on the driver which hands it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub address: PciAddress,
    /// Whether it is asked for by IOMMUFD, and not by its group.
    pub by_iommufd: bool,
}

/// The host, as its kernel shows it.
#[derive(Debug, Clone)]
pub struct Host {
    sys: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sys: "/sys".into() }
    }
}

impl Host {
    /// A host whose sysfs is this folder.
    #[must_use]
    pub fn at(sys: PathBuf) -> Self {
        Self { sys }
    }

    /// What the character device of this number stands for; `None` where it is none of VFIO's.
    #[must_use]
    pub fn node(&self, major: i64, minor: i64) -> Option<Node> {
        let text = std::fs::read_to_string(self.sys.join(format!("dev/char/{major}:{minor}/uevent"))).ok()?;
        let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
        match name {
            "iommu" | "vfio/vfio" => Some(Node::Control),
            _ => match name.strip_prefix("vfio/devices/") {
                Some(device) => Some(Node::Device(device.to_owned())),
                None => Some(Node::Group(name.strip_prefix("vfio/")?.parse().ok()?)),
            },
        }
    }

    /// The functions that a node stands for.
    ///
    /// # Errors
    /// [`Error::Invalid`] where there are none, or one is on another driver; [`Error::Unsupported`] for what is no PCI device.
    pub fn functions(&self, node: &Node) -> Result<Vec<Function>, Error> {
        match node {
            Node::Control => Ok(Vec::new()),
            Node::Group(number) => self.group(*number, false),
            Node::Device(name) => {
                let folder = self.sys.join("class/vfio-dev").join(name).join("device");
                let address = self.address(&folder)?;
                // The others of its group have to be out of their drivers' hands, too.
                let group = self.group(self.group_of(&address)?, true)?;
                Ok(group.into_iter().filter(|function| function.address == address).collect())
            }
        }
    }

    /// The group of a function.
    fn group_of(&self, address: &PciAddress) -> Result<u32, Error> {
        let link = self.device(address).join("iommu_group");
        let number = std::fs::read_link(&link).ok().and_then(|target| target.file_name()?.to_str()?.parse().ok());
        number.ok_or_else(|| {
            Error::Invalid(format!(
                "the PCI device {address} is in no IOMMU group: the host has no IOMMU, or it is off (`intel_iommu=on`, or the firmware's \
                 setting)"
            ))
        })
    }

    /// The functions of a group, all of which are on the driver that hands them over, or on none.
    fn group(&self, number: u32, by_iommufd: bool) -> Result<Vec<Function>, Error> {
        let folder = self.sys.join(format!("kernel/iommu_groups/{number}/devices"));
        let entries = std::fs::read_dir(&folder);
        let entries = entries.map_err(|error| Error::Invalid(format!("read the IOMMU group {number}: {error}")))?;
        let mut functions = Vec::new();
        for entry in entries.flatten() {
            let address = self.address(&entry.path())?;
            let device = self.device(&address);
            let class = std::fs::read_to_string(device.join("class")).unwrap_or_default();
            if class.starts_with(BRIDGES) {
                continue;
            }
            match self.driver(&address).as_deref() {
                Some(DRIVER) => functions.push(Function { address, by_iommufd }),
                None => {}
                Some(other) => {
                    return Err(Error::Invalid(format!(
                        "the PCI device {address} of the IOMMU group {number} is on the host's driver {other}: put all of the group on \
                         {DRIVER} first (`driverctl set-override {address} {DRIVER}`)"
                    )));
                }
            }
        }
        functions.sort_by_key(|function| function.address);
        if functions.is_empty() {
            return Err(Error::Invalid(format!("no device of the IOMMU group {number} is on {DRIVER}")));
        }
        Ok(functions)
    }

    /// The PCI address of what a folder, or a link to one, of sysfs shows.
    fn address(&self, folder: &Path) -> Result<PciAddress, Error> {
        let real = folder.canonicalize();
        let real = real.map_err(|error| Error::Invalid(format!("look at {}: {error}", folder.display())))?;
        let name = real.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.parse().map_err(|_| {
            Error::Unsupported(format!("the device {name} is no PCI device, and only those are passed to a machine"))
        })
    }

    fn device(&self, address: &PciAddress) -> PathBuf {
        self.sys.join("bus/pci/devices").join(address.to_string())
    }

    /// The driver that a function is on.
    fn driver(&self, address: &PciAddress) -> Option<String> {
        let target = std::fs::read_link(self.device(address).join("driver")).ok()?;
        target.file_name()?.to_str().map(str::to_owned)
    }

    /// The PCI function that a network link's device of this bus and name is: a function itself, or the virtio device of one. What hangs
    /// on something else, such as USB, is none: what it hangs on is not the link's alone.
    #[must_use]
    pub fn function_of(&self, bus: &str, name: &str) -> Option<PciAddress> {
        let real = self.sys.join("bus").join(bus).join("devices").join(name).canonicalize().ok()?;
        let function = match bus {
            "pci" => real.as_path(),
            "virtio" => real.parent()?,
            _ => return None,
        };
        function.file_name()?.to_str()?.parse().ok()
    }

    /// Whether the host has the driver that hands devices over.
    #[must_use]
    pub fn has_driver(&self) -> bool {
        self.sys.join("bus/pci/drivers").join(DRIVER).exists()
    }

    /// The network links that a function's driver has made.
    #[must_use]
    pub fn links(&self, address: &PciAddress) -> Vec<String> {
        let below = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        // A virtio link's driver is on a bus of its own, one folder further.
        let device = self.device(address);
        let parts = below(&device).filter(|path| path.is_dir() && !path.is_symlink());
        let folders = [device.join("net")].into_iter().chain(parts.map(|part| part.join("net")));
        let names = folders.flat_map(|folder| below(&folder).collect::<Vec<_>>());
        names.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A made-up host: functions with their class, group and driver.
    pub(crate) fn host(functions: &[(&str, &str, u32, Option<&str>)]) -> (tempfile::TempDir, Host) {
        let sys = tempfile::tempdir().unwrap();
        let make = |path: &str| {
            let path = sys.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        for (address, class, group, driver) in functions {
            let device = make(&format!("devices/pci0000:00/{address}"));
            std::fs::write(device.join("class"), format!("{class}\n")).unwrap();
            let group = make(&format!("kernel/iommu_groups/{group}/devices"));
            symlink(&device, group.join(address)).unwrap();
            symlink(group.parent().unwrap(), device.join("iommu_group")).unwrap();
            symlink(&device, make("bus/pci/devices").join(address)).unwrap();
            if let Some(driver) = driver {
                symlink(make(&format!("bus/pci/drivers/{driver}")), device.join("driver")).unwrap();
            }
        }
        for (number, name) in [
            ("511:12", "vfio/12"),
            ("510:0", "vfio/devices/vfio0"),
            ("10:196", "vfio/vfio"),
            ("10:125", "iommu"),
            ("1:3", "null"),
        ] {
            let folder = make(&format!("dev/char/{number}"));
            std::fs::write(folder.join("uevent"), format!("MAJOR=1\nDEVNAME={name}\n")).unwrap();
        }
        let host = Host::at(sys.path().to_owned());
        (sys, host)
    }

    const VFIO: Option<&str> = Some("vfio-pci");

    fn names(functions: &[Function]) -> Vec<String> {
        functions.iter().map(|function| function.address.to_string()).collect()
    }

    #[test]
    fn a_node_is_known_by_its_number() {
        let (_sys, host) = host(&[]);
        assert_eq!(host.node(511, 12), Some(Node::Group(12)));
        assert_eq!(host.node(510, 0), Some(Node::Device("vfio0".into())));
        assert_eq!((host.node(10, 196), host.node(10, 125)), (Some(Node::Control), Some(Node::Control)));
        assert_eq!((host.node(1, 3), host.node(9, 9)), (None, None));
    }

    #[test]
    fn a_group_is_all_its_functions_but_bridges() {
        let (_sys, host) = host(&[
            ("0000:01:00.1", "0x030000", 12, VFIO),
            ("0000:01:00.0", "0x030000", 12, VFIO),
            ("0000:00:01.0", "0x060400", 12, Some("pcieport")),
            ("0000:01:00.2", "0x0c0330", 12, None),
            ("0000:02:00.0", "0x020000", 13, Some("e1000e")),
        ]);
        let found = host.functions(&Node::Group(12)).unwrap();
        assert_eq!(names(&found), ["0000:01:00.0", "0000:01:00.1"]);
        assert!(found.iter().all(|function| !function.by_iommufd));
        let refused = host.functions(&Node::Group(13)).unwrap_err();
        assert!(
            matches!(&refused, Error::Invalid(text) if text.contains("e1000e") && text.contains("0000:02:00.0")),
            "{refused}"
        );
        assert!(matches!(host.functions(&Node::Group(14)), Err(Error::Invalid(_))));
        assert_eq!(host.functions(&Node::Control), Ok(Vec::new()));
    }

    #[test]
    fn a_device_is_itself_where_its_group_is_free() {
        let (sys, host) = host(&[
            ("0000:01:00.0", "0x030000", 12, VFIO),
            ("0000:01:00.1", "0x040300", 12, VFIO),
            ("0000:02:00.0", "0x020000", 13, VFIO),
            ("0000:02:00.1", "0x020000", 13, Some("ixgbe")),
        ]);
        let name = |name: &str, address: &str| {
            let folder = sys.path().join("class/vfio-dev").join(name);
            std::fs::create_dir_all(&folder).unwrap();
            symlink(sys.path().join("devices/pci0000:00").join(address), folder.join("device")).unwrap();
            Node::Device(name.to_owned())
        };
        let found = host.functions(&name("vfio0", "0000:01:00.0")).unwrap();
        assert_eq!(names(&found), ["0000:01:00.0"]);
        assert!(found[0].by_iommufd);
        // What shares its group could reach its memory.
        let refused = host.functions(&name("vfio1", "0000:02:00.0")).unwrap_err();
        assert!(refused.to_string().contains("ixgbe"), "{refused}");
        std::fs::create_dir_all(sys.path().join("devices/virtual/mdev0")).unwrap();
        let folder = sys.path().join("class/vfio-dev/vfio2");
        std::fs::create_dir_all(&folder).unwrap();
        symlink(sys.path().join("devices/virtual/mdev0"), folder.join("device")).unwrap();
        assert!(matches!(host.functions(&Node::Device("vfio2".into())), Err(Error::Unsupported(_))));
        assert!(matches!(host.functions(&Node::Device("gone".into())), Err(Error::Invalid(_))));
    }

    #[test]
    fn a_links_function_is_found_and_its_links() {
        let (sys, host) =
            host(&[("0000:00:05.0", "0x020000", 3, Some("virtio-pci")), ("0000:03:00.0", "0x020000", 4, Some("igb"))]);
        let devices = sys.path().join("devices/pci0000:00");
        for link in ["0000:00:05.0/virtio2/net/eth1", "0000:03:00.0/net/eth2"] {
            std::fs::create_dir_all(devices.join(link)).unwrap();
        }
        let virtio = sys.path().join("bus/virtio/devices");
        std::fs::create_dir_all(&virtio).unwrap();
        symlink(devices.join("0000:00:05.0/virtio2"), virtio.join("virtio2")).unwrap();
        let virtio: PciAddress = "0000:00:05.0".parse().unwrap();
        assert_eq!(host.function_of("virtio", "virtio2"), Some(virtio));
        assert_eq!(host.function_of("pci", "0000:03:00.0"), "0000:03:00.0".parse().ok());
        assert_eq!(host.function_of("pci", "0000:09:00.0"), None);
        // The controller is not the link's alone.
        let usb = devices.join("0000:00:14.0/usb1/1-1");
        std::fs::create_dir_all(&usb).unwrap();
        std::fs::create_dir_all(sys.path().join("bus/usb/devices")).unwrap();
        symlink(&usb, sys.path().join("bus/usb/devices/1-1")).unwrap();
        assert_eq!(host.function_of("usb", "1-1"), None);
        assert_eq!(host.links(&virtio), ["eth1"]);
        assert_eq!(host.links(&"0000:03:00.0".parse().unwrap()), ["eth2"]);
    }

    #[test]
    fn a_host_without_an_iommu_says_so() {
        let (sys, host) = host(&[("0000:01:00.0", "0x030000", 1, VFIO)]);
        std::fs::remove_file(sys.path().join("devices/pci0000:00/0000:01:00.0/iommu_group")).unwrap();
        let folder = sys.path().join("class/vfio-dev/vfio0");
        std::fs::create_dir_all(&folder).unwrap();
        symlink(sys.path().join("devices/pci0000:00/0000:01:00.0"), folder.join("device")).unwrap();
        let refused = host.functions(&Node::Device("vfio0".into())).unwrap_err();
        assert!(refused.to_string().contains("no IOMMU group"), "{refused}");
    }
}

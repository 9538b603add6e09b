//! A device's way from its driver to the one that hands it over, and back (Linux: Documentation/ABI/testing/sysfs-bus-pci).

use std::path::PathBuf;

use coracle_machine::PciAddress;

use crate::{DRIVER, Error, Host};

/// Text to write to a file of sysfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// The file.
    pub path: PathBuf,
    /// The text.
    pub text: String,
}

/// A function whose driver is changed, and what it takes to give it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebind {
    /// Where it is.
    pub address: PciAddress,
    /// The host's driver of it; none where it had none.
    pub driver: Option<String>,
}

impl Host {
    /// What is known of a function before its driver is changed. All of its group must be free of the host's drivers but itself.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub fn rebind(&self, address: &PciAddress) -> Result<Rebind, Error> {
        let group = self.group_of(address)?;
        let folder = self.sys.join(format!("kernel/iommu_groups/{group}/devices"));
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let other = self.address(&entry.path())?;
            let class = std::fs::read_to_string(self.device(&other).join("class")).unwrap_or_default();
            if other == *address || class.starts_with(crate::BRIDGES) {
                continue;
            }
            if let Some(driver) = self.driver(&other).filter(|driver| driver != DRIVER) {
                return Err(Error::Invalid(format!(
                    "the PCI device {address} can't be handed over alone: {other}, which is on the host's driver {driver}, is in its IOMMU \
                     group {group}"
                )));
            }
        }
        Ok(Rebind { address: *address, driver: self.driver(address) })
    }

    /// Whether a function is on the driver that hands it over.
    #[must_use]
    pub fn is_handed_over(&self, address: &PciAddress) -> bool {
        self.driver(address).as_deref() == Some(DRIVER)
    }

    /// What to write, in order, so that it is.
    #[must_use]
    pub fn hand_over(&self, rebind: &Rebind) -> Vec<Write> {
        self.change(&rebind.address, DRIVER)
    }

    /// What to write, in order, so that it is the host's again, however far it has come.
    #[must_use]
    pub fn take_back(&self, rebind: &Rebind) -> Vec<Write> {
        // An empty line is no override.
        self.change(&rebind.address, "\n")
    }

    fn change(&self, address: &PciAddress, to: &str) -> Vec<Write> {
        let device = self.device(address);
        let mut writes = vec![Write { path: device.join("driver_override"), text: to.to_owned() }];
        if self.driver(address).is_some() {
            writes.push(Write { path: device.join("driver/unbind"), text: address.to_string() });
        }
        writes.push(Write { path: self.sys.join("bus/pci/drivers_probe"), text: address.to_string() });
        writes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::host;

    #[test]
    fn a_link_goes_to_the_machine_and_comes_back() {
        let functions = [("0000:03:10.0", "0x020000", 7, Some("ixgbevf")), ("0000:03:10.2", "0x020000", 8, None)];
        let (sys, host) = host(&functions);
        let address: PciAddress = "0000:03:10.0".parse().unwrap();
        let rebind = host.rebind(&address).unwrap();
        assert_eq!(rebind.driver.as_deref(), Some("ixgbevf"));
        let shown = |writes: &[Write]| -> Vec<String> {
            let short = |write: &Write| write.path.strip_prefix(sys.path()).unwrap().display().to_string();
            writes.iter().map(|write| format!("{}={}", short(write), write.text)).collect()
        };
        let device = "bus/pci/devices/0000:03:10.0";
        assert_eq!(
            shown(&host.hand_over(&rebind)),
            [
                format!("{device}/driver_override=vfio-pci"),
                format!("{device}/driver/unbind=0000:03:10.0"),
                "bus/pci/drivers_probe=0000:03:10.0".into()
            ]
        );
        assert!(!host.is_handed_over(&address));
        // Back again: from the driver that has it now, or from none.
        let probe = "bus/pci/drivers_probe=0000:03:10.0";
        let expected =
            [format!("{device}/driver_override=\n"), format!("{device}/driver/unbind=0000:03:10.0"), probe.into()];
        assert_eq!(shown(&host.take_back(&rebind)), expected);
        std::fs::remove_file(sys.path().join(device).join("driver")).unwrap();
        assert_eq!(shown(&host.take_back(&rebind)), [expected[0].clone(), probe.into()]);
        assert!(!host.has_driver());
        let other = host.rebind(&"0000:03:10.2".parse().unwrap()).unwrap();
        assert_eq!((other.driver.clone(), host.hand_over(&other).len()), (None, 2), "there is no driver to leave");
    }

    #[test]
    fn one_that_shares_its_group_with_the_hosts_stays() {
        let functions = [("0000:03:10.0", "0x020000", 7, Some("igb")), ("0000:03:10.1", "0x010000", 7, Some("nvme"))];
        let (_sys, host) = host(&functions);
        let refused = host.rebind(&"0000:03:10.0".parse().unwrap()).unwrap_err();
        assert!(refused.to_string().contains("nvme") && refused.to_string().contains("0000:03:10.1"), "{refused}");
    }
}

//! Disks of the machine, by the name that their device has.

use std::path::Path;

use coracle_protocol::agent::Device;

use crate::kernel_events::await_device;
use crate::{Error, Result};

/// By which a disk is named on the wire: the name that udev gives it, after its serial number.
const BY_SERIAL: &str = "/dev/disk/by-id/virtio-";

/// Where the kernel lists disks.
const DISKS: &str = "/sys/block";

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Disk {
    /// The kernel's name: `vda`.
    pub(crate) name: String,
    /// Its number, `MAJOR:MINOR`.
    pub(crate) number: String,
}

impl Disk {
    /// The one of a folder of [`DISKS`].
    fn of(folder: &Path) -> Result<Self> {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = read(&folder.join("dev")).map_err(Error::system(format!("learn the number of {name}")))?;
        Ok(Self { name, number })
    }

    /// Its device file.
    pub(crate) fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }
}

/// The disk that `source` names; one that the kernel does not see yet is waited for.
pub(crate) fn find(source: &str) -> Result<Disk> {
    await_device(|| find_in(Path::new(DISKS), source))
}

/// The disk at a PCI path, likewise: the slot on the root bus, then on each bridge's.
pub(crate) fn at(slots: &[u32]) -> Result<Disk> {
    await_device(|| {
        let name = block_device(Path::new("/sys/devices/pci0000:00"), slots)?;
        Disk::of(&Path::new(DISKS).join(&name))
    })
}

/// The disk of a device of the wire: by the name that udev gives it, or by its PCI path.
pub(crate) fn of_device(device: &Device) -> Result<Disk> {
    if device.vm_path.starts_with(BY_SERIAL) {
        return find(&device.vm_path);
    }
    let slots = device.id.split('/').map(|slot| u32::from_str_radix(slot, 16));
    let slots: std::result::Result<Vec<u32>, _> = slots.collect();
    at(&slots.map_err(|_| Error::Invalid(format!("{} is no PCI path", device.id.escape_default())))?)
}

/// The name of the virtio block device behind `slots`, each of which is a folder of the one before.
fn block_device(root: &Path, slots: &[u32]) -> Result<String> {
    let missing = || Error::NotFound(format!("a block device at the PCI path {slots:x?}"));
    if slots.is_empty() {
        return Err(Error::Invalid("a PCI path without a slot".into()));
    }
    let find = |folder: &Path, fits: &dyn Fn(&str) -> bool| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(fits))
    };
    let mut at = root.to_owned();
    for slot in slots {
        let end = format!(":{slot:02x}.0");
        at = find(&at, &|name| name.ends_with(&end)).ok_or_else(missing)?;
    }
    let virtio = find(&at, &|name| name.starts_with("virtio")).ok_or_else(missing)?;
    let block = find(&virtio.join("block"), &|_| true).ok_or_else(missing)?;
    block.file_name().and_then(|name| name.to_str()).map(str::to_owned).ok_or_else(missing)
}

fn find_in(disks: &Path, source: &str) -> Result<Disk> {
    let serial = source
        .strip_prefix(BY_SERIAL)
        .filter(|serial| !serial.is_empty())
        .ok_or_else(|| Error::Invalid(format!("{} names no disk: {BY_SERIAL} does", source.escape_default())))?;
    let entries = std::fs::read_dir(disks).map_err(Error::system(format!("list {}", disks.display())))?;
    for entry in entries.flatten() {
        if read(&entry.path().join("serial")).is_ok_and(|found| found == serial) {
            return Disk::of(&entry.path());
        }
    }
    Err(Error::NotFound(format!("a disk with the serial number {}", serial.escape_default())))
}

fn read(path: &Path) -> std::io::Result<String> {
    std::fs::read_to_string(path).map(|text| text.trim_end_matches(['\n', '\0']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_number() {
        let disks = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", "root-1"), ("vdb", "root-10"), ("loop0", "")] {
            let folder = disks.path().join(name);
            std::fs::create_dir(&folder).unwrap();
            if !serial.is_empty() {
                // With and without a line feed it is the same.
                std::fs::write(folder.join("serial"), format!("{serial}\n")).unwrap();
            }
            std::fs::write(folder.join("dev"), "254:16\n").unwrap();
        }
        let found = find_in(disks.path(), "/dev/disk/by-id/virtio-root-10").unwrap();
        assert_eq!((found.path().as_str(), found.number.as_str()), ("/dev/vdb", "254:16"));
        assert!(matches!(find_in(disks.path(), "/dev/disk/by-id/virtio-root"), Err(Error::NotFound(_))));
        for other in ["/dev/vda", "/dev/disk/by-id/virtio-", "", "../vda"] {
            assert!(matches!(find_in(disks.path(), other), Err(Error::Invalid(_))), "{other}");
        }
    }

    #[test]
    fn a_pci_path_leads_over_bridges() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("0000:00:02.0/0000:01:05.0/virtio3/block/vdb")).unwrap();
        assert_eq!(block_device(root.path(), &[2, 5]).unwrap(), "vdb");
        assert!(matches!(block_device(root.path(), &[2, 6]), Err(Error::NotFound(_))));
        assert!(matches!(block_device(root.path(), &[]), Err(Error::Invalid(_))));
    }
}

//! Disks of the machine, by the name that their device has.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// By which a disk is named on the wire: the name that udev gives it, after its serial number.
const BY_SERIAL: &str = "/dev/disk/by-id/virtio-";

/// Where the kernel lists disks.
const DISKS: &str = "/sys/block";

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// The kernel's name: `vda`.
    pub(super) name: String,
    /// Its number, `MAJOR:MINOR`.
    pub(super) number: String,
}

impl Disk {
    /// Its device file.
    pub(super) fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }
}

/// The disk that `source` names.
pub(super) fn find(source: &str) -> Result<Disk> {
    find_in(Path::new(DISKS), source)
}

fn find_in(disks: &Path, source: &str) -> Result<Disk> {
    let serial = source
        .strip_prefix(BY_SERIAL)
        .filter(|serial| !serial.is_empty())
        .ok_or_else(|| Error::Invalid(format!("{} names no disk: {BY_SERIAL} does", source.escape_default())))?;
    let read = |path: PathBuf| std::fs::read_to_string(path).map(|text| text.trim_end_matches(['\n', '\0']).to_owned());
    let entries = std::fs::read_dir(disks).map_err(Error::system(format!("list {}", disks.display())))?;
    for entry in entries.flatten() {
        if read(entry.path().join("serial")).is_ok_and(|found| found == serial) {
            let number =
                read(entry.path().join("dev")).map_err(Error::system(format!("learn the number of {source}")))?;
            return Ok(Disk { name: entry.file_name().to_string_lossy().into_owned(), number });
        }
    }
    Err(Error::NotFound(format!("a disk with the serial number {}", serial.escape_default())))
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
}

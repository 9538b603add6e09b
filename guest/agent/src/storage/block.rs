//! Disks of the machine, by the name that their device has.

use std::path::Path;

use coracle_protocol::agent::Device;

use crate::kernel_events::await_device;
use crate::{Error, Result, pci};

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
        match read(&folder.join("dev")) {
            Ok(number) => Ok(Self { name, number }),
            // The kernel makes the folder first, and tells of the disk when it is whole (Linux: `device_add`): until then it is not there.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(Error::NotFound(format!("{name}, which is listed, has no number yet")))
            }
            Err(error) => Err(Error::system(format!("learn the number of {name}"))(error)),
        }
    }

    /// Its device file.
    pub(crate) fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }
}

/// Whether a path is a disk's name on the wire.
pub(crate) fn is_name(path: &str) -> bool {
    path.starts_with(BY_SERIAL)
}

/// The disk that `source` names; one that the kernel does not see yet is waited for.
pub(crate) fn find(source: &str) -> Result<Disk> {
    await_device(|| opens(find_in(Path::new(DISKS), source)?))
}

/// The disk at a place on the PCI bus, likewise.
pub(crate) fn at(slots: &[u32]) -> Result<Disk> {
    pci::await_at(slots, |function| opens(of_function(function)?))
}

/// The file that is memory of the machine, at a place on the PCI bus, as a disk.
pub(crate) fn memory_at(slots: &[u32]) -> Result<Disk> {
    pci::await_at(slots, |function| opens(memory_of_function(function)?))
}

/// The disk of a device of the wire: by the name that udev gives it, or by its PCI path.
pub(crate) fn of_device(device: &Device) -> Result<Disk> {
    if is_name(&device.vm_path) {
        return find(&device.vm_path);
    }
    at(&pci::slots(&device.id)?)
}

/// The virtio disk of a PCI function.
fn of_function(function: &Path) -> Result<Disk> {
    let missing = || Error::NotFound(format!("a disk at {}", function.display()));
    let virtio = pci::entry(function, &|name| name.starts_with("virtio")).ok_or_else(missing)?;
    Disk::of(&pci::entry(&virtio.join("block"), &|_| true).ok_or_else(missing)?)
}

/// The disk that the kernel makes of the persistent memory of a PCI function (Linux: drivers/nvdimm).
fn memory_of_function(function: &Path) -> Result<Disk> {
    let missing = || Error::NotFound(format!("memory of a file at {}", function.display()));
    let below = |at: std::path::PathBuf, prefix: &str, has: &str| {
        pci::entry(&at, &|name| name.starts_with(prefix) && name.contains(has)).ok_or_else(missing)
    };
    let parts = [("virtio", ""), ("ndbus", ""), ("region", ""), ("namespace", ".")];
    let space = parts.into_iter().try_fold(function.to_owned(), |at, (prefix, has)| below(at, prefix, has))?;
    Disk::of(&pci::entry(&space.join("block"), &|_| true).ok_or_else(missing)?)
}

/// The disk, once it can be opened: the kernel lists one a moment before, and says that it has come behind that (Linux: `device_add_disk`).
fn opens(disk: Disk) -> Result<Disk> {
    use std::os::unix::fs::OpenOptionsExt;
    let path = disk.path();
    match std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT)) => {
            Err(Error::NotFound(format!("{path}, which is listed, can't be opened: {error}")))
        }
        // Whatever else is wrong with it, waiting does not mend.
        _ => Ok(disk),
    }
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
    fn a_disk_that_is_not_whole_yet_is_not_there_yet() {
        let disks = tempfile::tempdir().unwrap();
        let folder = disks.path().join("vdb");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("serial"), "swap-0").unwrap();
        let found = || find_in(disks.path(), "/dev/disk/by-id/virtio-swap-0");
        assert!(matches!(found(), Err(Error::NotFound(_))), "{:?}", found());
        std::fs::write(folder.join("dev"), "254:16\n").unwrap();
        assert_eq!(found().unwrap(), Disk { name: "vdb".into(), number: "254:16".into() });
    }

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
    fn a_disk_that_is_only_listed_is_waited_for() {
        let disk = |name: &str| Disk { name: name.into(), number: "254:16".into() };
        assert!(matches!(opens(disk("no-such-disk")), Err(Error::NotFound(_))));
        assert_eq!(opens(disk("null")).unwrap(), disk("null"));
    }

    #[test]
    fn a_disk_is_found_at_its_place() {
        let root = tempfile::tempdir().unwrap();
        let disk = root.path().join("0000:00:02.0/0000:01:05.0/virtio3/block/vdb");
        std::fs::create_dir_all(&disk).unwrap();
        std::fs::write(disk.join("dev"), "254:16\n").unwrap();
        let function = pci::find(root.path(), &[2, 5]).unwrap();
        assert_eq!(of_function(&function).unwrap(), Disk { name: "vdb".into(), number: "254:16".into() });
        assert!(matches!(of_function(root.path()), Err(Error::NotFound(_))));
    }

    #[test]
    fn memory_is_found_at_its_place() {
        let root = tempfile::tempdir().unwrap();
        let region = root.path().join("0000:00:04.0/virtio3/ndbus0/region0");
        let disk = region.join("namespace0.0/block/pmem0");
        std::fs::create_dir_all(&disk).unwrap();
        std::fs::write(region.join("namespace_seed"), "").unwrap();
        std::fs::write(disk.join("dev"), "259:0\n").unwrap();
        let function = pci::find(root.path(), &[4]).unwrap();
        assert_eq!(memory_of_function(&function).unwrap(), Disk { name: "pmem0".into(), number: "259:0".into() });
        assert!(matches!(memory_of_function(root.path()), Err(Error::NotFound(_))));
    }
}

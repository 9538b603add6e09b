//! Places on the guest's PCI bus: the slot of each bridge on the way and then the device's own, from the root on, in hexadecimal, with
//! slashes between them.

use std::path::{Path, PathBuf};

use crate::kernel_events::await_device;
use crate::{Error, Result};

/// Where the kernel shows its first bus.
const ROOT: &str = "/sys/devices/pci0000:00";

/// The slots of a place.
pub(crate) fn slots(text: &str) -> Result<Vec<u32>> {
    let slots: std::result::Result<Vec<u32>, _> = text.split('/').map(|slot| u32::from_str_radix(slot, 16)).collect();
    slots.map_err(|_| Error::Invalid(format!("{} is no PCI path", text.escape_default())))
}

/// The folder of the function that `of` finds at a place, once the kernel sees it.
pub(crate) fn await_at<T>(slots: &[u32], of: impl Fn(&Path) -> Result<T>) -> Result<T> {
    await_device(|| of(&find(Path::new(ROOT), slots)?))
}

/// The folder of the first function at a place. Each slot's folder is below that of the one before.
pub(crate) fn find(root: &Path, slots: &[u32]) -> Result<PathBuf> {
    if slots.is_empty() {
        return Err(Error::Invalid("a PCI path without a slot".into()));
    }
    let mut at = root.to_owned();
    for slot in slots {
        let end = format!(":{slot:02x}.0");
        at = entry(&at, &|name| name.ends_with(&end))
            .ok_or_else(|| Error::NotFound(format!("a device at the PCI path {slots:x?}")))?;
    }
    Ok(at)
}

/// The first entry of a folder whose name fits.
pub(crate) fn entry(folder: &Path, fits: &dyn Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_leads_over_bridges() {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("0000:00:1e.0/0000:01:05.0");
        std::fs::create_dir_all(&device).unwrap();
        assert_eq!(find(root.path(), &slots("1e/05").unwrap()).unwrap(), device);
        assert!(matches!(find(root.path(), &[0x1e, 6]), Err(Error::NotFound(_))));
        assert!(matches!(find(root.path(), &[]), Err(Error::Invalid(_))));
        for text in ["", "x", "1/", "../1"] {
            assert!(matches!(slots(text), Err(Error::Invalid(_))), "{text}");
        }
    }
}

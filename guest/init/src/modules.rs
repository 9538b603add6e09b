//! Kernel modules, in the order that the image's builder has found out.

use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The folder of the initrd that holds the modules and `order`, a list of their file names. Behind a name may stand the
/// beginning of the modalias of the device that it is for: without such a device it is not loaded.
const FOLDER: &str = "/modules";

/// Where the kernel shows the devices that matter here.
const DEVICES: &str = "/sys/bus/virtio/devices";

/// Where it shows bridges, behind which devices may come later, and what it calls their class (PCI Code and ID Assignment, 1.7).
const PCI_DEVICES: &str = "/sys/bus/pci/devices";
const BRIDGE: &str = "0x0604";

/// What the devices in `folder` say of themselves in their file `attribute`.
fn devices(folder: &str, attribute: &str) -> Vec<String> {
    let devices = std::fs::read_dir(folder).into_iter().flatten().flatten();
    devices.filter_map(|device| std::fs::read_to_string(device.path().join(attribute)).ok()).collect()
}

/// Loads all that there is a use for, and frees their files' memory. What devices may yet need stays for [`load_more`].
pub(crate) fn load() -> Result<(), String> {
    let may_gain = devices(PCI_DEVICES, "class").iter().any(|class| class.starts_with(BRIDGE));
    each(|path, is_wanted| {
        if is_wanted {
            return load_one(path, false);
        }
        if !may_gain {
            let _ = std::fs::remove_file(path);
        }
        Ok(())
    })
}

/// Loads the modules of devices that have come since the boot.
///
/// # Errors
/// Which module can't be loaded, and why.
pub fn load_more() -> Result<(), String> {
    // A module whose file is gone was loaded.
    each(|path, is_wanted| if is_wanted && path.exists() { load_one(path, true) } else { Ok(()) })
}

/// Calls `act` with each module's file and whether there is a use for it, in their order.
fn each(act: impl Fn(&Path, bool) -> Result<(), String>) -> Result<(), String> {
    let folder = Path::new(FOLDER);
    let Ok(order) = std::fs::read_to_string(folder.join("order")) else { return Ok(()) };
    // Looked at once: a device that comes meanwhile would be given the later ones of its modules without those that they need.
    let aliases = devices(DEVICES, "modalias");
    wanted(&order, &aliases).try_for_each(|(name, is_wanted)| act(&folder.join(name), is_wanted))
}

/// The modules of a list and whether devices of these modaliases, or all machines, have a use for them.
fn wanted<'a>(order: &'a str, aliases: &'a [String]) -> impl Iterator<Item = (&'a str, bool)> {
    let lines = order.lines().filter(|line| !line.is_empty());
    lines.map(|line| match line.split_once(' ') {
        Some((name, device)) => (name, aliases.iter().any(|alias| alias.starts_with(device))),
        None => (line, true),
    })
}

fn load_one(path: &Path, may_be_gone: bool) -> Result<(), String> {
    // One at a time: who comes second finds it loaded, and no file.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if may_be_gone && error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("can't open {}: {error}", path.display())),
    };
    match rustix::system::finit_module(&file, c"", 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(error) => return Err(format!("can't load the module {}: {error}", path.display())),
    }
    // The initrd is memory.
    let _ = std::fs::remove_file(path);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_wanted_by_its_device_or_by_all() {
        let order = "a.ko\ndm.ko virtio:d00000002v\n\nverity.ko virtio:d00000002v\nnet.ko virtio:d00000001v\n";
        let of = |aliases: &[&str]| {
            let aliases: Vec<_> = aliases.iter().map(|&alias| alias.to_owned()).collect();
            wanted(order, &aliases)
                .filter(|&(_, is_wanted)| is_wanted)
                .map(|(name, _)| name)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(of(&[]), "a.ko");
        assert_eq!(of(&["virtio:d00000002v00001AF4\n"]), "a.ko dm.ko verity.ko");
        assert_eq!(of(&["virtio:d00000001v00001AF4\n", "virtio:d00000002v00001AF4\n"]), "a.ko dm.ko verity.ko net.ko");
    }
}

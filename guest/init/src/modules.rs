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

/// Whether there is a device in `folder` whose file `attribute` begins so.
fn has_device(folder: &str, attribute: &str, beginning: &str) -> bool {
    let devices = std::fs::read_dir(folder).into_iter().flatten().flatten();
    devices
        .filter_map(|device| std::fs::read_to_string(device.path().join(attribute)).ok())
        .any(|text| text.starts_with(beginning))
}

/// Loads all that there is a use for, and frees their files' memory. What devices may yet need stays for [`load_more`].
pub(crate) fn load() -> Result<(), String> {
    let may_gain = has_device(PCI_DEVICES, "class", BRIDGE);
    each(|path, device| match device {
        Some(device) if !has_device(DEVICES, "modalias", device) => {
            if !may_gain {
                let _ = std::fs::remove_file(path);
            }
            Ok(())
        }
        _ => load_one(path, false),
    })
}

/// Loads the modules of devices that have come since the boot.
///
/// # Errors
/// Which module can't be loaded, and why.
pub fn load_more() -> Result<(), String> {
    // A module whose file is gone was loaded.
    each(|path, device| match device.filter(|_| path.exists()) {
        Some(device) if has_device(DEVICES, "modalias", device) => load_one(path, true),
        _ => Ok(()),
    })
}

/// Calls `act` with each module's file and the beginning of its device's modalias, in their order.
fn each(act: impl Fn(&Path, Option<&str>) -> Result<(), String>) -> Result<(), String> {
    let folder = Path::new(FOLDER);
    let Ok(order) = std::fs::read_to_string(folder.join("order")) else { return Ok(()) };
    for line in order.lines().filter(|line| !line.is_empty()) {
        let (name, device) = line.split_once(' ').map_or((line, None), |(name, device)| (name, Some(device)));
        act(&folder.join(name), device)?;
    }
    Ok(())
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

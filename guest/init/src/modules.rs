//! Kernel modules, in the order that the image's builder has found out.

use std::fs::File;
use std::path::Path;

/// The folder of the initrd that holds the modules and `order`, a list of their file names. Behind a name may stand the
/// beginning of the modalias of the device that it is for: without such a device it is left.
const FOLDER: &str = "/modules";

/// Where the kernel shows the devices that matter here.
const DEVICES: &str = "/sys/bus/virtio/devices";

/// Whether there is a device whose modalias begins so.
fn has_device(modalias: &str) -> bool {
    let devices = std::fs::read_dir(DEVICES).into_iter().flatten().flatten();
    devices
        .filter_map(|device| std::fs::read_to_string(device.path().join("modalias")).ok())
        .any(|name| name.starts_with(modalias))
}

/// Loads them all, then frees their files' memory.
pub(crate) fn load() -> Result<(), String> {
    let folder = Path::new(FOLDER);
    let Ok(order) = std::fs::read_to_string(folder.join("order")) else { return Ok(()) };
    for line in order.lines().filter(|line| !line.is_empty()) {
        let (name, device) = line.split_once(' ').map_or((line, None), |(name, device)| (name, Some(device)));
        let path = folder.join(name);
        if device.is_some_and(|device| !has_device(device)) {
            let _ = std::fs::remove_file(&path);
            continue;
        }
        let file = File::open(&path).map_err(|error| format!("can't open {}: {error}", path.display()))?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(format!("can't load the module {name}: {error}")),
        }
        // The initrd is memory.
        let _ = std::fs::remove_file(&path);
    }
    Ok(())
}

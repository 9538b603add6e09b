//! Kernel modules, in the order that the image's builder has found out.

use std::fs::File;
use std::path::Path;

/// The folder of the initrd that holds the modules and `order`, a list of their file names.
const FOLDER: &str = "/modules";

/// Loads them all, then frees their files' memory.
pub(crate) fn load() -> Result<(), String> {
    let folder = Path::new(FOLDER);
    let Ok(order) = std::fs::read_to_string(folder.join("order")) else { return Ok(()) };
    for name in order.lines().filter(|line| !line.is_empty()) {
        let path = folder.join(name);
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

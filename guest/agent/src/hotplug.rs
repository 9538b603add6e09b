//! What was added to the machine: processors, memory and swap.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_protocol::agent::{AddSwapPathRequest, AddSwapRequest, OnlineCPUMemRequest};
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::kernel_events::KernelEvents;
use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result, storage};

const SYSTEM: &str = "/sys/devices/system";

/// How long the kernel may take to see a processor that the machine has gained.
const PATIENCE: Duration = Duration::from_secs(10);

/// Turns processors on until there are `nb_cpus`, and waits for those that the kernel does not see yet; and all memory unless only
/// processors are asked for.
pub(crate) async fn online(_: &Arc<Agent>, request: OnlineCPUMemRequest) -> Result<Empty> {
    let work = move || {
        // Listened to before the look.
        let events = KernelEvents::open().map_err(Error::system("listen to the kernel's events"))?;
        let end = Instant::now() + PATIENCE;
        while let Err(error) = processors(Path::new(SYSTEM), request.nb_cpus) {
            if !events.wait(end).map_err(Error::system("wait for the kernel's events"))? {
                return Err(error);
            }
        }
        if request.cpu_only {
            Ok(())
        } else {
            turn_on(&Path::new(SYSTEM).join("memory"), "memory", usize::MAX).map(drop)
        }
    };
    on_thread(work).await?;
    Ok(Empty::new())
}

fn processors(system: &Path, wanted: u32) -> Result<()> {
    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
    if wanted == 0 {
        return Ok(());
    }
    let online = turn_on(&system.join("cpu"), "cpu", wanted)?;
    if online < wanted {
        return Err(Error::State(format!(
            "{online} processors are online and not {wanted}: the machine has no more yet"
        )));
    }
    Ok(())
}

/// Turns on what is off among `PREFIX0`, `PREFIX1` and so on, until `wanted` are on; how many are on then.
fn turn_on(folder: &Path, prefix: &str, wanted: usize) -> Result<usize> {
    let entries = std::fs::read_dir(folder).map_err(Error::system(format!("list {}", folder.display())))?.flatten();
    let number = |name: &str| name.strip_prefix(prefix).and_then(|rest| rest.parse::<u32>().ok());
    let mut all: Vec<(u32, std::path::PathBuf)> =
        entries.filter_map(|entry| Some((number(entry.file_name().to_str()?)?, entry.path().join("online")))).collect();
    all.sort();
    // The first processor has no switch where it can't be turned off.
    let (off, on): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(_, file)| std::fs::read_to_string(file).is_ok_and(|text| text.trim() == "0"));
    let mut count = on.len();
    for (_, file) in off {
        if count >= wanted {
            break;
        }
        std::fs::write(&file, "1").map_err(Error::system(format!("turn {} on", file.display())))?;
        count += 1;
    }
    Ok(count)
}

/// Swaps on the block device at a PCI path: the slot on the root bus, then on each bridge's.
pub(crate) async fn add_swap(_: &Arc<Agent>, request: AddSwapRequest) -> Result<Empty> {
    let disk = on_thread(move || storage::block::at(&request.PCIPath)).await?;
    swap_on(disk.path()).await
}

/// Swaps on a block device by its name.
pub(crate) async fn add_swap_path(_: &Arc<Agent>, request: AddSwapPathRequest) -> Result<Empty> {
    if !request.path.starts_with("/dev/") || request.path.contains("..") {
        return Err(Error::Invalid(format!("{} is no device to swap on", request.path.escape_default())));
    }
    swap_on(request.path).await
}

async fn swap_on(path: String) -> Result<Empty> {
    let step = format!("swap on {}", path.escape_default());
    let name = std::ffi::CString::new(path).map_err(|_| Error::Invalid("a NUL byte in a path".into()))?;
    let work = move || {
        // SAFETY: the path is NUL-terminated and lives through the call.
        #[expect(unsafe_code, reason = "libc has the call and no safe wrapper")]
        let result = unsafe { libc::swapon(name.as_ptr(), 0) };
        if result < 0 { Err(Error::system(step)(std::io::Error::last_os_error())) } else { Ok(()) }
    };
    on_thread(work).await?;
    Ok(Empty::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(folder: &Path, path: &str, text: &str) {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[test]
    fn as_many_processors_as_asked_for() {
        let system = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(system.path().join("cpu/cpu0")).unwrap();
        for (name, on) in [("cpu1", "0\n"), ("cpu2", "1\n"), ("cpu10", "0\n"), ("cpufreq", "0")] {
            file(system.path(), &format!("cpu/{name}/online"), on);
        }
        processors(system.path(), 3).unwrap();
        let on = |name: &str| std::fs::read_to_string(system.path().join("cpu").join(name).join("online")).unwrap();
        assert_eq!((on("cpu1").as_str(), on("cpu10").as_str(), on("cpufreq").as_str()), ("1", "0\n", "0"));
        assert!(matches!(processors(system.path(), 9), Err(Error::State(text)) if text.contains('4')));
        processors(system.path(), 0).unwrap();
    }
}

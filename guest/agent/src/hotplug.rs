//! What was added to the machine: processors, memory and swap.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_protocol::agent::{AddSwapPathRequest, AddSwapRequest, OnlineCPUMemRequest};
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result};

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

/// What the kernel says of its devices (Linux: lib/kobject_uevent.c).
struct KernelEvents(OwnedFd);

impl KernelEvents {
    fn open() -> nix::Result<Self> {
        use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kind = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, kind)?;
        // The first group is the kernel's.
        bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &NetlinkAddr::new(0, 1))?;
        Ok(Self(socket))
    }

    /// Waits for the next ones; false where none comes before `end`.
    fn wait(&self, end: Instant) -> rustix::io::Result<bool> {
        let rest = Timespec::try_from(end.saturating_duration_since(Instant::now())).unwrap_or_default();
        let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
        if poll(&mut ready, Some(&rest))? == 0 {
            return Ok(false);
        }
        // Which they are does not matter, nor that some were lost.
        let mut bytes = [0; 4096];
        while let Ok(1..) | Err(rustix::io::Errno::NOBUFS) = rustix::io::read(&self.0, &mut bytes) {}
        Ok(true)
    }
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
    let device = block_device(Path::new("/sys/devices/pci0000:00"), &request.PCIPath)?;
    swap_on(format!("/dev/{device}")).await
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

    #[test]
    fn a_pci_path_leads_over_bridges() {
        let root = tempfile::tempdir().unwrap();
        file(root.path(), "0000:00:02.0/0000:01:05.0/virtio3/block/vdb/size", "");
        assert_eq!(block_device(root.path(), &[2, 5]).unwrap(), "vdb");
        assert!(matches!(block_device(root.path(), &[2, 6]), Err(Error::NotFound(_))));
        assert!(matches!(block_device(root.path(), &[]), Err(Error::Invalid(_))));
    }
}

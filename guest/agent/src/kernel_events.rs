//! What the kernel says of its devices as they come and go.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{Error, Result};

/// How long the kernel may take to see a device that the machine has gained.
const PATIENCE: Duration = Duration::from_secs(10);

/// What `look` finds, once it is there: it looks again whenever something has come. It waits on its thread.
pub(crate) fn await_device<T>(mut look: impl FnMut() -> Result<T>) -> Result<T> {
    // Listened to before the look.
    let events = KernelEvents::open().map_err(Error::system("listen to the kernel's events"))?;
    let end = Instant::now() + PATIENCE;
    loop {
        // It may be the first of its kind.
        coracle_init::load_modules().map_err(Error::State)?;
        match look() {
            Err(Error::NotFound(text)) => {
                if !events.wait(end).map_err(Error::system("wait for the kernel's events"))? {
                    return Err(Error::NotFound(text));
                }
            }
            found => return found,
        }
    }
}

/// What the kernel says of its devices (Linux: lib/kobject_uevent.c).
pub(crate) struct KernelEvents(OwnedFd);

impl KernelEvents {
    pub(crate) fn open() -> nix::Result<Self> {
        use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let kind = SockProtocol::NetlinkKObjectUEvent;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, kind)?;
        // The first group is the kernel's.
        bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &NetlinkAddr::new(0, 1))?;
        Ok(Self(socket))
    }

    /// Waits for the next ones; false where none comes before `end`.
    pub(crate) fn wait(&self, end: Instant) -> rustix::io::Result<bool> {
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

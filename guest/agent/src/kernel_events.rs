//! What the kernel says of its devices as they come and go.

use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

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

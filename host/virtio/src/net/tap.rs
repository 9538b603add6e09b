//! A tap's descriptor, and what is asked of it beside frames.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

/// What is asked of a tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// The header before each frame has so many bytes. Of the whole link, not of one queue.
    HeaderBytes(libc::c_int),
    /// The reader copes with these (`TUN_F_*`, linux/if_tun.h). Of the whole link, not of one queue.
    Offload(libc::c_uint),
    /// This queue of the link has frames, or none.
    Attach(bool),
}

/// Who asks: the kernel's ioctls but in tests.
pub(super) type Ask = fn(BorrowedFd<'_>, Request) -> io::Result<()>;

/// See the module.
#[derive(Debug)]
pub(super) struct Tap {
    fd: OwnedFd,
    ask: Ask,
    attached: bool,
}

impl Tap {
    pub(super) fn new(fd: OwnedFd, ask: Ask) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { fd, ask, attached: true })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn ask(&self, request: Request) -> io::Result<()> {
        (self.ask)(self.fd.as_fd(), request)
    }

    /// Attaches or detaches the queue, where it isn't so already: the kernel takes either only once.
    pub(super) fn attach(&mut self, attached: bool) -> io::Result<()> {
        if self.attached != attached {
            self.ask(Request::Attach(attached))?;
            self.attached = attached;
        }
        Ok(())
    }
}

/// Asks the kernel.
#[expect(unsafe_code, reason = "ioctls without a safe wrapper")]
pub(super) fn ask_kernel(fd: BorrowedFd<'_>, request: Request) -> io::Result<()> {
    let fd = fd.as_raw_fd();
    let result = match request {
        // SAFETY: the request reads an int behind the pointer, which is to one that lives during the call.
        Request::HeaderBytes(bytes) => unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const bytes) },
        // SAFETY: the request takes its flags by value. The kernel reads an unsigned long.
        Request::Offload(flags) => unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) },
        Request::Attach(attached) => {
            // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
            let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
            let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            interface.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).map_err(io::Error::other)?;
            // SAFETY: the request reads a structure of that type, which lives during the call.
            unsafe { libc::ioctl(fd, libc::TUNSETQUEUE, &raw const interface) }
        }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

//! A tap: a link whose other end is a descriptor.

use std::os::fd::{AsRawFd, OwnedFd};

/// `TUNSETIFF` (linux/if_tun.h): `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// Makes a tap of this name in the calling thread's network namespace, with a descriptor for each of its queues. It lives as long as
/// they.
///
/// # Errors
/// Where the kernel has no tun driver, or the name is taken.
pub(crate) fn make(name: &str, queues: u16) -> std::io::Result<Vec<OwnedFd>> {
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    // The first makes it, and each further one is another queue of it.
    (0..queues.max(1)).map(|_| open(name, kind)).collect()
}

fn open(name: &str, kind: libc::c_int) -> std::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    #[expect(unsafe_code, reason = "a C structure with a union")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero: the kernel wants a terminated name.
    let room = request.ifr_name.len() - 1;
    for (place, byte) in request.ifr_name.iter_mut().take(room).zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(kind).map_err(std::io::Error::other)?;
    // SAFETY: the pointer is to a live structure of the type that the request reads and writes.
    #[expect(unsafe_code, reason = "ioctl")]
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(fd) }
}

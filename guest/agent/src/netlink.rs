//! A little rtnetlink (rtnetlink(7)): what it takes to set links, addresses, routes and neighbours.
//!
//! The library for it would be a tenth of this program.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// The kernel's largest answer to a dump, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// Bytes of a message's header (`struct nlmsghdr`).
const HEADER_BYTES: usize = 16;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Request, acknowledge.
const REQUEST: u16 = 0x1;
const ACK: u16 = 0x4;
/// Replace what is there, create what is not.
pub(crate) const REPLACE: u16 = 0x100 | 0x400;
/// List all.
const DUMP: u16 = 0x300;

/// The kinds of messages (linux/rtnetlink.h).
pub(crate) const NEW_LINK: u16 = 16;
pub(crate) const GET_LINK: u16 = 18;
pub(crate) const NEW_ADDRESS: u16 = 20;
pub(crate) const GET_ADDRESS: u16 = 22;
pub(crate) const NEW_ROUTE: u16 = 24;
pub(crate) const DELETE_ROUTE: u16 = 25;
pub(crate) const GET_ROUTE: u16 = 26;
pub(crate) const NEW_NEIGHBOUR: u16 = 28;

/// A message's fixed part and attributes.
#[derive(Debug, Default)]
pub(crate) struct Body(Vec<u8>);

impl Body {
    /// A body that begins with a structure of the kernel's.
    pub(crate) fn new(fixed: &[&[u8]]) -> Self {
        Self(fixed.concat())
    }

    /// What is sent.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Adds an attribute.
    #[must_use]
    pub(crate) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        // A value of ours is never so long.
        let length = u16::try_from(value.len() + 4).unwrap_or(4);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an address as an attribute.
    #[must_use]
    pub(crate) fn with_ip(self, kind: u16, ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => self.with(kind, &ip.octets()),
            IpAddr::V6(ip) => self.with(kind, &ip.octets()),
        }
    }
}

/// The kernel's number for an address's family.
pub(crate) fn family(ip: IpAddr) -> u8 {
    family_of(ip.is_ipv6())
}

/// The same by version.
pub(crate) fn family_of(is_v6: bool) -> u8 {
    let family = if is_v6 { libc::AF_INET6 } else { libc::AF_INET };
    u8::try_from(family).unwrap_or_default()
}

/// A socket.
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    pub(crate) fn new() -> std::io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        Ok(Self { socket, sequence: 0 })
    }

    fn send(&mut self, kind: u16, flags: u16, body: &Body) -> std::io::Result<()> {
        self.sequence += 1;
        let length = u32::try_from(HEADER_BYTES + body.0.len()).map_err(std::io::Error::other)?;
        let mut message = Vec::new();
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(&body.0);
        send(self.socket.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// Has something changed, and waits for the kernel's word.
    pub(crate) fn change(&mut self, kind: u16, flags: u16, body: &Body) -> std::io::Result<()> {
        self.send(kind, flags | ACK, body)?;
        self.answers(|_| {})
    }

    /// Lists: `each` gets every message's body.
    pub(crate) fn list(&mut self, kind: u16, body: &Body, each: impl FnMut(&[u8])) -> std::io::Result<()> {
        self.send(kind, DUMP, body)?;
        self.answers(each)
    }

    /// Reads messages until the one that ends an answer; `each` gets the bodies of those before it.
    fn answers(&mut self, mut each: impl FnMut(&[u8])) -> std::io::Result<()> {
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        loop {
            let count = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = buffer.get(..count).unwrap_or_default();
            while let Some((kind, sequence, body)) = next_message(&mut rest) {
                if sequence != self.sequence {
                    continue;
                }
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return error(body),
                    _ => each(body),
                }
            }
        }
    }
}

/// An error message holds a negative error number; 0 is the acknowledgement.
fn error(body: &[u8]) -> std::io::Result<()> {
    let number = body.first_chunk().map_or(-libc::EIO, |bytes| i32::from_ne_bytes(*bytes));
    if number == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(-number)) }
}

/// Takes one message off: its kind, sequence number and body.
fn next_message<'a>(rest: &mut &'a [u8]) -> Option<(u16, u32, &'a [u8])> {
    let length = u32::from_ne_bytes(*rest.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(rest.get(4..6)?.try_into().ok()?);
    let sequence = u32::from_ne_bytes(rest.get(8..12)?.try_into().ok()?);
    let body = rest.get(HEADER_BYTES..length)?;
    *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, sequence, body))
}

/// The attributes after the first `fixed` bytes of a message's body.
pub(crate) fn attributes(body: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = body.get(fixed..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The upper bits say how the value is written.
        Some((kind & 0x3fff, value))
    })
}

/// A number from an attribute; 0 where it is too short for one.
pub(crate) fn number(value: &[u8]) -> u32 {
    value.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

/// An address from an attribute.
pub(crate) fn ip(value: &[u8]) -> Option<IpAddr> {
    match value.len() {
        4 => <[u8; 4]>::try_from(value).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(value).ok().map(IpAddr::from),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found_again() {
        let body = Body::new(&[&[9; 8]]).with(3, b"eth0\0").with_ip(1, "10.0.0.1".parse().unwrap());
        assert_eq!(body.0.len(), 8 + 12 + 8);
        let found: Vec<_> = attributes(&body.0, 8).collect();
        assert_eq!(found, [(3, &b"eth0\0"[..]), (1, &[10, 0, 0, 1][..])]);
        assert_eq!(ip(found[1].1), Some("10.0.0.1".parse().unwrap()));
        assert_eq!(attributes(&[1, 0, 0], 0).count(), 0);
        assert_eq!(attributes(&[0, 0, 0, 0], 0).count(), 0, "no attribute is shorter than its header");
    }

    #[test]
    fn the_kernel_answers() {
        let mut netlink = Netlink::new().unwrap();
        let mut names = Vec::new();
        let body = Body::new(&[&[0; 16]]);
        netlink
            .list(GET_LINK, &body, |body| {
                names.extend(attributes(body, 16).filter(|(kind, _)| *kind == 3).map(|(_, name)| name.to_vec()));
            })
            .unwrap();
        assert!(names.contains(&b"lo\0".to_vec()), "{names:?}");
        // A link that is not there.
        let missing = Body::new(&[&[0; 4], &i32::MAX.to_ne_bytes(), &[0; 8]]);
        assert!(netlink.change(NEW_LINK, 0, &missing).is_err());
        assert!(error(&[0; 4]).is_ok() && error(&[]).is_err());
    }
}

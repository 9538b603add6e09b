//! The socket between the agent and `agent init`: one message a packet, a descriptor with it at most.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, recvmsg, sendmsg,
    socketpair,
};
use serde::{Deserialize, Serialize};

use crate::error::Step;
use crate::{Error, Result};

/// The largest message in bytes.
const MESSAGE_BYTES_MAX: usize = 32 * 1024;

/// What is said over a channel.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Message {
    /// From init: the process's pid in the agent's pid namespace.
    Pid(i32),
    /// From init: the terminal's master comes with this message.
    Terminal,
    /// From init: everything is done but the exec.
    Ready,
    /// From init: it failed, and ends.
    Failed(Error),
    /// To init: exec now.
    Start,
}

/// One end.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// Both ends, closed on exec.
    pub(crate) fn pair() -> Result<(Self, Self)> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .step(|| "create the channel to the container's init".into())?;
        Ok((Self(ours), Self(theirs)))
    }

    /// The end that `agent init` inherited.
    pub(crate) fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The descriptor, for a child to inherit.
    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Sends `message`, with a descriptor.
    pub(crate) fn send(&self, message: &Message, fd: Option<RawFd>) -> Result<()> {
        let bytes = serde_json::to_vec(message).map_err(|error| Error::Invalid(error.to_string()))?;
        let fds: Vec<RawFd> = fd.into_iter().collect();
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &control[..0] } else { &control[..] };
        sendmsg::<UnixAddr>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
            .step(|| "write to the channel".into())?;
        Ok(())
    }

    /// The next message, or `None` where the other end is closed.
    pub(crate) fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>> {
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let received = loop {
            match recvmsg::<UnixAddr>(self.0.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(None),
                other => break other.step(|| "read from the channel".into())?,
            }
        };
        let length = received.bytes;
        let mut fd = None;
        for message in received.cmsgs().step(|| "read the channel's descriptors".into())? {
            if let ControlMessageOwned::ScmRights(fds) = message {
                for raw in fds {
                    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
                    #[expect(unsafe_code, reason = "a received descriptor has no safe constructor")]
                    let owned = unsafe { OwnedFd::from_raw_fd(raw) };
                    fd = Some(owned);
                }
            }
        }
        if length == 0 {
            return Ok(None);
        }
        let message = bytes.get(..length).unwrap_or_default();
        let message = serde_json::from_slice(message).map_err(|error| Error::Invalid(format!("channel: {error}")))?;
        Ok(Some((message, fd)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_pass() {
        let (left, right) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        left.send(&Message::Terminal, Some(file.as_raw_fd())).unwrap();
        left.send(&Message::Pid(7), None).unwrap();
        assert!(matches!(right.receive().unwrap(), Some((Message::Terminal, Some(_)))));
        assert!(matches!(right.receive().unwrap(), Some((Message::Pid(7), None))));
        drop(left);
        assert!(right.receive().unwrap().is_none());
    }
}

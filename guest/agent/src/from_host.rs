//! Connections of the host's over vsock, which may all be lost at once: the guest goes on in another machine. The kernel marks each of them as
//! broken then, and wakes nobody who waits to read (Linux: `virtio_vsock_reset_sock`, `vsock_poll`).

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, recv, shutdown, sockopt};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio_vsock::VsockStream;

/// The descriptors of those that are open.
static OPEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

fn open() -> MutexGuard<'static, BTreeSet<RawFd>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One of them.
#[derive(Debug)]
pub(crate) struct FromHost(VsockStream);

impl FromHost {
    pub(crate) fn new(stream: VsockStream) -> Self {
        open().insert(stream.as_raw_fd());
        Self(stream)
    }
}

/// Its number is another's from here on.
impl Drop for FromHost {
    fn drop(&mut self) {
        open().remove(&self.0.as_raw_fd());
    }
}

/// Wakes whoever waits at one of them: it has ended.
pub(crate) fn end_all() {
    // Held: none of these numbers becomes another's meanwhile.
    for descriptor in &*open() {
        // One that has ended by itself is no error.
        let _ = shutdown(*descriptor, Shutdown::Both);
    }
}

/// Waits until a connection ends, or the host says something. Whether it was lost.
///
/// # Errors
/// The kernel's.
pub(crate) async fn is_lost(stream: &VsockStream) -> io::Result<bool> {
    // Of its own: a stream asks for what can be read, and does not hear of what is broken.
    let own = stream.as_fd().try_clone_to_owned()?;
    // SAFETY: an owned descriptor is open, and has the same number, for as long as it is there; `AsyncFd` has it to its end.
    #[expect(unsafe_code, reason = "a type's number could change in general")]
    let watched = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE | Interest::ERROR)? };
    loop {
        let mut ready = watched.ready(Interest::READABLE | Interest::ERROR).await?;
        if getsockopt(&watched, sockopt::SocketError)? == libc::ECONNRESET {
            return Ok(true);
        }
        match recv(watched.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => ready.clear_ready(),
            // An end, or a byte.
            _ => return Ok(false),
        }
    }
}

impl AsyncRead for FromHost {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(context, buffer)
    }
}

impl AsyncWrite for FromHost {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(context)
    }
}

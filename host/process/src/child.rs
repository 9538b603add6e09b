use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::Ring;

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    /// It ended by itself with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(formatter, "exit code {code}"),
            Self::Signal(signal) => write!(formatter, "signal {signal}"),
        }
    }
}

/// A child that was started. Dropping it kills it; the kernel's record of it is reaped all the same.
#[derive(Debug)]
pub struct Child {
    name: String,
    pid: u32,
    pidfd: OwnedFd,
    exit: watch::Receiver<Option<ExitStatus>>,
}

impl Child {
    pub(crate) fn watch(name: String, child: &std::process::Child) -> std::io::Result<Self> {
        let pid = child.id();
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| std::io::Error::other("no pid"))?;
        let pidfd = rustix::process::pidfd_open(raw, PidfdFlags::NONBLOCK)?;
        let ended = watched(pidfd.try_clone()?, Interest::READABLE)?;
        let (sender, exit) = watch::channel(None);
        tokio::spawn(async move {
            let _ = ended.readable().await;
            let status = rustix::process::waitid(WaitId::PidFd(ended.get_ref().as_fd()), WaitIdOptions::EXITED);
            let status = match status {
                Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => ExitStatus::Code(code),
                    (None, signal) => ExitStatus::Signal(signal.unwrap_or(0)),
                },
                _ => ExitStatus::Code(-1),
            };
            sender.send_replace(Some(status));
        });
        Ok(Self { name, pid, pidfd, exit })
    }

    /// The program.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end. Any number of callers may.
    pub fn wait(&self) -> impl Future<Output = ExitStatus> + Send + 'static {
        let mut exit = self.exit.clone();
        async move {
            let status = exit.wait_for(Option::is_some).await.map(|status| *status);
            status.ok().flatten().unwrap_or(ExitStatus::Code(-1))
        }
    }

    /// How it ended, where it has.
    #[must_use]
    pub fn status(&self) -> Option<ExitStatus> {
        *self.exit.borrow()
    }

    /// Kills it. One that has ended stays as it is.
    pub fn kill(&self) {
        if self.status().is_none() {
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Registers a descriptor with the event loop, for what `interest` names.
///
/// # Errors
/// Where the event loop takes none of its kind.
pub fn watched(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open file for as long as it lives, and lives in the `AsyncFd` until that has
    // taken it off the event loop.
    #[expect(unsafe_code, reason = "tokio can't know that of every type")]
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(Into::into)
}

/// Moves what comes out of `stream` into `ring`, until its end.
pub(crate) fn pump(stream: OwnedFd, ring: Ring) -> std::io::Result<()> {
    rustix::io::ioctl_fionbio(&stream, true)?;
    let stream = watched(stream, Interest::READABLE)?;
    tokio::spawn(async move {
        let mut chunk = [0; 4096];
        loop {
            let read = stream
                .async_io(Interest::READABLE, |fd| rustix::io::read(fd, &mut chunk).map_err(std::io::Error::from))
                .await;
            match read {
                Ok(count) if count > 0 => ring.push(&chunk[..count]),
                _ => return,
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;
    use crate::{Error, Output, Spawn};

    #[tokio::test]
    async fn its_end_is_an_event() {
        let child = Spawn::new("sh").arguments(["-c", "exit 7"]).start().unwrap();
        assert_eq!(child.wait().await, ExitStatus::Code(7));
        assert_eq!(child.status(), Some(ExitStatus::Code(7)));
        let child = Spawn::new("sleep").argument("1000").start().unwrap();
        let end = child.wait();
        drop(child);
        assert_eq!(end.await, ExitStatus::Signal(9));
    }

    #[tokio::test]
    async fn output_and_descriptors() {
        let ring = Ring::new(1000);
        let mut file = std::fs::File::from(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let mut spawn = Spawn::new("sh").arguments(["-c", "echo out; echo in >&5"]);
        spawn.stdout = Output::Ring(ring.clone());
        let child = spawn.descriptor(5, file.try_clone().unwrap().into()).start().unwrap();
        child.wait().await;
        file.flush().unwrap();
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "in\n");
        // The pump sees the end of the pipe after the end of the child.
        while ring.last_lines(1).is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(ring.last_lines(1), ["out"]);
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = Spawn::new("/nowhere/qemu").start().unwrap_err();
        assert!(matches!(error, Error::Missing { .. }));
        assert_eq!(error.to_string(), "/nowhere/qemu is missing");
    }
}

//! A process of a container: its streams and its end.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use coracle_container::{Prepared, Stdio};
use coracle_faults as faults;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, watch};

use crate::thread::on_thread;
use crate::{Error, Result};

/// The capacity that is asked for each pipe, in bytes: what a reader finds when it comes late.
const PIPE_BYTES: usize = 256 * 1024;

/// One process.
pub(crate) struct Process {
    pidfd: AsyncFd<OwnedFd>,
    /// Holds the prepared process until it is started.
    prepared: Mutex<Option<Prepared>>,
    pub(crate) stdin: Mutex<Option<Stream>>,
    pub(crate) stdout: Mutex<Output>,
    pub(crate) stderr: Mutex<Output>,
    terminal: Option<OwnedFd>,
    exit: watch::Receiver<Option<i32>>,
    waited: AtomicBool,
}

/// A stream that is read, until its end.
#[derive(Default)]
pub(crate) struct Output {
    stream: Option<Stream>,
}

/// A pipe's or terminal's end, ready for the event loop.
pub(crate) struct Stream(AsyncFd<OwnedFd>);

/// Registers a descriptor with the event loop.
pub(crate) fn watched(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` names the same open file for as long as it lives, and lives in the `AsyncFd` until that has
    // taken it off the event loop.
    #[expect(unsafe_code, reason = "tokio can't know that of every type")]
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    registered.map_err(Into::into)
}

impl Stream {
    pub(crate) fn new(fd: OwnedFd) -> Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(Error::system("make a stream nonblocking"))?;
        Ok(Self(watched(fd, Interest::READABLE | Interest::WRITABLE).map_err(Error::system("watch a stream"))?))
    }

    /// Reads what there is, at most `buffer`; 0 at the end.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self
            .0
            .async_io(Interest::READABLE, |fd| rustix::io::read(fd, &mut *buffer).map_err(std::io::Error::from))
            .await;
        ended(read)
    }

    /// Reads behind what `buffer` holds, within its capacity; 0 at the end.
    pub(crate) async fn read_into(&self, buffer: &mut Vec<u8>) -> std::io::Result<usize> {
        let read = self
            .0
            .async_io(Interest::READABLE, |fd| {
                rustix::io::read(fd, rustix::buffer::spare_capacity(buffer)).map_err(std::io::Error::from)
            })
            .await;
        ended(read)
    }

    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> std::io::Result<()> {
        while !bytes.is_empty() {
            let written = self.write(bytes).await?;
            bytes = bytes.get(written..).unwrap_or_default();
        }
        Ok(())
    }

    async fn write(&self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.async_io(Interest::WRITABLE, |fd| rustix::io::write(fd, bytes).map_err(std::io::Error::from)).await
    }
}

/// EIO is how a terminal says that its last user has closed it.
fn ended(read: std::io::Result<usize>) -> std::io::Result<usize> {
    match read {
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
        other => other,
    }
}

impl Output {
    /// The stream itself, for somebody who moves it from now on. To all others it is at its end.
    pub(crate) fn take(&mut self) -> Option<Stream> {
        self.stream.take()
    }

    /// What there is, at most `len` bytes; empty at the end.
    pub(crate) async fn read(&mut self, len: usize) -> std::io::Result<Vec<u8>> {
        let Some(stream) = &self.stream else { return Ok(Vec::new()) };
        let mut bytes = vec![0; len];
        let count = stream.read(&mut bytes).await?;
        bytes.truncate(count);
        if count == 0 {
            self.stream = None;
        }
        Ok(bytes)
    }
}

/// The agent's ends of a new process's streams, and the process's.
pub(crate) struct Streams {
    pub(crate) theirs: Stdio,
    ours: Option<(OwnedFd, OwnedFd, OwnedFd)>,
}

impl Streams {
    pub(crate) fn new(terminal: bool) -> Result<Self> {
        if terminal {
            return Ok(Self { theirs: Stdio::Terminal, ours: None });
        }
        let pipe = || {
            let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
            // Beyond the user's allowance the pipe keeps the kernel's usual size.
            let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
            Ok::<_, rustix::io::Errno>((read, write))
        };
        let step = || Error::system("make a pipe");
        let (stdin, to_stdin) = pipe().map_err(step())?;
        let (from_stdout, stdout) = pipe().map_err(step())?;
        let (from_stderr, stderr) = pipe().map_err(step())?;
        let theirs = Stdio::Streams { stdin, stdout, stderr };
        Ok(Self { theirs, ours: Some((to_stdin, from_stdout, from_stderr)) })
    }

    /// Splits off what the engine takes.
    pub(crate) fn split(self) -> (Stdio, OurEnds) {
        (self.theirs, OurEnds(self.ours))
    }
}

/// The agent's ends; none for a terminal.
pub(crate) struct OurEnds(Option<(OwnedFd, OwnedFd, OwnedFd)>);

impl Process {
    /// Takes over a prepared process and watches for its end. Where that can't be done the process is ended: one that nobody reaps would keep
    /// its container's first process from its end.
    pub(crate) async fn watch(prepared: Prepared, ours: OurEnds) -> Result<Arc<Self>> {
        let pid = Pid::from_raw(prepared.pid);
        let watched = async {
            faults::at("guest.process.watch").await?;
            Self::watch_now(prepared, ours)
        };
        match (watched.await, pid) {
            (Err(error), Some(pid)) => {
                let end = move || {
                    let _ = rustix::process::kill_process(pid, Signal::KILL);
                    let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                    Ok::<_, Error>(())
                };
                on_thread(end).await?;
                Err(error)
            }
            (watched, _) => watched,
        }
    }

    /// Fails only before anybody else reaps the process.
    fn watch_now(mut prepared: Prepared, ours: OurEnds) -> Result<Arc<Self>> {
        let pid = Pid::from_raw(prepared.pid).ok_or_else(|| Error::State("the process has no pid".into()))?;
        let pidfd =
            rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).map_err(Error::system("open the process"))?;
        let waited_for = pidfd.try_clone().map_err(Error::system("copy the process's descriptor"))?;
        let (stdin, stdout, stderr, terminal) = match (ours.0, prepared.terminal.take()) {
            (Some((stdin, stdout, stderr)), _) => {
                (Stream::new(stdin)?, Some(Stream::new(stdout)?), Some(Stream::new(stderr)?), None)
            }
            (None, Some(master)) => {
                let copy = |fd: &OwnedFd| fd.try_clone().map_err(Error::system("copy the terminal"));
                (Stream::new(copy(&master)?)?, Some(Stream::new(copy(&master)?)?), None, Some(master))
            }
            (None, None) => return Err(Error::State("the process has no streams".into())),
        };
        let (sender, exit) = watch::channel(None);
        let process = Arc::new(Self {
            pidfd: watched(pidfd, Interest::READABLE).map_err(Error::system("watch the process"))?,
            prepared: Mutex::new(Some(prepared)),
            stdin: Mutex::new(Some(stdin)),
            stdout: Mutex::new(Output { stream: stdout }),
            stderr: Mutex::new(Output { stream: stderr }),
            terminal,
            exit,
            waited: AtomicBool::new(false),
        });
        let ended = watched(waited_for, Interest::READABLE).map_err(Error::system("watch the process"))?;
        tokio::spawn(async move {
            let status = match ended.readable().await {
                Ok(_) => reap(ended.get_ref()),
                Err(_) => 255,
            };
            sender.send_replace(Some(status));
        });
        Ok(process)
    }

    /// Sends a signal by number. A process that has ended is not found.
    pub(crate) fn signal(&self, number: i32) -> Result<()> {
        if self.exit.borrow().is_some() {
            return Err(Error::NotFound("process".into()));
        }
        // SAFETY: any number may be tried: the kernel answers EINVAL for one that is no signal.
        #[expect(unsafe_code, reason = "real-time signals have no named constant")]
        let signal = unsafe { Signal::from_raw_unchecked(number) };
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::SRCH) => Err(Error::NotFound("process".into())),
            Err(rustix::io::Errno::INVAL) => Err(Error::Invalid(format!("{number} is no signal"))),
            Err(errno) => Err(Error::system("send a signal")(errno)),
        }
    }

    /// The exit status once there is one: the code, or 128 and the signal.
    pub(crate) async fn wait(&self) -> i32 {
        let mut exit = self.exit.clone();
        let status = exit.wait_for(Option::is_some).await.map(|status| *status);
        status.ok().flatten().unwrap_or(255)
    }

    /// Lets a prepared process exec.
    pub(crate) async fn start(&self) -> Result<()> {
        let prepared =
            self.prepared.lock().await.take().ok_or_else(|| Error::State("the process was started already".into()))?;
        // The engine waits for the exec.
        on_thread(move || prepared.start()).await
    }

    /// Gives up the agent's ends of all streams.
    pub(crate) async fn close_streams(&self) {
        self.stdin.lock().await.take();
        self.stdout.lock().await.stream = None;
        self.stderr.lock().await.stream = None;
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    pub(crate) fn set_waited(&self) {
        self.waited.store(true, Ordering::Relaxed);
    }

    /// Waited for, and both streams read to their ends.
    pub(crate) fn is_done(&self) -> bool {
        let read = |output: &Mutex<Output>| output.try_lock().is_ok_and(|output| output.stream.is_none());
        self.waited.load(Ordering::Relaxed) && read(&self.stdout) && read(&self.stderr)
    }

    /// Sets the terminal's size.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let terminal = self.terminal.as_ref().ok_or_else(|| Error::State("the process has no terminal".into()))?;
        let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(terminal, size).map_err(Error::system("size the terminal"))
    }
}

fn reap(pidfd: &OwnedFd) -> i32 {
    match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
        Ok(Some(status)) => {
            status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(255)
        }
        _ => 255,
    }
}

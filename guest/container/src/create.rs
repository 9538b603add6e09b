//! The agent's side of a start: prepare `agent init`, hear what it says, let it go.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio as ChildStdio};

use oci_spec::runtime::{LinuxPersonality, LinuxSeccomp, Spec};

use crate::channel::{Channel, Message};
use crate::error::Step;
use crate::plan::{Place, Plan};
use crate::{Error, Result};

/// The descriptors on which `agent init` finds its channel and its plan.
pub(crate) const CHANNEL_FD: i32 = 3;
pub(crate) const PLAN_FD: i32 = 4;

/// The standard streams of a process.
#[derive(Debug)]
pub enum Stdio {
    /// A terminal, made inside the container; its master comes back in [`Prepared::terminal`].
    Terminal,
    /// Pipes or files.
    Streams {
        /// The reading end that the process gets.
        stdin: OwnedFd,
        /// The writing end that the process gets.
        stdout: OwnedFd,
        /// The writing end that the process gets.
        stderr: OwnedFd,
    },
}

/// A process that is ready and waits for its start.
#[derive(Debug)]
pub struct Prepared {
    /// Its pid in the agent's pid namespace; its parent is the agent (a child subreaper), which must reap it.
    pub pid: i32,
    /// The terminal's master.
    pub terminal: Option<OwnedFd>,
    channel: Channel,
}

impl Prepared {
    /// Lets the process exec. Where that fails the process ends and the error says why.
    ///
    /// # Errors
    /// [`Error::Command`] or [`Error::System`].
    pub fn start(self) -> Result<()> {
        self.channel.send(&Message::Start, None)?;
        match self.channel.receive()? {
            None => Ok(()),
            Some((Message::Failed(error), _)) => Err(error),
            Some(_) => Err(Error::Invalid("the container's init spoke out of turn".into())),
        }
    }
}

/// What a container is made from.
#[derive(Debug)]
pub struct New {
    /// Its specification.
    pub spec: Spec,
    /// Its root file system: a folder.
    pub rootfs: PathBuf,
    /// The process whose pid namespace it joins ([`crate::pause::start`]); it gets one of its own where there is none.
    pub pids_of: Option<i32>,
}

/// Prepares a container's first process. `program` is the agent's own file, `cgroup` an existing cgroup folder.
///
/// # Errors
/// What `agent init` says, or [`Error::System`]; then no process is left.
pub fn create(program: &Path, cgroup: &Path, new: New, stdio: Stdio) -> Result<Prepared> {
    let New { spec, rootfs, pids_of } = new;
    let process = spec.process().clone().ok_or_else(|| Error::Invalid("the specification has no process".into()))?;
    let linux = spec.linux().as_ref();
    let seccomp = linux.and_then(|linux| linux.seccomp().clone());
    let personality = linux.and_then(|linux| linux.personality().clone());
    let place = Place::New { spec: Box::new(spec), rootfs, pids_of };
    prepare(program, &Plan { cgroup: cgroup.to_owned(), process, place, seccomp, personality }, stdio)
}

/// Another process of a container.
#[derive(Debug)]
pub struct Beside {
    /// The container's first process.
    pub pid: i32,
    /// What to run.
    pub process: oci_spec::runtime::Process,
    /// The container's profile, which counts for all its processes.
    pub seccomp: Option<LinuxSeccomp>,
    /// The same of its personality.
    pub personality: Option<LinuxPersonality>,
}

/// Prepares another process in a container.
///
/// # Errors
/// As [`create`].
pub fn exec(program: &Path, cgroup: &Path, beside: Beside, stdio: Stdio) -> Result<Prepared> {
    let Beside { pid, process, seccomp, personality } = beside;
    let place = Place::Join { pid };
    prepare(program, &Plan { cgroup: cgroup.to_owned(), process, place, seccomp, personality }, stdio)
}

fn prepare(program: &Path, plan: &Plan, stdio: Stdio) -> Result<Prepared> {
    let sealed = plan.seal()?;
    let (channel, theirs) = Channel::pair()?;
    let mut command = Command::new(program);
    command.arg("init").env_clear();
    match stdio {
        Stdio::Terminal => {
            command.stdin(ChildStdio::null()).stdout(ChildStdio::null()).stderr(ChildStdio::null());
        }
        Stdio::Streams { stdin, stdout, stderr } => {
            command.stdin(stdin).stdout(stdout).stderr(stderr);
        }
    }
    inherit(&mut command, [(theirs.as_raw_fd(), CHANNEL_FD), (sealed.as_raw_fd(), PLAN_FD)]);
    let mut child = command.spawn().step(|| format!("start {}", program.display()))?;
    // Our copies of the child's ends: the channel must close when the child is gone.
    drop((command, theirs, sealed));
    let heard = hear(&channel);
    // The stage that was spawned ends as soon as it has forked the process proper.
    child.wait().step(|| "wait for the container's init".into())?;
    match heard {
        Ok((pid, terminal)) => Ok(Prepared { pid, terminal, channel }),
        Err((pid, error)) => {
            if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            }
            Err(error)
        }
    }
}

/// Puts descriptors where the program that is started looks for them: each is given with its number there.
pub(crate) fn inherit<const N: usize>(command: &mut Command, descriptors: [(i32, i32); N]) {
    let place = move || {
        // High copies first, so that no target is overwritten before it is read.
        let mut copies = descriptors;
        for (fd, _) in &mut copies {
            *fd = fcntl_dup(*fd)?;
        }
        copies.iter().try_for_each(|(fd, target)| dup2(*fd, *target))
    };
    // SAFETY: between fork and exec the closure makes only fcntl and dup2 calls, which are async-signal-safe, and
    // allocates nothing.
    #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
    unsafe {
        command.pre_exec(place);
    }
}

fn fcntl_dup(fd: i32) -> std::io::Result<i32> {
    // SAFETY: F_DUPFD_CLOEXEC takes no pointers; a bad descriptor is answered with EBADF.
    #[expect(unsafe_code, reason = "the libc call is the async-signal-safe one")]
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) };
    if copy < 0 { Err(std::io::Error::last_os_error()) } else { Ok(copy) }
}

fn dup2(from: i32, to: i32) -> std::io::Result<()> {
    // SAFETY: dup2 takes no pointers; `to` is a number that only this child's start uses.
    #[expect(unsafe_code, reason = "the libc call is the async-signal-safe one")]
    let result = unsafe { libc::dup2(from, to) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Listens until init is ready. An error comes with the pid of what must be killed.
///
/// The two stages of init speak independently: the pid may come after "ready" or an error, but come it must, unless the
/// first stage failed before it forked.
fn hear(channel: &Channel) -> std::result::Result<(i32, Option<OwnedFd>), (Option<i32>, Error)> {
    let mut pid = None;
    let mut terminal = None;
    let mut outcome: Option<Result<()>> = None;
    loop {
        match (pid, outcome.take()) {
            (Some(pid), Some(Ok(()))) => return Ok((pid, terminal)),
            (Some(pid), Some(Err(error))) => return Err((Some(pid), error)),
            (_, pending) => outcome = pending,
        }
        match channel.receive() {
            Ok(Some((Message::Pid(number), _))) => pid = Some(number),
            Ok(Some((Message::Terminal, fd))) => terminal = fd,
            Ok(Some((Message::Ready, _))) => outcome = Some(Ok(())),
            Ok(Some((Message::Failed(error), _))) => outcome = Some(Err(error)),
            Ok(Some((Message::Start, _))) => return Err((pid, Error::Invalid("init spoke out of turn".into()))),
            Ok(None) => return Err((pid, outcome.and_then(Result::err).unwrap_or(Error::InitGone))),
            Err(error) => return Err((pid, error)),
        }
    }
}

/// Takes over a descriptor that this process inherited at a known number.
pub(crate) fn inherited(number: i32) -> OwnedFd {
    // SAFETY: `agent init` is started with exactly these descriptors open, and takes each of them once, first thing.
    #[expect(unsafe_code, reason = "an inherited descriptor has no safe constructor")]
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    // A copy leaves the low number and gains close-on-exec; without one the original does as well.
    fd.try_clone().unwrap_or(fd)
}

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::{CapabilitySet, Child, Confinement, Error, Ring, privileges};

/// Where a child's output goes.
#[derive(Debug, Clone)]
pub enum Output {
    /// Into a ring, from where a failure's report takes the last lines.
    Ring(Ring),
    /// Nowhere.
    Null,
}

/// A child process to start: a description that has no effect until [`Spawn::start`].
#[derive(Debug)]
pub struct Spawn {
    /// The program's path, or a name for `$PATH`.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// Descriptors that it inherits, by the number that it finds them at, 3 or more.
    pub descriptors: Vec<(RawFd, OwnedFd)>,
    /// Whether it is the first process of a pid namespace of its own, where it sees no process of the host's.
    pub own_pid_namespace: bool,
    /// The capabilities that it has at most; none here is all that this process has.
    pub capabilities: Option<CapabilitySet>,
    /// As whom it runs and what it sees; none here is as this process.
    pub confinement: Option<Confinement>,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
}

impl Spawn {
    /// A child with null streams and no arguments.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            descriptors: Vec::new(),
            own_pid_namespace: false,
            capabilities: None,
            confinement: None,
            stdout: Output::Null,
            stderr: Output::Null,
        }
    }

    /// Adds an argument.
    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn arguments<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Lets the child inherit `fd` as number `target`.
    #[must_use]
    pub fn descriptor(mut self, target: RawFd, fd: OwnedFd) -> Self {
        self.descriptors.push((target, fd));
        self
    }

    /// Gives it a pid namespace of its own.
    #[must_use]
    pub fn in_own_pid_namespace(mut self) -> Self {
        self.own_pid_namespace = true;
        self
    }

    /// Leaves it these capabilities at most.
    #[must_use]
    pub fn with_capabilities(mut self, kept: CapabilitySet) -> Self {
        self.capabilities = Some(kept);
        self
    }

    /// Starts it. It must be called on a thread that lives as long as the child should: the kernel kills the child when
    /// that thread ends.
    ///
    /// # Errors
    /// [`Error::Missing`] or [`Error::Start`].
    pub fn start(self) -> Result<Child, Error> {
        let name = self.program.display().to_string();
        let failed = |source: std::io::Error| match source.kind() {
            std::io::ErrorKind::NotFound => Error::Missing { program: name.clone() },
            _ => Error::Start { program: name.clone(), source },
        };
        let mut command = Command::new(&self.program);
        let stream = |output: &Output| match output {
            Output::Ring(_) => Stdio::piped(),
            Output::Null => Stdio::null(),
        };
        command.args(&self.arguments).stdin(Stdio::null()).stdout(stream(&self.stdout)).stderr(stream(&self.stderr));
        let descriptors: Vec<(RawFd, RawFd)> =
            self.descriptors.iter().map(|(target, fd)| (*target, fd.as_raw_fd())).collect();
        if descriptors.len() > DESCRIPTORS_MAX
            || descriptors.iter().any(|(target, _)| !(3..FIRST_COPY).contains(target))
        {
            return Err(failed(std::io::Error::other("too many descriptors, or numbers out of range")));
        }
        let (capabilities, confinement) = (self.capabilities, self.confinement);
        let own = rustix::process::pidfd_open(rustix::process::getpid(), rustix::process::PidfdFlags::empty());
        // By this a child of another namespace sees its parent's end, too. Out of the way of the targets.
        let watched = own.and_then(|own| rustix::io::fcntl_dupfd_cloexec(own, FIRST_COPY));
        let watched = watched.map_err(|error| failed(error.into()))?;
        // The standard library's pipe, by which a child tells why it could not start, must not lie where a target comes.
        let places = occupied(descriptors.iter().map(|(target, _)| *target).max()).map_err(failed)?;
        let setup = move || prepare(&watched, &descriptors, capabilities, confinement.as_ref());
        // SAFETY: between fork and exec the closure makes system calls only (prctl, capset, poll, fcntl, dup3; for a confined child unshare,
        // mounts, one device, and those that change its user), and allocates nothing: its paths are C strings already.
        #[expect(unsafe_code, reason = "pre_exec is unsafe by declaration")]
        unsafe {
            command.pre_exec(setup);
        }
        let namespace = if self.own_pid_namespace { Some(PidNamespace::enter().map_err(failed)?) } else { None };
        let spawned = command.spawn();
        drop(places);
        if let Some(namespace) = namespace {
            namespace.leave().map_err(failed)?;
        }
        let mut child = spawned.map_err(failed)?;
        let outputs = [
            (child.stdout.take().map(OwnedFd::from), &self.stdout),
            (child.stderr.take().map(OwnedFd::from), &self.stderr),
        ];
        for (stream, output) in outputs {
            if let (Some(stream), Output::Ring(ring)) = (stream, output) {
                crate::child::pump(stream, ring.clone()).map_err(failed)?;
            }
        }
        Child::watch(name.clone(), &child).map_err(failed)
    }
}

/// Takes every number that is free up to this one.
fn occupied(last: Option<RawFd>) -> std::io::Result<Vec<OwnedFd>> {
    let mut places = Vec::new();
    let Some(last) = last else { return Ok(places) };
    let mut next: OwnedFd = std::fs::File::open("/dev/null")?.into();
    while next.as_raw_fd() <= last {
        let following = rustix::io::fcntl_dupfd_cloexec(&next, 3)?;
        places.push(next);
        next = following;
    }
    Ok(places)
}

/// A pid namespace into which this thread's children are born. The thread itself stays where it is.
struct PidNamespace {
    own: OwnedFd,
}

impl PidNamespace {
    fn enter() -> std::io::Result<Self> {
        let own = std::fs::File::open("/proc/thread-self/ns/pid_for_children")?.into();
        // SAFETY: the flag is not CLONE_FILES, and changes what later children are born into, nothing of this thread's.
        #[expect(unsafe_code, reason = "unshare of descriptors would be another matter")]
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }?;
        Ok(Self { own })
    }

    fn leave(self) -> std::io::Result<()> {
        let kind = rustix::thread::LinkNameSpaceType::ProcessID;
        Ok(rustix::thread::move_into_link_name_space(self.own.as_fd(), Some(kind))?)
    }
}

/// In the child, before exec. The targets are taken in two steps, so that no copy is overwritten before it is in place.
fn prepare(
    parent: &OwnedFd,
    descriptors: &[(RawFd, RawFd)],
    capabilities: Option<CapabilitySet>,
    confinement: Option<&Confinement>,
) -> std::io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    // Copies above all targets first: a target may be the number of a source that is still to be copied.
    let mut copies = [-1; DESCRIPTORS_MAX];
    for (copy, (_, source)) in copies.iter_mut().zip(descriptors) {
        // SAFETY: the call takes no pointers; a bad descriptor is answered with EBADF.
        #[expect(unsafe_code, reason = "the safe wrappers own the copy, which here is only a number")]
        let result = unsafe { libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, FIRST_COPY) };
        if result < 0 {
            return Err(std::io::Error::last_os_error());
        }
        *copy = result;
    }
    for (copy, (target, _)) in copies.iter().zip(descriptors) {
        duplicate(*copy, *target, 0)?;
    }
    if let Some(confinement) = confinement {
        let kept = capabilities.unwrap_or(CapabilitySet::empty());
        confinement.leave()?;
        privileges::bound(kept)?;
        confinement.become_user()?;
        privileges::limit(kept)?;
        confinement.give_up_calls()?;
    } else if let Some(kept) = capabilities {
        privileges::keep_only(kept)?;
    }
    // Last, for a change of user would take it back.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    let mut events = [rustix::event::PollFd::new(parent, rustix::event::PollFlags::IN)];
    match rustix::event::poll(&mut events, Some(&rustix::event::Timespec::default()))? {
        0 => Ok(()),
        // The parent died before the line above.
        _ => Err(std::io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// The most descriptors that a child inherits, and the number after their numbers, which begin at 3.
const DESCRIPTORS_MAX: usize = 512;
pub(crate) const FIRST_COPY: RawFd = 515;

fn duplicate(from: RawFd, to: RawFd, flags: libc::c_int) -> std::io::Result<()> {
    // SAFETY: dup3 takes no pointers; what the freshly forked child has at the target numbers are copies of the parent's, which it does not use.
    #[expect(unsafe_code, reason = "the safe wrappers own the target, which here is only a number")]
    let result = unsafe { libc::dup3(from, to, flags) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

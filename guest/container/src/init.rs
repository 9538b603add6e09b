//! `agent init`: becomes the process that the plan describes. Single-threaded from its first instruction to exec.
//!
//! ```text
//! agent ── spawn ─▶ stage one: joins the cgroup, makes or joins the namespaces, forks ── tells the pid, ends
//!                     └─▶ stage two: pid 1 of the container (or a process beside it): mounts, privileges,
//!                         "ready", waits for "start", exec
//! ```

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::sched::CloneFlags;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::ForkResult;
use oci_spec::runtime::{LinuxNamespaceType, LinuxPersonality, LinuxPersonalityDomain, LinuxTimeOffset, Process, Spec};

use crate::channel::{Channel, Message};
use crate::create::{CHANNEL_FD, PLAN_FD, inherited};
use crate::error::Step;
use crate::plan::{Place, Plan};
use crate::seccomp::Filter;
use crate::{Error, Result, command, label, privilege, rootfs, terminal, user};

/// Runs `agent init`. It returns, with the process's exit code, only where there was no exec.
#[must_use]
pub fn run() -> i32 {
    let channel = Channel::from_fd(inherited(CHANNEL_FD));
    match prepare(&channel, inherited(PLAN_FD)) {
        Ok(()) => 0,
        Err(error) => {
            // With the channel gone there is nobody left to tell.
            let _ = channel.send(&Message::Failed(error), None);
            1
        }
    }
}

fn prepare(channel: &Channel, plan: OwnedFd) -> Result<()> {
    // Nobody in the container may look at this process, or through it at the agent's file, before it execs.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .step(|| "turn off dumping".into())?;
    let plan = Plan::read(plan)?;
    join_cgroup(&plan.cgroup)?;
    set_oom_score(&plan.process)?;
    // By the guest's own /proc, which no container has its hands in. The child that execs inherits it.
    label::set(&plan.process)?;
    match &plan.place {
        Place::New { spec, pids_of, .. } => make_namespaces(spec, *pids_of)?,
        Place::Join { pid } => join_namespaces(*pid)?,
    }
    // SAFETY: this process has one thread, so the child may do anything that its parent may.
    #[expect(unsafe_code, reason = "fork is unsafe by declaration")]
    let forked = unsafe { nix::unistd::fork() }.step(|| "fork".into())?;
    match forked {
        ForkResult::Parent { child } => channel.send(&Message::Pid(child.as_raw()), None),
        ForkResult::Child => {
            let code = match become_process(channel, &plan) {
                Ok(never) => match never {},
                Err(error) => {
                    let _ = channel.send(&Message::Failed(error), None);
                    1
                }
            };
            std::process::exit(code);
        }
    }
}

fn become_process(channel: &Channel, plan: &Plan) -> Result<std::convert::Infallible> {
    nix::unistd::setsid().step(|| "start a session".into())?;
    let process = &plan.process;
    let wants_terminal = process.terminal().unwrap_or(false);
    if let Some(wanted) = &plan.personality {
        set_personality(wanted)?;
    }
    if let Place::New { spec, rootfs, .. } = &plan.place {
        set_names(spec)?;
        rootfs::enter(spec, rootfs, wants_terminal)?;
    }
    if wants_terminal {
        let master = terminal::open(process.console_size(), matches!(plan.place, Place::New { .. }))?;
        channel.send(&Message::Terminal, Some(std::os::fd::AsRawFd::as_raw_fd(&master)))?;
    }
    let identity = user::resolve(process)?;
    let mut environment: Vec<String> = process.env().clone().unwrap_or_default();
    if !environment.iter().any(|entry| entry.starts_with("HOME=")) {
        environment.push(format!("HOME={}", identity.home));
    }
    let cwd = process.cwd();
    if matches!(plan.place, Place::New { .. }) && !cwd.as_os_str().is_empty() {
        // As runc does: a missing working directory of a container is made. An error shows at chdir.
        let _ = std::fs::create_dir_all(cwd);
    }
    terminal::give_to(&identity);
    privilege::set_rlimits(process)?;
    reset_signals()?;
    // What is opened from here on closes by itself.
    close_on_exec()?;
    let seccomp = plan.seccomp.as_ref().map(Filter::new).transpose()?;
    let new_privileges = !process.no_new_privileges().unwrap_or(false);
    if let Some(filter) = seccomp.as_ref().filter(|_| new_privileges) {
        // It takes a privilege that goes next; so the profile must allow what is still to be done.
        filter.apply()?;
    }
    let arguments = process.args().clone().unwrap_or_default();
    let name = arguments.first().cloned().unwrap_or_default();
    privilege::drop_to(process, &identity, || enter_directory(cwd))?;
    let program = command::find(&name, &environment)?;
    if let Some(mask) = process.user().umask() {
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(mask));
    }
    channel.send(&Message::Ready, None)?;
    match channel.receive()? {
        Some((Message::Start, _)) => {}
        // The agent is gone or has thought better of it.
        _ => std::process::exit(1),
    }
    let arguments = c_strings(&arguments)?;
    let environment = c_strings(&environment)?;
    if let Some(filter) = seccomp.as_ref().filter(|_| !new_privileges) {
        filter.apply()?;
    }
    let Err(errno) = nix::unistd::execve(&program, &arguments, &environment);
    Err(command::exec_error(&name, errno))
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>> {
    texts
        .iter()
        .map(|text| CString::new(text.as_str()))
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| Error::Invalid("an argument or variable holds a NUL byte".into()))
}

/// Marks every descriptor but the standard three to be closed by exec.
fn close_on_exec() -> Result<()> {
    // SAFETY: close_range takes no pointers, and with this flag closes nothing now.
    #[expect(unsafe_code, reason = "no safe wrapper is at hand")]
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).step(|| "mark descriptors".into());
    }
    Ok(())
}

fn join_cgroup(cgroup: &Path) -> Result<()> {
    let file = cgroup.join("cgroup.procs");
    std::fs::write(&file, "0").step(|| format!("join cgroup {}", cgroup.display()))
}

fn set_oom_score(process: &Process) -> Result<()> {
    let Some(score) = process.oom_score_adj() else { return Ok(()) };
    std::fs::write("/proc/self/oom_score_adj", score.to_string()).step(|| format!("set oom_score_adj to {score}"))
}

/// The namespaces that the specification lists, and always mount, pid and cgroup: a container shares none of these with
/// the agent. Its processes are numbered with those of `pids_of`, where there is one. A namespace with a path is a host's and
/// means nothing here.
fn make_namespaces(spec: &Spec, pids_of: Option<i32>) -> Result<()> {
    let mut flags = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP;
    match pids_of {
        Some(pid) => nix::sched::setns(open_process(pid)?, CloneFlags::CLONE_NEWPID)
            .step(|| "join the pod's pid namespace".into())?,
        None => flags |= CloneFlags::CLONE_NEWPID,
    }
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    for namespace in listed.into_iter().flatten() {
        flags |= match namespace.typ() {
            LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
            LinuxNamespaceType::Network if namespace.path().is_none() => CloneFlags::CLONE_NEWNET,
            LinuxNamespaceType::Time => time_namespace(),
            LinuxNamespaceType::User => {
                return Err(Error::Invalid("namespaces of type user are not supported".into()));
            }
            _ => CloneFlags::empty(),
        };
    }
    nix::sched::unshare(flags).step(|| "make the container's namespaces".into())?;
    match spec.linux().as_ref().and_then(|linux| linux.time_offsets().as_ref()) {
        Some(offsets) if flags.contains(time_namespace()) => set_clocks(offsets),
        Some(offsets) if !offsets.is_empty() => {
            Err(Error::Invalid("offsets of clocks need a namespace of type time".into()))
        }
        _ => Ok(()),
    }
}

/// `CLONE_NEWTIME` (clone(2)): the children of who makes it are in it.
fn time_namespace() -> CloneFlags {
    CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)
}

/// Sets the clocks of the time namespace that was made, before the first process enters it (time_namespaces(7)).
fn set_clocks(offsets: &HashMap<String, LinuxTimeOffset>) -> Result<()> {
    let mut text = String::new();
    for (clock, offset) in offsets {
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            return Err(Error::Invalid(format!("{clock} is no clock of a time namespace")));
        }
        let (seconds, nanoseconds) = (offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0));
        text.push_str(&format!("{clock} {seconds} {nanoseconds}\n"));
    }
    write_existing(Path::new("/proc/self/timens_offsets"), &text).step(|| "set the clocks of the time namespace".into())
}

fn set_personality(wanted: &LinuxPersonality) -> Result<()> {
    if let Some(flag) = wanted.flags().iter().flatten().next() {
        return Err(Error::Invalid(format!("the personality's flag {flag} is not supported")));
    }
    let domain = match wanted.domain() {
        LinuxPersonalityDomain::PerLinux => nix::sys::personality::Persona::empty(),
        // PER_LINUX32 (sys/personality.h).
        LinuxPersonalityDomain::PerLinux32 => nix::sys::personality::Persona::from_bits_retain(8),
    };
    nix::sys::personality::set(domain).map(drop).step(|| format!("take the personality {}", wanted.domain()))
}

fn join_namespaces(pid: i32) -> Result<()> {
    let pidfd = open_process(pid)?;
    let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/time")).ok();
    // Only a few containers have clocks of their own.
    let clocks = if of(&pid.to_string()) == of("self") { CloneFlags::empty() } else { time_namespace() };
    let flags = clocks
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET;
    nix::sched::setns(&pidfd, flags).step(|| "join the container's namespaces".into())
}

fn open_process(pid: i32) -> Result<OwnedFd> {
    let pid = rustix::process::Pid::from_raw(pid).ok_or_else(|| Error::Invalid("no process to join".into()))?;
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).step(|| "open the process to join".into())
}

fn set_names(spec: &Spec) -> Result<()> {
    let listed = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let own_uts = listed.into_iter().flatten().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    match spec.hostname() {
        Some(name) if own_uts && !name.is_empty() => {
            nix::unistd::sethostname(name).step(|| format!("set host name {name}"))
        }
        _ => Ok(()),
    }
}

/// Enters the working directory, and refuses one outside the container's root.
fn enter_directory(cwd: &Path) -> Result<()> {
    let cwd = if cwd.as_os_str().is_empty() { Path::new("/") } else { cwd };
    std::env::set_current_dir(cwd).step(|| format!("enter the working directory {}", cwd.display()))?;
    match std::env::current_dir() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err(Error::Invalid(format!("the working directory {} is outside the container's root", cwd.display()))),
    }
}

fn reset_signals() -> Result<()> {
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).step(|| "unblock signals".into())?;
    // SAFETY: the default action is installed; no handler of ours runs.
    #[expect(unsafe_code, reason = "signal is unsafe by declaration")]
    unsafe { nix::sys::signal::signal(Signal::SIGPIPE, SigHandler::SigDfl) }.step(|| "reset SIGPIPE".into())?;
    Ok(())
}

/// Writes `value` to a file that exists.
pub(crate) fn write_existing(path: &Path, value: &str) -> std::io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

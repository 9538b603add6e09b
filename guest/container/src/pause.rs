//! `agent pause`: the first process of a pid namespace that the containers of a pod share. It reaps, and does nothing else.
//! Containers see it, and one with `CAP_SYS_PTRACE` can make it run what they like: so it has nothing that they have not.

use std::path::Path;
use std::process::{Command, Stdio};

use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::ForkResult;

use crate::channel::{Channel, Message};
use crate::create::{CHANNEL_FD, inherit, inherited};
use crate::error::Step;
use crate::user::Identity;
use crate::{Error, Result};

/// The user and the group that own nothing.
const NOBODY: u32 = 65534;

/// Starts one. `program` is the agent's own file. Its pid in the agent's pid namespace comes back; its parent is the agent (a
/// child subreaper).
///
/// # Errors
/// What it says, or [`Error::System`].
pub fn start(program: &Path) -> Result<i32> {
    let (channel, theirs) = Channel::pair()?;
    let mut command = Command::new(program);
    command.arg("pause").env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    inherit(&mut command, [(theirs.as_raw_fd(), CHANNEL_FD)]);
    let mut child = command.spawn().step(|| format!("start {}", program.display()))?;
    drop((command, theirs));
    let heard = channel.receive();
    child.wait().step(|| "wait for the pause process's start".into())?;
    match heard? {
        Some((Message::Pid(pid), _)) => Ok(pid),
        Some((Message::Failed(error), _)) => Err(error),
        _ => Err(Error::InitGone),
    }
}

/// Runs `agent pause`. The stage that was spawned comes back with its exit code; the process proper never does.
#[must_use]
pub fn run() -> i32 {
    let channel = Channel::from_fd(inherited(CHANNEL_FD));
    match fork(&channel) {
        Ok(()) => 0,
        Err(error) => {
            // With the channel gone there is nobody left to tell.
            let _ = channel.send(&Message::Failed(error), None);
            1
        }
    }
}

fn fork(channel: &Channel) -> Result<()> {
    // A container that sees this process must not see through it at the agent's file.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .step(|| "turn off dumping".into())?;
    let flags =
        CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC;
    nix::sched::unshare(flags).step(|| "make the pod's pid namespace".into())?;
    crate::rootfs::enter_empty()?;
    let mut process = oci_spec::runtime::Process::default();
    process.set_capabilities(None).set_no_new_privileges(Some(true));
    let identity = Identity { uid: NOBODY, gid: NOBODY, groups: Vec::new(), home: "/".into() };
    crate::privilege::drop_to(&process, &identity, || Ok(()))?;
    // SAFETY: this process has one thread, so the child may do anything that its parent may.
    #[expect(unsafe_code, reason = "fork is unsafe by declaration")]
    match unsafe { nix::unistd::fork() }.step(|| "fork".into())? {
        ForkResult::Parent { child } => channel.send(&Message::Pid(child.as_raw()), None),
        ForkResult::Child => reap(),
    }
}

fn reap() -> ! {
    let mut children = SigSet::empty();
    children.add(Signal::SIGCHLD);
    // Where the mask can't be set a signal is only missed, and the next one reaps for both.
    let _ = children.thread_block();
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive) {}
        let _ = children.wait();
    }
}

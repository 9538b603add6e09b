//! Mounts whose files show other owners than they have (runtime-spec, config.md, "uidMappings"): made on the host, before the guest's
//! file server looks at them, for a guest's file system that is the host's knows no owners of its own.

use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use coracle_storage::{IdMap, Owners};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

/// `MOUNT_ATTR_IDMAP` (mount_setattr(2)).
const ATTRIBUTE: u64 = 0x10_0000;

/// Mounts `source` on `target` with `owners`.
pub(crate) fn bind(source: &Path, target: &Path, owners: &Owners) -> Result<()> {
    let namespace = user_namespace(owners)?;
    let recursive = if owners.recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | recursive;
    let tree = open_tree(rustix::fs::CWD, source, flags)?;
    set(tree.as_fd(), namespace.as_fd(), owners.recursive)?;
    move_mount(tree.as_fd(), "", rustix::fs::CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

fn set(tree: BorrowedFd<'_>, namespace: BorrowedFd<'_>, recursive: bool) -> Result<()> {
    let namespace = u64::try_from(namespace.as_raw_fd()).map_err(Error::other)?;
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    coracle_process::set_mount_attributes(tree, c"", flags, [ATTRIBUTE, 0, 0, namespace])
}

/// A user namespace of these mappings: that is how the kernel is told them. A child makes it, and is ended again.
fn user_namespace(owners: &Owners) -> Result<OwnedFd> {
    // SAFETY: without a stack of its own the child goes on as after fork(2), and makes but three system calls, which take no pointers
    // and no locks: it is killed when its parent is, it waits for any signal, and it ends.
    #[expect(unsafe_code, reason = "the kernel has no other way to make a user namespace for somebody else")]
    let pid = unsafe {
        let flags = libc::c_long::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
        let pid = libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0);
        if pid == 0 {
            libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
            libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
            libc::syscall(libc::SYS_exit_group, 0);
        }
        pid
    };
    if pid < 0 {
        return Err(Error::last_os_error());
    }
    let made = fill(pid, owners);
    let child = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(child) = child {
        let _ = rustix::process::kill_process(child, rustix::process::Signal::KILL);
        let _ = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty());
    }
    made
}

fn fill(pid: libc::c_long, owners: &Owners) -> Result<OwnedFd> {
    let text = |list: &[IdMap]| -> String {
        list.iter().map(|one| format!("{} {} {}\n", one.stored, one.shown, one.count)).collect()
    };
    std::fs::write(format!("/proc/{pid}/uid_map"), text(&owners.users))?;
    std::fs::write(format!("/proc/{pid}/gid_map"), text(&owners.groups))?;
    Ok(std::fs::File::open(format!("/proc/{pid}/ns/user"))?.into())
}

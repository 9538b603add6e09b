//! Namespaces, root and user. The pid namespace is made by whoever starts the monitor: a process can't move itself into one.

use std::path::Path;

use coracle_monitor_api::Jail;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::UnshareFlags;

use crate::Error;

pub(super) fn enter(jail: &Jail) -> Result<(), Error> {
    let privileged = rustix::process::geteuid().is_root();
    let own = UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    if privileged {
        unshare(own)?;
    } else {
        enter_user_namespace(own)?;
    }
    change_root(Path::new(&jail.root))?;
    // No core file holds the guest's memory.
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(Resource::Core, none).map_err(Error::system("forbid core files"))?;
    if privileged {
        drop_user(jail.user)?;
    }
    drop_capabilities()?;
    // Nobody of the same user may look into it.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(Error::system("turn off dumping"))?;
    // A change of user has taken it back.
    let signal = rustix::process::Signal::KILL;
    rustix::process::set_parent_process_death_signal(Some(signal)).map_err(Error::system("die with the driver"))
}

fn unshare(flags: UnshareFlags) -> Result<(), Error> {
    // SAFETY: none of the flags is CLONE_FILES: the process keeps its descriptors.
    #[expect(unsafe_code, reason = "unshare of descriptors would be another matter")]
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Error::system("leave the host's namespaces"))
}

/// Without privileges: in a user namespace of its own, where the same user has them for what follows.
fn enter_user_namespace(flags: UnshareFlags) -> Result<(), Error> {
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    unshare(UnshareFlags::NEWUSER | flags)?;
    let write = |file: &str, text: String| std::fs::write(format!("/proc/self/{file}"), text);
    write("setgroups", "deny".into())
        .and_then(|()| write("uid_map", format!("{user} {user} 1")))
        .and_then(|()| write("gid_map", format!("{group} {group} 1")))
        .map_err(Error::system("make a user namespace"))
}

/// Makes the folder the root of all, read-only, and lets go of everything else.
fn change_root(root: &Path) -> Result<(), Error> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).map_err(Error::system("keep mounts to itself"))?;
    rustix::mount::mount_bind(root, root).map_err(Error::system("mount the jail's root"))?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount_remount(root, flags, "").map_err(Error::system("make the jail's root read-only"))?;
    rustix::process::chdir(root).map_err(Error::system("enter the jail's root"))?;
    // The old root lies on top of the new one after this (pivot_root(2), "."), and is taken away.
    rustix::process::pivot_root(".", ".").map_err(Error::system("change the root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(Error::system("let go of the host's files"))?;
    rustix::process::chdir("/").map_err(Error::system("enter the jail's root"))
}

fn drop_user(user: u32) -> Result<(), Error> {
    if user == 0 || user == u32::MAX {
        return Err(Error::Invalid("the jail's user must not be root".into()));
    }
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
    // The process has one thread: these calls are for the calling thread.
    rustix::thread::set_thread_groups(&[]).map_err(Error::system("leave all groups"))?;
    rustix::thread::set_thread_res_gid(group, group, group).map_err(Error::system("change the group"))?;
    rustix::thread::set_thread_res_uid(user, user, user).map_err(Error::system("change the user"))
}

fn drop_capabilities() -> Result<(), Error> {
    let none = rustix::thread::CapabilitySet::empty();
    let sets = rustix::thread::CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(Error::system("give up capabilities"))
}

//! The container's root: its mounts, its devices, and the step into it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};

use crate::error::Step;
use crate::init::write_existing;
use crate::mount::{apply, descriptor_path, open_in, propagation, remount_bind};
use crate::{Error, Result, device};

/// Makes `rootfs` this process's root, with all that `spec` wants in it. The process is in a mount namespace of its own.
pub(crate) fn enter(spec: &Spec, rootfs: &Path, terminal: bool) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).step(|| "make the mounts private".into())?;
    mount(Some(rootfs), rootfs, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .step(|| format!("mount the root file system {}", rootfs.display()))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root: OwnedFd = rustix::fs::open(rootfs, flags, Mode::empty())
        .step(|| format!("open the root file system {}", rootfs.display()))?;
    for wanted in spec.mounts().iter().flatten() {
        apply(root.as_fd(), wanted)?;
    }
    device::create(root.as_fd(), spec, terminal)?;
    pivot(&root)?;
    let linux = spec.linux().as_ref();
    for (name, value) in linux.and_then(|linux| linux.sysctl().as_ref()).into_iter().flatten() {
        sysctl(name, value)?;
    }
    let root: OwnedFd = rustix::fs::open("/", flags, Mode::empty()).step(|| "open the new root".into())?;
    for path in linux.and_then(|linux| linux.readonly_paths().as_ref()).into_iter().flatten() {
        make_readonly(&root, Path::new(path))?;
    }
    for path in linux.and_then(|linux| linux.masked_paths().as_ref()).into_iter().flatten() {
        mask(&root, Path::new(path))?;
    }
    if spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false) {
        remount_bind(Path::new("/"), MsFlags::MS_RDONLY).step(|| "make the root read-only".into())?;
    }
    if let Some(wanted) = linux.and_then(|linux| linux.rootfs_propagation().as_deref()).filter(|text| !text.is_empty())
    {
        let flags = propagation(wanted)
            .ok_or_else(|| Error::Invalid(format!("{wanted} is no propagation of the root file system")))?;
        mount(none, "/", none, flags, none).step(|| format!("make the root {wanted}"))?;
    }
    Ok(())
}

/// Makes an empty, read-only directory this process's root. The process is in a mount namespace of its own.
pub(crate) fn enter_empty() -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).step(|| "make the mounts private".into())?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(none, "/proc", Some("tmpfs"), flags, Some("size=4k,nr_inodes=1,mode=555"))
        .step(|| "mount an empty root".into())?;
    let root: OwnedFd = rustix::fs::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .step(|| "open the empty root".into())?;
    pivot(&root)
}

/// Swaps the root. Both arguments of `pivot_root` may be the same directory: the old root then lies over the new one,
/// from where it is detached (pivot_root(2), notes).
fn pivot(root: &OwnedFd) -> Result<()> {
    nix::unistd::fchdir(root).step(|| "enter the root file system".into())?;
    nix::unistd::pivot_root(".", ".").step(|| "pivot_root".into())?;
    umount2(".", MntFlags::MNT_DETACH).step(|| "leave the old root".into())?;
    std::env::set_current_dir("/").step(|| "enter the new root".into())
}

/// Sysctls of the ipc and uts namespaces; those below `net.` and `fs.mqueue.` are a namespace's, too.
const NAMESPACED: [&str; 10] = [
    "kernel.domainname",
    "kernel.hostname",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

fn sysctl(name: &str, value: &str) -> Result<()> {
    if name.split('.').any(|part| part.is_empty() || part == ".." || part.contains('\0')) {
        return Err(Error::Invalid(format!("{name} is no sysctl")));
    }
    let dotted = name.replace('/', ".");
    if !(NAMESPACED.contains(&dotted.as_str()) || dotted.starts_with("net.") || dotted.starts_with("fs.mqueue.")) {
        return Err(Error::Invalid(format!("sysctl {name} is not of a namespace: a container may not set it")));
    }
    // Either separator may stand for the other in a name: a slash is kept, as sysctl(8) does.
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    write_existing(&path, value).step(|| format!("set sysctl {name} to {value}"))
}

/// Runs `change` on `path` in the container, which may be missing.
fn on_existing(root: &OwnedFd, path: &Path, change: impl FnOnce(&Path) -> nix::Result<()>) -> Result<()> {
    match open_in(root.as_fd(), path) {
        Ok(fd) => change(&descriptor_path(&fd)).step(|| format!("protect {}", path.display())),
        Err(Error::System { source, .. }) if matches!(source.0, libc::ENOENT | libc::ENOTDIR) => Ok(()),
        Err(error) => Err(error),
    }
}

fn make_readonly(root: &OwnedFd, path: &Path) -> Result<()> {
    let none = None::<&str>;
    on_existing(root, path, |target| mount(Some(target), target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none))?;
    on_existing(root, path, |target| remount_bind(target, MsFlags::MS_RDONLY))
}

fn mask(root: &OwnedFd, path: &Path) -> Result<()> {
    let none = None::<&str>;
    on_existing(root, path, |target| {
        if std::fs::metadata(target).is_ok_and(|metadata| metadata.is_dir()) {
            mount(Some("tmpfs"), target, Some("tmpfs"), MsFlags::MS_RDONLY, none)
        } else {
            mount(Some("/dev/null"), target, none, MsFlags::MS_BIND, none)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_namespaces_are_tuned() {
        for name in ["kernel.panic", "vm.swappiness", "kernel/core_pattern", "net..x", "..", "", "kernel.hostname/../x"]
        {
            assert!(matches!(sysctl(name, "0"), Err(Error::Invalid(_))), "{name}");
        }
    }
}

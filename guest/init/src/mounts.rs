//! The file systems of the guest.

use std::path::Path;

use nix::mount::{MsFlags, mount};

const STRICT: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Type, target, flags and options, in order.
const TABLE: [(&str, &str, MsFlags, &str); 7] = [
    ("proc", "/proc", STRICT, ""),
    ("sysfs", "/sys", STRICT, ""),
    ("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=755"),
    ("devpts", "/dev/pts", MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC), "mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", STRICT, "mode=1777"),
    ("tmpfs", "/run", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), "mode=755"),
    ("cgroup2", "/sys/fs/cgroup", STRICT, ""),
];

/// The initrd's own file system can't be swapped for another root (pivot_root(2), EINVAL), which the container engine has
/// to do. So the root becomes a mount of the same files on top of it.
fn lift_root() -> nix::Result<()> {
    let none = None::<&str>;
    // Any folder of the initrd serves; nothing is mounted on it yet.
    mount(Some("/"), "/run", none, MsFlags::MS_BIND, none)?;
    nix::unistd::chdir("/run")?;
    mount(Some("."), "/", none, MsFlags::MS_MOVE, none)?;
    nix::unistd::chroot(".")?;
    nix::unistd::chdir("/")
}

/// Mounts them all.
pub(crate) fn make() -> Result<(), String> {
    lift_root().map_err(|error| format!("can't lift the root: {error}"))?;
    for (kind, target, flags, options) in TABLE {
        let target = Path::new(target);
        let failed = |error: &dyn std::fmt::Display| format!("can't mount {}: {error}", target.display());
        // sysfs brings the folder of cgroups with it.
        if !target.is_dir() {
            std::fs::create_dir_all(target).map_err(|error| failed(&error))?;
        }
        mount(Some(kind), target, Some(kind), flags, Some(options)).map_err(|error| failed(&error))?;
    }
    Ok(())
}

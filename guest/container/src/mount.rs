//! Mounts of the OCI specification (runtime-spec, config.md, "Mounts"), made below a root that may be hostile.
//!
//! Every target is resolved with `RESOLVE_IN_ROOT`, component by component, so that no link of the image leads out.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::Mount;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::Step;
use crate::{Error, Result};

/// What a list of mount options says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) flags: MsFlags,
    pub(crate) propagation: Option<MsFlags>,
    pub(crate) data: String,
    /// A bind mount whose flags need a second call.
    pub(crate) remount: bool,
    /// Attributes of the mount and of all below it.
    pub(crate) recursive: Attributes,
}

/// Attributes of mounts, as mount_setattr(2) sets and clears them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attributes {
    set: u64,
    clear: u64,
}

impl Options {
    /// Reads the options; those that are no flag go to the file system.
    pub(crate) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut parsed = Self {
            flags: MsFlags::empty(),
            propagation: None,
            data: String::new(),
            remount: false,
            recursive: Attributes::default(),
        };
        for option in options {
            if let Some((clear, flag)) = flag(option) {
                if clear {
                    parsed.flags.remove(flag);
                } else {
                    parsed.flags.insert(flag);
                }
                parsed.remount |= !flag.intersects(MsFlags::MS_BIND | MsFlags::MS_REC);
            } else if let Some(propagation) = propagation(option) {
                parsed.propagation = Some(propagation);
            } else if let Some((clear, attribute)) = recursive(option) {
                let Attributes { set, clear: cleared } = &mut parsed.recursive;
                // The kinds of access times are one number, which is cleared as a whole.
                let whole = if attribute & ACCESS_TIMES == attribute { ACCESS_TIMES } else { attribute };
                *cleared |= whole;
                *set &= !whole;
                if !clear {
                    *set |= attribute;
                }
            } else if matches!(option, "idmap" | "ridmap" | "tmpcopyup") {
                return Err(Error::Invalid(format!("the mount option {option} is not supported")));
            } else if !matches!(option, "defaults" | "async" | "rw" | "loop" | "loud" | "nomand" | "") {
                if !parsed.data.is_empty() {
                    parsed.data.push(',');
                }
                parsed.data.push_str(option);
            }
        }
        Ok(parsed)
    }
}

fn flag(option: &str) -> Option<(bool, MsFlags)> {
    Some(match option {
        "ro" => (false, MsFlags::MS_RDONLY),
        "rw" => (true, MsFlags::MS_RDONLY),
        "nosuid" => (false, MsFlags::MS_NOSUID),
        "suid" => (true, MsFlags::MS_NOSUID),
        "nodev" => (false, MsFlags::MS_NODEV),
        "dev" => (true, MsFlags::MS_NODEV),
        "noexec" => (false, MsFlags::MS_NOEXEC),
        "exec" => (true, MsFlags::MS_NOEXEC),
        "sync" => (false, MsFlags::MS_SYNCHRONOUS),
        "dirsync" => (false, MsFlags::MS_DIRSYNC),
        "noatime" => (false, MsFlags::MS_NOATIME),
        "atime" => (true, MsFlags::MS_NOATIME),
        "nodiratime" => (false, MsFlags::MS_NODIRATIME),
        "diratime" => (true, MsFlags::MS_NODIRATIME),
        "relatime" => (false, MsFlags::MS_RELATIME),
        "norelatime" => (true, MsFlags::MS_RELATIME),
        "strictatime" => (false, MsFlags::MS_STRICTATIME),
        "nostrictatime" => (true, MsFlags::MS_STRICTATIME),
        "lazytime" => (false, MsFlags::MS_LAZYTIME),
        "nolazytime" => (true, MsFlags::MS_LAZYTIME),
        "silent" => (false, MsFlags::MS_SILENT),
        "iversion" => (false, MsFlags::MS_I_VERSION),
        "noiversion" => (true, MsFlags::MS_I_VERSION),
        "nosymfollow" => (false, MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW)),
        "symfollow" => (true, MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW)),
        "bind" => (false, MsFlags::MS_BIND),
        "rbind" => (false, MsFlags::MS_BIND.union(MsFlags::MS_REC)),
        _ => return None,
    })
}

/// `MOUNT_ATTR__ATIME` (linux/mount.h).
const ACCESS_TIMES: u64 = 0x70;

/// Options for a mount and all below it (runtime-spec, config.md, "Linux mount options"), with the kernel's `MOUNT_ATTR_*`.
fn recursive(option: &str) -> Option<(bool, u64)> {
    Some(match option {
        "rro" => (false, 0x1),
        "rrw" => (true, 0x1),
        "rnosuid" => (false, 0x2),
        "rsuid" => (true, 0x2),
        "rnodev" => (false, 0x4),
        "rdev" => (true, 0x4),
        "rnoexec" => (false, 0x8),
        "rexec" => (true, 0x8),
        "rnoatime" => (false, 0x10),
        "rstrictatime" => (false, 0x20),
        "rrelatime" => (false, 0),
        "ratime" | "rnorelatime" | "rnostrictatime" => (true, ACCESS_TIMES),
        "rnodiratime" => (false, 0x80),
        "rdiratime" => (true, 0x80),
        "rnosymfollow" => (false, 0x20_0000),
        "rsymfollow" => (true, 0x20_0000),
        _ => return None,
    })
}

fn set_attributes(target: &OwnedFd, attributes: Attributes) -> std::io::Result<()> {
    // struct mount_attr: attr_set, attr_clr, propagation, userns_fd.
    let attributes: [u64; 4] = [attributes.set, attributes.clear, 0, 0];
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is an empty text, and the structure lives through the call and has the size that is given.
    #[expect(unsafe_code, reason = "no safe wrapper is at hand")]
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            target.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn propagation(option: &str) -> Option<MsFlags> {
    Some(match option {
        "private" => MsFlags::MS_PRIVATE,
        "rprivate" => MsFlags::MS_PRIVATE.union(MsFlags::MS_REC),
        "slave" => MsFlags::MS_SLAVE,
        "rslave" => MsFlags::MS_SLAVE.union(MsFlags::MS_REC),
        "shared" => MsFlags::MS_SHARED,
        "rshared" => MsFlags::MS_SHARED.union(MsFlags::MS_REC),
        "unbindable" => MsFlags::MS_UNBINDABLE,
        "runbindable" => MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC),
        _ => return None,
    })
}

/// Makes one mount of the specification below `root`.
pub(crate) fn apply(root: BorrowedFd<'_>, wanted: &Mount) -> Result<()> {
    let destination = wanted.destination();
    let kind = wanted.typ().as_deref().unwrap_or_default();
    let source = wanted.source().clone().unwrap_or_default();
    let options = wanted.options().as_ref();
    let options = Options::parse(options.into_iter().flatten().map(String::as_str))?;
    let step = || format!("mount {} on {}", source.display(), destination.display());
    let bind = options.flags.contains(MsFlags::MS_BIND) || kind == "bind";
    // A node of /dev is mounted over a file, too.
    let file =
        bind && !std::fs::metadata(&source).step(|| format!("find the mount source {}", source.display()))?.is_dir();
    let target = if file { file_in(root, destination)? } else { directory_in(root, destination)? };
    let target = descriptor_path(&target);
    if bind {
        let recursive = options.flags & MsFlags::MS_REC;
        mount(Some(&source), &target, None::<&str>, MsFlags::MS_BIND | recursive, None::<&str>).step(step)?;
    } else {
        let kind = if kind == "cgroup" { "cgroup2" } else { kind };
        let data = (!options.data.is_empty() && kind != "cgroup2").then_some(options.data.as_str());
        mount(Some(&source), &target, Some(kind), options.flags, data).step(step)?;
    }
    // The old descriptor names what lies below the mount, so look again.
    let mounted = open_in(root, destination)?;
    let path = descriptor_path(&mounted);
    if bind && options.remount {
        remount_bind(&path, options.flags).step(step)?;
    }
    if options.recursive != Attributes::default() {
        set_attributes(&mounted, options.recursive).step(step)?;
    }
    propagate(&path, options.propagation).step(step)
}

fn propagate(target: &Path, propagation: Option<MsFlags>) -> nix::Result<()> {
    propagation.map_or(Ok(()), |flags| mount(None::<&str>, target, None::<&str>, flags, None::<&str>))
}

/// linux/statfs.h; the C library has no name for it.
const ST_NOSYMFOLLOW: u64 = 0x2000;

/// Adds `flags` to a bind mount, keeping those that it has.
pub(crate) fn remount_bind(target: &Path, flags: MsFlags) -> nix::Result<()> {
    let present = rustix::fs::statvfs(target).map_err(|errno| nix::errno::Errno::from_raw(errno.raw_os_error()))?;
    let present = present.f_flag.bits();
    let mut all = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    for (have, flag) in [
        (libc::ST_RDONLY, MsFlags::MS_RDONLY),
        (libc::ST_NOSUID, MsFlags::MS_NOSUID),
        (libc::ST_NODEV, MsFlags::MS_NODEV),
        (libc::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (libc::ST_NOATIME, MsFlags::MS_NOATIME),
        (libc::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (libc::ST_RELATIME, MsFlags::MS_RELATIME),
        (ST_NOSYMFOLLOW, MsFlags::from_bits_retain(libc::MS_NOSYMFOLLOW)),
    ] {
        if present & have != 0 {
            all |= flag;
        }
    }
    mount(None::<&str>, target, None::<&str>, all, None::<&str>)
}

/// A path that names what the descriptor is open on.
pub(crate) fn descriptor_path(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Opens `path` below `root`, as a name only.
pub(crate) fn open_in(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    try_open(root, path).step(|| format!("open {} in the container", path.display()))
}

fn try_open(root: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<OwnedFd> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let mut tries = 0;
    loop {
        let opened = rustix::fs::openat2(
            root,
            relative,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        );
        tries += 1;
        // A mount or rename elsewhere, while a `..` of a link is resolved, asks for another try (openat2(2), EAGAIN).
        if opened.as_ref().err() != Some(&Errno::AGAIN) || tries == 128 {
            return opened;
        }
    }
}

/// The directory `path` below `root`, made with its parents where it is missing.
pub(crate) fn directory_in(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let step = || format!("make the directory {} in the container", path.display());
    let mut at = PathBuf::from(".");
    let mut parent = try_open(root, &at).step(step)?;
    for component in path.components() {
        let Component::Normal(name) = component else {
            if matches!(component, Component::ParentDir) {
                return Err(Error::Invalid(format!("the mount target {} holds ..", path.display())));
            }
            continue;
        };
        at.push(name);
        parent = match try_open(root, &at) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => {
                match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(errno) => return Err(errno).step(step),
                }
                try_open(root, &at).step(step)?
            }
            Err(errno) => return Err(errno).step(step),
        };
    }
    Ok(parent)
}

/// The file `path` below `root`, made empty with its parents where it is missing.
pub(crate) fn file_in(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    match try_open(root, path) {
        Ok(fd) => return Ok(fd),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno).step(|| format!("open {} in the container", path.display())),
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::Invalid(format!("{} is no place for a file", path.display())));
    };
    let parent = directory_in(root, parent)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
    rustix::fs::openat(parent.as_fd(), name, flags, Mode::from_raw_mode(0o644))
        .step(|| format!("make the file {} in the container", path.display()))?;
    open_in(root, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_propagation_and_data() {
        let options = Options::parse(["nosuid", "ro", "mode=755", "rslave", "size=65536k", "rw"]).unwrap();
        assert_eq!(options.flags, MsFlags::MS_NOSUID);
        assert_eq!(options.propagation, Some(MsFlags::MS_SLAVE | MsFlags::MS_REC));
        assert_eq!(options.data, "mode=755,size=65536k");
        let bind = Options::parse(["rbind", "rprivate"]).unwrap();
        assert!(bind.flags.contains(MsFlags::MS_BIND | MsFlags::MS_REC) && !bind.remount);
        assert!(Options::parse(["bind", "ro"]).unwrap().remount);
        assert!(Options::parse(["idmap"]).is_err());
        let recursive = |options: &[&str]| Options::parse(options.iter().copied()).unwrap().recursive;
        assert_eq!(recursive(&["rro", "rnosuid"]), Attributes { set: 3, clear: 3 });
        assert_eq!(recursive(&["rro", "rrw"]), Attributes { set: 0, clear: 1 });
        assert_eq!(recursive(&["rnoatime", "rrelatime"]), Attributes { set: 0, clear: ACCESS_TIMES });
    }

    #[test]
    fn links_of_the_image_do_not_lead_out() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("out")).unwrap();
        let fd: OwnedFd = std::fs::File::open(root.path()).unwrap().into();
        // The absolute link is read inside the root, where its target is missing.
        assert!(directory_in(fd.as_fd(), Path::new("/out/inner")).is_err());
        assert!(file_in(fd.as_fd(), Path::new("/out")).is_err());
        assert!(directory_in(fd.as_fd(), Path::new("/a/../../b")).is_err());
        directory_in(fd.as_fd(), Path::new("/a/b")).unwrap();
        file_in(fd.as_fd(), Path::new("/a/file")).unwrap();
        assert!(root.path().join("a/b").is_dir() && root.path().join("a/file").is_file());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}

//! A part of a volume by itself. Another container may have the whole volume, and change what is on the way meanwhile: the part is
//! opened once, without following a link, and what was opened is mounted.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path};

use nix::mount::{MsFlags, mount};
use rustix::fs::{Mode, OFlags, ResolveFlags, mkdirat, openat2};
use rustix::io::Errno;

use super::owner;
use crate::{Error, Result};

/// Mounts the folder `path` of the volume at `whole` at `target`. Folders that are missing are made; the last of them gets the owner that
/// the options name.
pub(super) fn mount_at(whole: &Path, path: &Path, target: &Path, options: &[String]) -> Result<()> {
    let part = open(whole, path, options)?;
    let step = || format!("mount {} of {} at {}", path.display(), whole.display(), target.display());
    std::fs::create_dir_all(target).map_err(Error::system(step()))?;
    // It leads to what was opened, wherever that is by now.
    let source = format!("/proc/self/fd/{}", part.as_raw_fd());
    mount(Some(source.as_str()), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(Error::system(step()))
}

fn open(whole: &Path, path: &Path, options: &[String]) -> Result<OwnedFd> {
    let failed = || Error::system(format!("open {} of the volume {}", path.display(), whole.display()));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = rustix::fs::open(whole, flags, Mode::empty()).map_err(failed())?;
    for part in path.components() {
        let Component::Normal(name) = part else {
            return Err(Error::Invalid(format!("{} is no part of a volume", path.display())));
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let next = |at: &OwnedFd| openat2(at, name, flags, Mode::empty(), resolve);
        at = match next(&at) {
            Err(Errno::NOENT) => {
                mkdirat(&at, name, Mode::from_raw_mode(0o755)).map_err(failed())?;
                let fresh = next(&at).map_err(failed())?;
                owner::apply(&fresh, options)?;
                fresh
            }
            found => found.map_err(failed())?,
        };
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_part_is_made_inside_and_never_found_by_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        let options = ["mode=2750".to_owned()];
        let part = open(&volume, Path::new("a/b"), &options).unwrap();
        let inode = rustix::fs::fstat(&part).unwrap().st_ino;
        let found = std::fs::metadata(volume.join("a/b")).unwrap();
        assert_eq!((found.ino(), found.mode() & 0o7777), (inode, 0o2750));
        // What is there is as somebody wants it.
        std::fs::create_dir(volume.join("own")).unwrap();
        let before = std::fs::metadata(volume.join("own")).unwrap().mode();
        open(&volume, Path::new("own"), &options).unwrap();
        assert_eq!(std::fs::metadata(volume.join("own")).unwrap().mode(), before);
        symlink("/", volume.join("out")).unwrap();
        symlink("a", volume.join("in")).unwrap();
        for path in ["out", "out/etc", "in", "in/b"] {
            assert!(open(&volume, Path::new(path), &options).is_err(), "{path}");
        }
        for path in ["../volume", "/etc", "a/../.."] {
            assert!(matches!(open(&volume, Path::new(path), &options), Err(Error::Invalid(_))), "{path}");
        }
    }
}

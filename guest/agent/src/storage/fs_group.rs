//! The group that may use a volume (Kubernetes: `fsGroup` of a pod's security context).

use std::os::fd::OwnedFd;
use std::path::Path;

use coracle_protocol::agent::FSGroup;
use coracle_protocol::types::FSGroupChangePolicy;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags};
use rustix::io::Errno;

use crate::{Error, Result};

/// What the group may do with files and with folders, in which new files are the group's, too.
const FILE: u32 = 0o660;
const FOLDER: u32 = 0o2770;

/// How deep folders may lie: each takes a descriptor.
const DEPTH_MAX: usize = 256;

/// Gives all that is below `root` to the group, unless the policy is content with the root itself being its. What the disk says is
/// hostile: no link is followed, whatever it claims to be.
pub(super) fn apply(root: &Path, group: &FSGroup) -> Result<()> {
    let failed = || Error::system::<Errno>(format!("give {} to its group", root.display()));
    let folder = rustix::fs::open(root, FOLDER_FLAGS, Mode::empty()).map_err(failed())?;
    let found = rustix::fs::fstat(&folder).map_err(failed())?;
    let is_content = group.group_change_policy.enum_value() == Ok(FSGroupChangePolicy::OnRootMismatch);
    if is_content && found.st_gid == group.group_id && found.st_mode & FOLDER == FOLDER {
        return Ok(());
    }
    give_folder(&folder, Gid::from_raw(group.group_id), 0).map_err(failed())
}

const FOLDER_FLAGS: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Gives what is in a folder, then itself: what was begun and not ended is begun again.
fn give_folder(folder: &OwnedFd, group: Gid, depth: usize) -> rustix::io::Result<()> {
    if depth > DEPTH_MAX {
        return Err(Errno::LOOP);
    }
    for entry in rustix::fs::Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match FileType::from_raw_mode(rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode) {
            FileType::Directory => {
                give_folder(&rustix::fs::openat(folder, name, FOLDER_FLAGS, Mode::empty())?, group, depth + 1)?;
            }
            FileType::RegularFile => {
                let file = rustix::fs::openat(folder, name, flags, Mode::empty())?;
                if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) == FileType::RegularFile {
                    give(&file, group, FILE)?;
                }
            }
            // A link is given itself.
            _ => rustix::fs::chownat(folder, name, None, Some(group), AtFlags::SYMLINK_NOFOLLOW)?,
        }
    }
    give(folder, group, FOLDER)
}

fn give(file: &OwnedFd, group: Gid, mode: u32) -> rustix::io::Result<()> {
    rustix::fs::fchown(file, None, Some(group))?;
    let found = rustix::fs::fstat(file)?.st_mode;
    rustix::fs::fchmod(file, Mode::from_raw_mode(found & 0o7777 | mode))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn all_below_is_the_groups() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        std::fs::create_dir(at("folder")).unwrap();
        std::fs::write(at("folder/file"), "x").unwrap();
        std::fs::set_permissions(at("folder/file"), std::fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::symlink("/nowhere", at("link")).unwrap();
        // Whoever runs the tests may not give files away.
        let group_id = std::fs::metadata(root.path()).unwrap().gid();
        let group = |policy: FSGroupChangePolicy| FSGroup {
            group_id,
            group_change_policy: policy.into(),
            ..Default::default()
        };
        let mode = |path: &str| std::fs::metadata(at(path)).unwrap().mode() & 0o7777;
        apply(root.path(), &group(FSGroupChangePolicy::OnRootMismatch)).unwrap();
        assert_eq!((mode("folder/file"), mode("folder") & FOLDER, mode("") & FOLDER), (0o660, FOLDER, FOLDER));
        std::fs::set_permissions(at("folder/file"), std::fs::Permissions::from_mode(0o600)).unwrap();
        apply(root.path(), &group(FSGroupChangePolicy::OnRootMismatch)).unwrap();
        assert_eq!(mode("folder/file"), 0o600, "the root is its already");
        apply(root.path(), &group(FSGroupChangePolicy::Always)).unwrap();
        assert_eq!(mode("folder/file"), 0o660);
    }
}

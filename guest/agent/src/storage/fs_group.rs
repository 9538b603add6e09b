//! The group that may use a volume (Kubernetes: `fsGroup` of a pod's security context).

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use coracle_protocol::agent::FSGroup;
use coracle_protocol::types::FSGroupChangePolicy;

use crate::{Error, Result};

/// What the group may do with files and with folders, in which new files are the group's, too.
const FILE: u32 = 0o660;
const FOLDER: u32 = 0o2770;

/// Gives all that is below `root` to the group, unless the policy is content with the root itself being its.
pub(super) fn apply(root: &Path, group: &FSGroup) -> Result<()> {
    let found = std::fs::symlink_metadata(root).map_err(failed(root))?;
    let is_content = group.group_change_policy.enum_value() == Ok(FSGroupChangePolicy::OnRootMismatch);
    if is_content && found.gid() == group.group_id && found.mode() & FOLDER == FOLDER {
        return Ok(());
    }
    // The root last: what was begun and not ended is begun again.
    let mut folders = vec![root.to_owned()];
    let mut all = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(failed(&folder))? {
            let entry = entry.map_err(failed(&folder))?;
            let kind = entry.file_type().map_err(failed(&entry.path()))?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else {
                give(&entry.path(), group.group_id, if kind.is_file() { Some(FILE) } else { None })?;
            }
        }
        all.push(folder);
    }
    all.iter().rev().try_for_each(|folder| give(folder, group.group_id, Some(FOLDER)))
}

/// A link is given itself, and what it leads to is not touched.
fn give(path: &Path, group: u32, mode: Option<u32>) -> Result<()> {
    std::os::unix::fs::lchown(path, None, Some(group)).map_err(failed(path))?;
    let Some(mode) = mode else { return Ok(()) };
    let found = std::fs::symlink_metadata(path).map_err(failed(path))?.mode();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(found & 0o7777 | mode)).map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    Error::system(format!("give {} to the volume's group", path.display()))
}

#[cfg(test)]
mod tests {
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

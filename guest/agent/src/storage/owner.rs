//! Whose a volume's folder is: options `mode=`, `uid=` and `gid=`, as tmpfs has them.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Gid, Mode, Uid};

use crate::{Error, Result};

/// What `mkfs.ext4` leaves in an empty file system.
const LEFT: &str = "lost+found";

/// Gives the root of a file system that nobody has used yet its owner, and takes out what was put there when it was made. One that was
/// used stays as it is, and so does one of which no owner is said.
pub(super) fn of_fresh(target: &Path, options: &[String]) -> Result<()> {
    if !options.iter().any(|option| option.starts_with("mode=")) {
        return Ok(());
    }
    match std::fs::remove_dir(target.join(LEFT)) {
        Ok(()) => {
            let folder = std::fs::File::open(target).map_err(Error::system(format!("open {}", target.display())))?;
            apply(&folder, options)
        }
        // It is not there, or somebody has put something into it: then it is a folder of theirs.
        Err(_) => Ok(()),
    }
}

/// Gives a folder its owner and mode.
pub(super) fn apply(folder: &impl AsFd, options: &[String]) -> Result<()> {
    let value = |name: &str| options.iter().find_map(|option| option.strip_prefix(name));
    let number = |name: &str, radix| {
        value(name).map(|text| {
            u32::from_str_radix(text, radix)
                .map_err(|_| Error::Invalid(format!("{name}{} is no option of a volume", text.escape_default())))
        })
    };
    let (mode, user, group) =
        (number("mode=", 8).transpose()?, number("uid=", 10).transpose()?, number("gid=", 10).transpose()?);
    // The owner first: it takes bits of the mode away.
    let owned = rustix::fs::fchown(folder, user.map(Uid::from_raw), group.map(Gid::from_raw));
    let moded = owned.and_then(|()| match mode {
        Some(mode) => rustix::fs::fchmod(folder, Mode::from_raw_mode(mode & 0o7777)),
        None => Ok(()),
    });
    moded.map_err(Error::system("give a volume its owner"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn only_what_nobody_has_used_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let before = mode(folder.path());
        let options = ["mode=2770".to_owned()];
        of_fresh(folder.path(), &options).unwrap();
        assert_eq!(mode(folder.path()), before);
        std::fs::create_dir(folder.path().join(LEFT)).unwrap();
        of_fresh(folder.path(), &[]).unwrap();
        assert!(folder.path().join(LEFT).exists(), "nobody said whose it is");
        of_fresh(folder.path(), &options).unwrap();
        assert_eq!((mode(folder.path()), folder.path().join(LEFT).exists()), (0o2770, false));
        let opened = std::fs::File::open(folder.path()).unwrap();
        assert!(matches!(apply(&opened, &["mode=9".into()]), Err(Error::Invalid(_))));
    }
}

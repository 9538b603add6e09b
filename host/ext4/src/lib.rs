//! Empty disks to write to: files with a file system, as e2fsprogs' `mkfs.ext4` makes them. The host's disk is used as they are
//! written to.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where programs are beside those of `$PATH`, which for ordinary users has not all.
const MORE_FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program is not there.
    #[error("mkfs.ext4 is missing: install the package e2fsprogs")]
    Missing,
    /// A file can't be made.
    #[error("make {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The program fails.
    #[error("mkfs.ext4 can't make the disk {} of {size_mib} MiB: {text}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Its size.
        size_mib: u64,
        /// The program's words.
        text: String,
    },
}

/// Where `mkfs.ext4` is.
///
/// # Errors
/// [`Error::Missing`].
pub fn program() -> Result<PathBuf, Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(MORE_FOLDERS.map(Into::into));
    folders.map(|folder| folder.join("mkfs.ext4")).find(|program| program.is_file()).ok_or(Error::Missing)
}

/// What a crash of the machine that writes to a disk means for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AfterCrash {
    /// Nobody reads it again: it needs no journal.
    Gone,
    /// Another machine goes on with it.
    Used,
}

/// Makes a disk at `path`, of `size_mib` at most, unless it is there. It is there whole or not at all.
///
/// # Errors
/// [`Error`].
pub fn make(path: &Path, size_mib: u64, after_crash: AfterCrash) -> Result<(), Error> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let failed = |source| Error::File { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_file() => return Ok(()),
        // A link would lead whoever opens the disk elsewhere.
        Ok(_) => return Err(failed(std::io::Error::other("there is something that is no file: remove it"))),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let mut fresh = path.as_os_str().to_owned();
    // Another process of this number may have left one.
    fresh.push(format!(".{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed)));
    let fresh = PathBuf::from(fresh);
    let _ = std::fs::remove_file(&fresh);
    let made = File::create_new(&fresh).and_then(|file| file.set_len(size_mib << 20)).map_err(failed);
    let made = made.and_then(|()| format(&fresh, size_mib, after_crash));
    // Whoever was faster has made it, and may use it already.
    let is_disk = || std::fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
    let made = made.and_then(|()| match std::fs::hard_link(&fresh, path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists || !is_disk() => Err(failed(error)),
        _ => Ok(()),
    });
    let _ = std::fs::remove_file(&fresh);
    made
}

fn format(path: &Path, size_mib: u64, after_crash: AfterCrash) -> Result<(), Error> {
    let journal: &[&str] = match after_crash {
        AfterCrash::Gone => &["-O", "^has_journal"],
        // The least that there is: it is on the host's disk from the start.
        AfterCrash::Used => &["-J", "size=4"],
    };
    // Nothing else is written ahead of need.
    let output = Command::new(program()?)
        .args(["-q", "-F", "-m", "0", "-b", "4096", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .args(journal)
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::File { path: path.to_owned(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Refused { path: path.to_owned(), size_mib, text })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_disk_takes_little_until_it_is_written_to_and_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("d");
        make(&path, 1024, AfterCrash::Used).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!(found.len(), 1 << 30);
        assert!(found.blocks() * 512 < 40 << 20, "{} blocks", found.blocks());
        std::fs::write(&path, "written to").unwrap();
        make(&path, 1024, AfterCrash::Used).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"written to");
        std::os::unix::fs::symlink("/dev/null", folder.path().join("link")).unwrap();
        assert!(make(&folder.path().join("link"), 1, AfterCrash::Gone).unwrap_err().to_string().contains("no file"));
        std::fs::remove_file(folder.path().join("link")).unwrap();
        assert!(make(&folder.path().join("none/d"), 1, AfterCrash::Gone).is_err());
        assert!(matches!(make(&folder.path().join("small"), 0, AfterCrash::Gone), Err(Error::Refused { .. })));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "what failed is gone");
    }
}

//! Empty disks to write to: files with a file system, as e2fsprogs' `mkfs.ext4` makes them. The host's disk is used as they are
//! written to.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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

/// Makes a disk at `path`, of `size_mib` at most, unless it is there. It is there whole or not at all.
///
/// # Errors
/// [`Error`].
pub fn make(path: &Path, size_mib: u64) -> Result<(), Error> {
    if path.exists() {
        return Ok(());
    }
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let failed = |source| Error::File { path: path.to_owned(), source };
    let made = File::create_new(&fresh).and_then(|file| file.set_len(size_mib << 20)).map_err(failed);
    let made = made.and_then(|()| format(&fresh, size_mib));
    // Whoever was faster has made it, and may use it already.
    let made = made.and_then(|()| match std::fs::hard_link(&fresh, path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(failed(error)),
        _ => Ok(()),
    });
    let _ = std::fs::remove_file(&fresh);
    made
}

fn format(path: &Path, size_mib: u64) -> Result<(), Error> {
    // Without a journal: after a crash of the machine nobody reads it again. Nothing is written ahead of need.
    let output = Command::new(program()?)
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
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
        make(&path, 1024).unwrap();
        let found = std::fs::metadata(&path).unwrap();
        assert_eq!(found.len(), 1 << 30);
        assert!(found.blocks() * 512 < 40 << 20, "{} blocks", found.blocks());
        std::fs::write(&path, "written to").unwrap();
        make(&path, 1024).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"written to");
        assert!(make(&folder.path().join("none/d"), 1).is_err());
        assert!(matches!(make(&folder.path().join("small"), 0), Err(Error::Refused { .. })));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "what failed is gone");
    }
}

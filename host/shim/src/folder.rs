//! The pod's folder on the host.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coracle_process::mountinfo;
use coracle_settings::Settings;
use sha2::{Digest, Sha256};

/// The folder of the pod `id` in `namespace`. Its name is a digest: names may be long, and sockets' paths may not.
pub(crate) fn pod(settings: &Settings, namespace: &str, id: &str) -> PathBuf {
    let digest = hex::encode(Sha256::digest(format!("{namespace}/{id}")));
    settings.run_folder.join(&digest[..20])
}

/// The socket of the pod's shim.
pub(crate) fn socket(pod: &Path) -> PathBuf {
    pod.join(coracle_protocol::management::SOCKET)
}

/// The folder of files that the pod's containers see.
pub(crate) fn files(pod: &Path) -> PathBuf {
    pod.join("files")
}

/// The folder of the pod's machine.
pub(crate) fn machine(pod: &Path) -> PathBuf {
    pod.join("m")
}

/// Whether a daemon serves the pod. One that is ending ends the connection, within `patience`; one that serves does not.
pub(crate) fn is_served(pod: &Path, patience: Duration) -> bool {
    let Ok(mut stream) = UnixStream::connect(socket(pod)) else { return false };
    if stream.set_read_timeout(Some(patience)).is_err() {
        return true;
    }
    let ended = stream.read(&mut [0; 1]);
    matches!(ended, Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut))
}

/// Removes the pod's folder. What is still mounted below it in this namespace is taken off first: nothing that was lent to
/// the pod may be deleted with it.
pub(crate) fn remove(pod: &Path) -> std::io::Result<()> {
    // Mostly there is none: then a host's many mounts need not be looked through.
    if !pod.try_exists()? {
        return Ok(());
    }
    for target in mounted_below(pod)?.iter().rev() {
        nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH)?;
    }
    if let Some(target) = mounted_below(pod)?.first() {
        return Err(std::io::Error::other(format!("{} is still mounted", target.display())));
    }
    // The socket last: a folder without one is nobody's.
    let entries = match std::fs::read_dir(pod) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let removed = if entry.path() == socket(pod) {
            Ok(())
        } else if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())
        } else {
            std::fs::remove_file(entry.path())
        };
        gone(removed)?;
    }
    gone(std::fs::remove_dir_all(pod))
}

/// What somebody else has removed meanwhile is gone as it should be.
fn gone(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// The mount points below a folder, in the order in which they were made.
fn mounted_below(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let points = mountinfo::mounts(&mountinfo::table()?).into_iter().map(|mount| mount.point);
    Ok(points.filter(|point| point.starts_with(folder)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_folder_is_removed_already() {
        remove(Path::new("/nowhere/at/all")).unwrap();
        assert!(mounted_below(Path::new("/proc")).unwrap().contains(&PathBuf::from("/proc")));
    }
}

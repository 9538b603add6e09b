//! The pod's folder on the host.

use std::path::{Path, PathBuf};

use coracle_settings::Settings;
use sha2::{Digest, Sha256};

/// The folder of the pod `id` in `namespace`. Its name is a digest: names may be long, and sockets' paths may not.
pub(crate) fn pod(settings: &Settings, namespace: &str, id: &str) -> PathBuf {
    let digest = hex::encode(Sha256::digest(format!("{namespace}/{id}")));
    settings.run_folder.join(&digest[..20])
}

/// The socket of the pod's shim.
pub(crate) fn socket(pod: &Path) -> PathBuf {
    pod.join("shim.sock")
}

/// The folder of the pod's machine.
pub(crate) fn machine(pod: &Path) -> PathBuf {
    pod.join("m")
}

/// Removes what a shim that has died has left. Nothing in it is mounted: mounts die with the shim's namespace.
pub(crate) fn remove(pod: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(pod) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

//! Where things of the user are: those of root below `/var/lib` and `/run`, those of others below their home and their run folder.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Whether this is root, who may make networks and mounts on the host.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The folder for images and containers.
pub(crate) fn root() -> Result<PathBuf> {
    if is_root() { Ok("/var/lib/coracle".into()) } else { home() }
}

/// An ordinary user's folder (XDG base directory specification).
fn home() -> Result<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let data = absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")));
    Ok(data.context("this user has no home: set HOME, or give --root")?.join("coracle"))
}

/// Where `coracle image build` puts the guest image.
pub(crate) fn guest() -> Result<PathBuf> {
    Ok(root()?.join("guest"))
}

/// The guest image that a container of this user's has: the user's own where there is one, else the one that the settings name.
pub(crate) fn guest_in_use() -> Result<PathBuf> {
    match own_guest() {
        Some(own) if !is_root() => Ok(own),
        _ => Ok(coracle_settings::Settings::load()?.guest_folder),
    }
}

/// An ordinary user's own guest image, where there is one; who has no home has none.
fn own_guest() -> Option<PathBuf> {
    let guest = home().ok()?.join("guest");
    guest.join(coracle_guest_image::MANIFEST).exists().then_some(guest)
}

/// Settings that an ordinary user's containers have, as TOML, where the administrator says nothing else; empty for root.
pub(crate) fn settings() -> Result<String> {
    if is_root() {
        return Ok(String::new());
    }
    let mut text = format!("run.folder = {:?}", run_folder()?.display().to_string());
    // Without one of their own users share the administrator's.
    if let Some(guest) = own_guest() {
        text.push_str(&format!("\nguest.folder = {:?}", guest.display().to_string()));
    }
    Ok(text)
}

/// A folder for what lives as long as a container, which nobody else can enter. Its path is short: sockets are below it.
pub(crate) fn run_folder() -> Result<PathBuf> {
    let user = rustix::process::geteuid().as_raw();
    // Another user's, as a variable that came along may name, is not taken.
    let is_own = |path: &PathBuf| {
        let found = std::fs::metadata(path);
        path.is_absolute()
            && found.is_ok_and(|found| found.is_dir() && found.uid() == user && found.mode() & 0o022 == 0)
    };
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(is_own);
    let folder = match own {
        Some(own) => own.join("coracle"),
        None => std::env::temp_dir().join(format!("coracle-{user}")),
    };
    make_private(&folder, user)?;
    Ok(folder)
}

/// Makes the folder, or makes sure that the one which is there is this user's alone: in a folder of everybody's somebody else may
/// have been first.
fn make_private(folder: &Path, user: u32) -> Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("make {}", folder.display()));
        }
        _ => {}
    }
    let found = std::fs::symlink_metadata(folder).with_context(|| format!("look at {}", folder.display()))?;
    if !found.is_dir() || found.uid() != user || found.mode() & 0o077 != 0 {
        bail!("{} is not a folder of this user's alone: remove it, or set XDG_RUNTIME_DIR", folder.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_of_somebody_elses_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let folder = place.path().join("run");
        make_private(&folder, user).unwrap();
        make_private(&folder, user).unwrap();
        assert!(make_private(&folder, user + 1).is_err());
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(make_private(&folder, user).unwrap_err().to_string().contains("alone"));
        std::os::unix::fs::symlink("/tmp", place.path().join("link")).unwrap();
        assert!(make_private(&place.path().join("link"), user).is_err());
    }
}

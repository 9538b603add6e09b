//! What the lab has unpacked once, and keeps.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::setup;
use crate::steps::{self, command, step};

/// The folder of that name in the cache, which `make` fills if it is not there.
pub(super) fn kept(cache: &Path, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    std::fs::create_dir_all(cache).with_context(|| format!("make {}", cache.display()))?;
    // One at a time: another lab that wants the same waits, and finds it made. The lock ends with this process.
    let lock = File::create(cache.join("lock")).context("the cache's lock")?;
    lock.lock().context("the cache's lock")?;
    let folder = cache.join(name);
    if folder.exists() {
        return Ok(folder);
    }
    let part = cache.join("part");
    let remove = || match std::fs::remove_dir_all(&part) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    // One that was killed has left it.
    remove().with_context(|| format!("remove {}", part.display()))?;
    std::fs::create_dir(&part).with_context(|| format!("make {}", part.display()))?;
    let made = make(&part)
        .and_then(|()| std::fs::rename(&part, &folder).with_context(|| format!("make {}", folder.display())));
    if made.is_err() {
        let _ = remove();
    }
    made.map(|()| folder)
}

/// Downloads a package of the distribution's into a folder, and has `unpack` take it apart there. apt's lists may be old.
pub(super) fn fetch(name: &str, folder: &Path, unpack: impl FnOnce(&Path, &Path) -> Result<()>) -> Result<()> {
    step(&format!("downloading {name}"), || {
        download(name, folder).or_else(|_| setup::update_lists().and_then(|()| download(name, folder)))
    })?;
    let file = packages(folder).pop().with_context(|| format!("apt-get brought no {name}"))?;
    unpack(&file, folder)?;
    std::fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))
}

fn download(name: &str, folder: &Path) -> Result<()> {
    // As root, apt would drop to a user who may not write here, and complain.
    let mut download = command("apt-get", &["-q", "-o", "APT::Sandbox::User=root", "download", name]);
    download.current_dir(folder).stdout(std::process::Stdio::null());
    steps::run(download)
}

/// The files of a package of the distribution's, unpacked and kept, but not installed.
pub(crate) fn package(cache: &Path, name: &str) -> Result<PathBuf> {
    kept(cache, name, |folder| fetch(name, folder, unpack))
}

/// Unpacks a package's files.
pub(super) fn unpack(package: &Path, folder: &Path) -> Result<()> {
    let mut extract = command("dpkg-deb", &["--extract"]);
    extract.arg(package).arg(folder);
    step(&format!("unpacking {}", package.display()), || steps::run(extract))
}

/// The packages in a folder.
pub(super) fn packages(folder: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "deb")).collect()
}

//! The root of a container: its image's, and what it writes.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::api;
use coracle_images::{Form, Root};
use coracle_settings::{Rootfs, Settings};

use crate::container::Folder;

/// The disk that a container writes to, in its folder.
const WRITABLE: &str = "writable.ext4";

/// Where programs are beside those of `$PATH`, which for ordinary users has not all.
const MORE_FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// As what the store keeps an image.
pub(crate) fn form(settings: &Settings) -> Form {
    match settings.run_rootfs {
        Rootfs::Erofs => Form::Disks,
        Rootfs::Virtiofs => Form::Folder,
    }
}

/// Makes what the container writes to.
pub(crate) fn make_writable(folder: &Folder, root: &Root, settings: &Settings) -> Result<()> {
    match root {
        Root::Folder(_) => {
            for part in ["upper", "work"] {
                std::fs::create_dir(folder.join(part)).context("make the writable layer")?;
            }
            Ok(())
        }
        Root::Disks(_) => make_disk(&folder.join(WRITABLE), settings.run_writable_mib),
    }
}

/// The root as the shim takes it: containerd's mounts.
pub(crate) fn mounts(folder: &Folder, root: &Root, settings: &Settings) -> Vec<api::Mount> {
    let mount = |kind: &str, source: &Path, options: Vec<String>| api::Mount {
        type_: kind.into(),
        source: source.display().to_string(),
        options,
        ..Default::default()
    };
    let path = |name: &str| folder.join(name).display().to_string();
    match root {
        Root::Folder(lower) => {
            let options = vec![
                format!("lowerdir={}", lower.display()),
                format!("upperdir={}", path("upper")),
                format!("workdir={}", path("work")),
            ];
            vec![mount("overlay", Path::new("overlay"), options)]
        }
        Root::Disks(disks) => {
            // The topmost comes first.
            let mut all: Vec<_> = disks
                .iter()
                .rev()
                .map(|disk| {
                    let mut options = vec!["ro".to_owned(), "loop".to_owned()];
                    if settings.run_verity {
                        options.push(format!("verity.roothash={}", disk.verity.root_hash));
                        options.push(format!("verity.hashoffset={}", disk.verity.hash_offset()));
                    }
                    mount("erofs", &disk.path, options)
                })
                .collect();
            let count = all.len();
            all.push(mount("ext4", &folder.join(WRITABLE), vec!["rw".into(), "loop".into()]));
            let options = vec![
                format!("lowerdir={{{{ overlay 0 {} }}}}", count.saturating_sub(1)),
                format!("upperdir={{{{ mount {count} }}}}/upper"),
                format!("workdir={{{{ mount {count} }}}}/work"),
                // It goes with the container.
                "volatile".into(),
            ];
            all.push(mount("format/mkdir/overlay", Path::new("overlay"), options));
            all
        }
    }
}

/// What roots are made of, or what that lacks.
pub(crate) fn readiness() -> Result<String> {
    match Settings::load()?.run_rootfs {
        Rootfs::Erofs => Ok(format!("disks, by {}", mkfs()?.display())),
        Rootfs::Virtiofs => Ok("shared folders, by virtiofsd".into()),
    }
}

/// Where mkfs.ext4 is, or the mend.
fn mkfs() -> Result<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(MORE_FOLDERS.map(Into::into));
    let found = folders.map(|folder| folder.join("mkfs.ext4")).find(|program| program.is_file());
    found.context("mkfs.ext4 is missing: install the package e2fsprogs, or set `run.rootfs` to \"virtiofs\"")
}

/// Makes a disk with an empty file system at `path`, of `size_mib` at most; the host's disk is used as it is written to.
fn make_disk(path: &Path, size_mib: u64) -> Result<()> {
    let made = File::create_new(path).and_then(|file| file.set_len(size_mib << 20));
    made.with_context(|| format!("make {}", path.display()))?;
    // Without a journal: after a crash of the machine nobody reads it again. Nothing is written ahead of need.
    let output = Command::new(mkfs()?)
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .context("start mkfs.ext4")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!(
            "mkfs.ext4 can't make the container's writable disk of {size_mib} MiB (`run.writable_mib`): {}",
            text.trim()
        );
    }
    Ok(())
}

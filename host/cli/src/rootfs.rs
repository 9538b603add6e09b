//! The root of a container: its image's, and what it writes.

use std::path::Path;

use anyhow::{Context, Result};
use containerd_shim_protos::api;
use coracle_ext4::AfterCrash;
use coracle_images::{Form, Root};
use coracle_settings::{Rootfs, Settings};

use crate::container::Folder;

/// The disk that a container writes to, in its folder.
const WRITABLE: &str = "writable.ext4";

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
        Root::Disks(_) => coracle_ext4::make(&folder.join(WRITABLE), settings.run_writable_mib, AfterCrash::Gone)
            .context("make the container's writable disk (`run.writable_mib`)"),
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
        Rootfs::Erofs => {
            let program = coracle_ext4::program().context("`run.rootfs` \"erofs\" needs it, \"virtiofs\" does not")?;
            Ok(format!("disks, by {}", program.display()))
        }
        Rootfs::Virtiofs => Ok("shared folders, by virtiofsd".into()),
    }
}

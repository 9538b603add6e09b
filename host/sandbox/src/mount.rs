//! Mounts on the host, as a storage plan has them. The shim is in a mount namespace of its own, so none outlives it.

use std::path::Path;

use coracle_storage::{ContainerPlan, HostMount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{Error, Result};

/// Makes `folder` a mount whose new mounts the shared file system's server will see: its own namespace is a slave of it.
pub(crate) fn share(folder: &Path) -> Result<()> {
    let none = None::<&str>;
    let failed = |errno: nix::Error| Error::Failed(format!("share {}: {errno}", folder.display()));
    mount(Some(folder), folder, none, MsFlags::MS_BIND, none).map_err(failed)?;
    mount(none, folder, none, MsFlags::MS_SHARED, none).map_err(failed)
}

/// Undoes [`share`].
pub(crate) fn unshare(folder: &Path) {
    let _ = umount2(folder, MntFlags::MNT_DETACH);
}

/// Makes a container's mounts; where one fails, those before it are undone.
pub(crate) fn apply(plan: &ContainerPlan) -> Result<()> {
    std::fs::create_dir_all(&plan.folder)
        .map_err(|error| Error::Failed(format!("make {}: {error}", plan.folder.display())))?;
    for wanted in &plan.mounts {
        if let Err(error) = make(wanted) {
            undo(plan);
            return Err(error);
        }
    }
    Ok(())
}

/// Undoes a container's mounts and removes its folder.
pub(crate) fn undo(plan: &ContainerPlan) {
    for wanted in plan.mounts.iter().rev() {
        // One that was never made is what is wanted.
        let _ = umount2(&wanted.target, MntFlags::MNT_DETACH);
        let _ = if wanted.target.is_dir() {
            std::fs::remove_dir(&wanted.target)
        } else {
            std::fs::remove_file(&wanted.target)
        };
    }
    // Only empty folders are removed: what could still be mounted below is not ours to delete.
    if let Err(error) = std::fs::remove_dir(&plan.folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        log::warn!("{} stays: {error}", plan.folder.display());
    }
}

fn make(wanted: &HostMount) -> Result<()> {
    let step = || format!("mount {} ({}) on {}", wanted.source.display(), wanted.kind, wanted.target.display());
    let failed = |error: std::io::Error| Error::Failed(format!("{}: {error}", step()));
    let file = wanted.kind == "bind" && wanted.source.is_file();
    if file {
        std::fs::File::create(&wanted.target).map_err(failed)?;
    } else {
        std::fs::create_dir_all(&wanted.target).map_err(failed)?;
    }
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in &wanted.options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "rw" | "loop" | "" => {}
            other => data.push(other),
        }
    }
    if wanted.kind == "bind" {
        flags |= MsFlags::MS_BIND;
    }
    let data = data.join(",");
    let data = (!data.is_empty()).then_some(data.as_str());
    let run = |flags, kind: Option<&str>, data: Option<&str>| {
        mount(Some(&wanted.source), &wanted.target, kind, flags, data).map_err(|errno| failed(errno.into()))
    };
    if !flags.contains(MsFlags::MS_BIND) {
        return run(flags, Some(&wanted.kind), data);
    }
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    run(flags & bind, None, None)?;
    // A bind mount takes its other flags in a second call.
    if (flags - bind).is_empty() { Ok(()) } else { run((flags - MsFlags::MS_REC) | MsFlags::MS_REMOUNT, None, None) }
}

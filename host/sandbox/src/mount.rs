//! Mounts on the host, as a storage plan has them. The shim is in a mount namespace of its own, so none outlives it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use std::os::unix::ffi::OsStrExt;

use coracle_storage::{ContainerPlan, HostMount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::{Error, Result, owners};

/// The host's side of a shared folder: beside it, and not the guest's to change.
pub(crate) fn host_side(shared: &Path) -> PathBuf {
    shared.with_file_name("mounts")
}

/// Makes the folder that the guest sees, and the one beside it that the host works in.
///
/// Both are the same mount group, so what is mounted in [`host_side`] shows in `shared`, and its server, whose own
/// namespace is a slave of this one, sees it, too. The guest's side itself is read-only: a guest that could make links
/// there would lead the host's next mount astray.
pub(crate) fn share(shared: &Path) -> Result<()> {
    let none = None::<&str>;
    let host = host_side(shared);
    let failed = |errno: nix::Error| Error::Failed(format!("share {}: {errno}", shared.display()));
    for folder in [&*host, shared] {
        std::fs::create_dir_all(folder)
            .map_err(|error| Error::Failed(format!("make {}: {error}", folder.display())))?;
    }
    mount(Some(&host), &host, none, MsFlags::MS_BIND, none).map_err(failed)?;
    mount(none, &host, none, MsFlags::MS_SHARED, none).map_err(failed)?;
    mount(Some(&host), shared, none, MsFlags::MS_BIND, none).map_err(failed)?;
    // Nothing else of it is changed: in a user namespace what the host's mount forbids must stay forbidden.
    make_readonly(shared, 0).map_err(|error| Error::Failed(format!("share {}: {error}", shared.display())))
}

/// Undoes [`share`]; folders that still hold something stay.
pub(crate) fn unshare(shared: &Path) {
    let _ = std::fs::remove_dir(host_side(shared).join(coracle_protocol::paths::VOLUMES));
    for folder in [shared, &host_side(shared)] {
        let _ = umount2(folder, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        let _ = std::fs::remove_dir(folder);
    }
}

/// The mounts that several containers of a pod have, by where they are, each with how many have it. A mount may take its time, which holds
/// up only those that want the same.
#[derive(Debug, Default)]
pub(crate) struct Shares(Mutex<HashMap<PathBuf, Arc<Mutex<usize>>>>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shares {
    fn users(&self, wanted: &HostMount) -> Arc<Mutex<usize>> {
        Arc::clone(lock(&self.0).entry(wanted.target.clone()).or_default())
    }

    fn take(&self, wanted: &HostMount) -> Result<()> {
        let users = self.users(wanted);
        let mut users = lock(&users);
        if *users == 0 {
            make(wanted).inspect_err(|_| unmake(wanted))?;
        }
        *users += 1;
        Ok(())
    }

    fn give_back(&self, wanted: &HostMount) {
        let users = self.users(wanted);
        let mut users = lock(&users);
        *users = users.saturating_sub(1);
        if *users == 0 {
            unmake(wanted);
        }
    }
}

/// Makes a container's mounts; where one fails, those before it are undone.
pub(crate) fn apply(plan: &ContainerPlan, shares: &Shares) -> Result<()> {
    for (count, wanted) in plan.shares.iter().enumerate() {
        if let Err(error) = shares.take(wanted) {
            plan.shares.iter().take(count).for_each(|wanted| shares.give_back(wanted));
            return Err(error);
        }
    }
    let folder = plan.folder.as_ref().map_or(Ok(()), |folder| {
        std::fs::create_dir_all(folder).map_err(|error| Error::Failed(format!("make {}: {error}", folder.display())))
    });
    let made = folder.and_then(|()| plan.mounts.iter().try_for_each(make));
    made.inspect_err(|_| undo(plan, shares))
}

/// Undoes a container's mounts and removes its folder.
pub(crate) fn undo(plan: &ContainerPlan, shares: &Shares) {
    // One that was never made is what is wanted.
    plan.mounts.iter().rev().for_each(unmake);
    plan.shares.iter().for_each(|wanted| shares.give_back(wanted));
    // Only empty folders are removed: what could still be mounted below is not ours to delete.
    if let Some(folder) = &plan.folder
        && let Err(error) = std::fs::remove_dir(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        log::warn!("{} stays: {error}", folder.display());
    }
}

fn unmake(wanted: &HostMount) {
    let _ = umount2(&wanted.target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    let _ =
        if wanted.target.is_dir() { std::fs::remove_dir(&wanted.target) } else { std::fs::remove_file(&wanted.target) };
}

fn make(wanted: &HostMount) -> Result<()> {
    let step = || format!("mount {} ({}) on {}", wanted.source.display(), wanted.kind, wanted.target.display());
    let failed = |error: std::io::Error| Error::Failed(format!("{}: {error}", step()));
    let file = wanted.kind == "bind" && wanted.source.is_file();
    if file {
        std::fs::File::create_new(&wanted.target).map_err(failed)?;
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
    match &wanted.owners {
        Some(owners) => owners::bind(&wanted.source, &wanted.target, owners).map_err(failed)?,
        None => run(flags & bind, None, None)?,
    }
    if flags.contains(MsFlags::MS_RDONLY) {
        make_readonly(&wanted.target, libc::AT_RECURSIVE).map_err(failed)
    } else {
        Ok(())
    }
}

/// Makes a mount read-only, whatever else it is; with `AT_RECURSIVE` all below it, too.
fn make_readonly(target: &Path, flags: libc::c_int) -> std::io::Result<()> {
    const MOUNT_ATTR_RDONLY: u64 = 1;
    let target = std::ffi::CString::new(target.as_os_str().as_bytes()).map_err(std::io::Error::other)?;
    coracle_process::set_mount_attributes(rustix::fs::CWD, &target, flags, [MOUNT_ATTR_RDONLY, 0, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs as root in a mount namespace of its own.
    fn in_own_mounts(work: impl FnOnce() + Send + 'static) {
        let inside = move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            work();
        };
        std::thread::spawn(inside).join().unwrap();
    }

    #[test]
    fn a_folder_is_mounted_once_for_all_that_have_it() {
        if !rustix::process::geteuid().is_root() {
            println!("left out: mounts take root");
            return;
        }
        in_own_mounts(|| {
            let folder = tempfile::tempdir().unwrap();
            let (source, target) = (folder.path().join("source"), folder.path().join("target"));
            std::fs::create_dir(&source).unwrap();
            std::fs::write(source.join("f"), "x").unwrap();
            let share = HostMount {
                kind: "bind".into(),
                source,
                target: target.clone(),
                options: vec!["rbind".into()],
                owners: None,
            };
            let plan = |name: &str, mounts: Vec<HostMount>| ContainerPlan {
                folder: Some(folder.path().join(name)),
                shares: vec![share.clone()],
                mounts,
                ..ContainerPlan::default()
            };
            let mounted = || {
                let table = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                table.lines().filter(|line| line.contains(target.to_str().unwrap())).count()
            };
            let shares = Shares::default();
            let (one, two) = (plan("one", Vec::new()), plan("two", Vec::new()));
            apply(&one, &shares).unwrap();
            apply(&two, &shares).unwrap();
            assert_eq!((mounted(), target.join("f").exists()), (1, true));
            // One that fails afterwards gives back only its own part.
            let nowhere =
                HostMount { source: "/nowhere/at/all".into(), target: folder.path().join("x"), ..share.clone() };
            assert!(apply(&plan("three", vec![nowhere]), &shares).is_err());
            assert_eq!(mounted(), 1);
            undo(&one, &shares);
            assert_eq!((mounted(), target.join("f").exists()), (1, true));
            undo(&two, &shares);
            assert_eq!((mounted(), target.exists()), (0, false));
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the source alone is left");
        });
    }
}

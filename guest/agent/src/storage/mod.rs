//! Storages of the wire: what must be mounted in the guest before a container can use it.

pub(crate) mod block;
mod device_mapper;
mod fs_group;
mod huge_pages;
mod owner;
mod part;
mod verity;

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use coracle_protocol::agent::Storage;
use coracle_protocol::paths;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use self::block::Disk;
use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Config, Error, Result, SharedSource, pci};

/// The drivers that [`attach`] knows, by their names on the wire.
pub(crate) const DRIVERS: [&str; 7] = ["bind", "blk", "ephemeral", "local", "nvdimm", "overlayfs", "virtio-fs"];

/// The folder below which the host may have things mounted.
const ALLOWED: &str = "/run/kata-containers";

/// What is attached, by where it is. A storage that several containers name is there once.
#[derive(Debug, Default)]
pub(crate) struct Storages {
    held: Mutex<HashMap<PathBuf, Held>>,
    /// Held by who attaches: that may wait for a device, and nobody who lets go of one waits for it.
    making: Mutex<()>,
}

#[derive(Debug)]
struct Held {
    users: usize,
    /// None of one that lives as long as the pod.
    undo: Option<Undo>,
}

/// What the end of a container's own storage takes.
#[derive(Debug)]
struct Undo {
    target: PathBuf,
    verity: Option<device_mapper::Device>,
    /// Whether what was written has to be on the disk.
    is_kept: bool,
    /// Whether it is a folder of the host's, which stays.
    is_hosts: bool,
}

impl Undo {
    fn run(self) {
        // The machine may be stopped before the kernel has let go of the last use, which would write it.
        if self.is_kept
            && let Err(error) = std::fs::File::open(&self.target).and_then(|folder| Ok(rustix::fs::syncfs(folder)?))
        {
            println!("coracle-agent: write {} back: {error}", self.target.display());
        }
        // What still uses it keeps it; nobody else finds it any more.
        let _ = umount2(&self.target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        if !self.is_hosts {
            let _ = std::fs::remove_dir(&self.target);
        }
        if let Some(device) = self.verity {
            device.remove_when_unused();
        }
    }
}

/// The storages of one container, which are let go of by [`release`].
pub(crate) type Names = Vec<PathBuf>;

/// What a container needs, attached, and let go of when this is dropped before it was [`Self::keep`]t.
pub(crate) struct Attached {
    agent: Arc<Agent>,
    names: Names,
}

impl Attached {
    /// Attaches, and comes into folders that several containers have; where one fails, those before it are let go of.
    pub(crate) async fn new(agent: &Arc<Agent>, wanted: Vec<Storage>, folders: Vec<PathBuf>) -> Result<Self> {
        let mut attached = Self { agent: Arc::clone(agent), names: Names::new() };
        // Whoever asked may have gone when it is done: then it is undone by the thread itself.
        on_thread(move || {
            for storage in wanted {
                attach(&attached.agent.config, &attached.agent.storages, &storage)?;
                attached.names.push(storage.mount_point.into());
            }
            for folder in folders {
                cross(&attached.agent.storages, &folder)?;
                attached.names.push(folder);
            }
            Ok::<_, Error>(attached)
        })
        .await
    }

    /// The names of what is attached, which somebody else lets go of now.
    pub(crate) fn keep(mut self) -> Names {
        std::mem::take(&mut self.names)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let (agent, names) = (Arc::clone(&self.agent), std::mem::take(&mut self.names));
        if !names.is_empty() {
            // It may wait for the host.
            std::thread::spawn(move || release(&agent.storages, &names));
        }
    }
}

/// Lets go of storages, the last one first. It may wait for the host.
pub(crate) fn release(storages: &Storages, names: &[PathBuf]) {
    let mut gone = Vec::new();
    let mut held = storages.held.lock().unwrap_or_else(PoisonError::into_inner);
    for name in names.iter().rev() {
        let Some(one) = held.get_mut(name) else { continue };
        one.users = one.users.saturating_sub(1);
        if one.users == 0
            && let Some(undo) = one.undo.take()
        {
            held.remove(name);
            gone.push(undo);
        }
    }
    drop(held);
    gone.into_iter().for_each(Undo::run);
}

/// Has one user more of what is at a place, which is made where nobody has it yet.
fn hold(storages: &Storages, target: &Path, make: impl FnOnce() -> Result<Option<Undo>>) -> Result<()> {
    let _making = storages.making.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(one) = storages.held.lock().unwrap_or_else(PoisonError::into_inner).get_mut(target) {
        one.users += 1;
        return Ok(());
    }
    let undo = make()?;
    let mut held = storages.held.lock().unwrap_or_else(PoisonError::into_inner);
    held.insert(target.to_owned(), Held { users: 1, undo });
    Ok(())
}

/// Mounts one storage, unless it is there.
fn attach(config: &Config, storages: &Storages, storage: &Storage) -> Result<()> {
    let target = allowed(&storage.mount_point)?;
    hold(storages, target, || mount_one(config, target, storage))
}

fn mount_one(config: &Config, target: &Path, storage: &Storage) -> Result<Option<Undo>> {
    Ok(match storage.driver.as_str() {
        "virtio-fs" if config.shared == SharedSource::InPlace => None,
        "virtio-fs" => {
            mount_at(target, &storage.source, "virtiofs", &storage.options)?;
            None
        }
        "ephemeral" if storage.fstype == "tmpfs" && config.shared == SharedSource::VirtioFs => {
            mount_at(target, "tmpfs", "tmpfs", &storage.options)?;
            None
        }
        "ephemeral" if storage.fstype == "hugetlbfs" => {
            if !storage.driver_options.iter().any(|option| option == RESERVED) {
                huge_pages::reserve(&storage.options)?;
            }
            mount_at(target, "hugetlbfs", "hugetlbfs", &storage.options)?;
            None
        }
        "ephemeral" if storage.fstype == "tmpfs" => {
            make(target)?;
            None
        }
        "local" => {
            make(target)?;
            None
        }
        "bind" => {
            let path = storage.driver_options.iter().find_map(|option| option.strip_prefix("path="));
            let path = path.ok_or_else(|| Error::Invalid("a part of a volume without its path".into()))?;
            part::mount_at(allowed(&storage.source)?, Path::new(path), target, &storage.options)?;
            Some(Undo { target: target.to_owned(), verity: None, is_kept: false, is_hosts: false })
        }
        "blk" => Some(disk(target, storage, || block::find(&storage.source))?),
        "nvdimm" => Some(disk(target, storage, || block::memory_at(&pci::slots(&storage.source)?))?),
        "overlayfs" => Some(overlay(target, storage)?),
        other => return Err(Error::Unsupported(format!("the storage driver {other}"))),
    })
}

/// A path that the host may name: below its own folder, whatever it says, and without a link on its way, which would lead elsewhere:
/// what the host shares, and disks that it has made, may have any.
fn allowed(path: &str) -> Result<&Path> {
    let wanted = Path::new(path);
    let inside = wanted.strip_prefix(ALLOWED).is_ok_and(|rest| rest.components().next().is_some());
    let is_link = |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    let plain = wanted.components().all(|part| !matches!(part, Component::ParentDir));
    if inside && plain && !wanted.ancestors().any(is_link) {
        Ok(wanted)
    } else {
        Err(Error::Invalid(format!("{} is no place for a storage", path.escape_default())))
    }
}

/// The driver's option for huge pages that another volume has set aside.
const RESERVED: &str = "reserved";

/// The driver's option for a disk that nobody reads again.
const VOLATILE: &str = "volatile";

/// A file system on a disk, whose blocks are verified where the options name a root hash.
fn disk(target: &Path, storage: &Storage, find: impl FnOnce() -> Result<Disk>) -> Result<Undo> {
    // No more than these: a file system's code is a way into the guest's kernel.
    if !matches!(storage.fstype.as_str(), "erofs" | "ext4") {
        return Err(Error::Unsupported(format!("a disk with the file system {}", storage.fstype.escape_default())));
    }
    let disk = find()?;
    let verity = verity::open(&disk, &storage.driver_options)?;
    let source = verity.as_ref().map_or_else(|| disk.path(), device_mapper::Device::path);
    let is_readonly = storage.options.iter().any(|option| option == "ro");
    let mounted = mount_at(target, &source, &storage.fstype, &storage.options).and_then(|()| {
        owner::of_fresh(target, &storage.driver_options).inspect_err(|_| {
            let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        })?;
        // What can't be written keeps whose it is.
        let group = storage.fs_group.as_ref().filter(|_| !is_readonly);
        group.map_or(Ok(()), |group| fs_group::apply(target, group)).inspect_err(|_| {
            let _ = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        })
    });
    match mounted {
        Ok(()) => {
            let is_kept = !is_readonly && !storage.driver_options.iter().any(|option| option == VOLATILE);
            Ok(Undo { target: target.to_owned(), verity, is_kept, is_hosts: false })
        }
        Err(error) => {
            if let Some(device) = verity {
                device.remove_when_unused();
            }
            Err(error)
        }
    }
}

/// Folders over one another. The upper and the working one are made.
fn overlay(target: &Path, storage: &Storage) -> Result<Undo> {
    for option in &storage.options {
        // The kernel would take what is behind them for another option, or another folder.
        if option.contains([',', '\\']) {
            return Err(Error::Invalid(format!("{} is no option of an overlay", option.escape_default())));
        }
        match option.split_once('=') {
            Some(("lowerdir", folders)) => {
                for folder in folders.split(':') {
                    allowed(folder)?;
                }
            }
            Some(("upperdir" | "workdir", folder)) => make(allowed(folder)?)?,
            None if option == VOLATILE => {}
            _ => return Err(Error::Invalid(format!("{} is no option of an overlay", option.escape_default()))),
        }
    }
    mount_at(target, "overlay", "overlay", &storage.options)?;
    // The disk below it is what has to be written.
    Ok(Undo { target: target.to_owned(), verity: None, is_kept: false, is_hosts: false })
}

/// Comes into a folder that several containers have, where that is a mount of the host's, before any of them does: each of them would
/// otherwise have a file system of its own of it, in which a socket or a lock of another one is none. The last of them leaves it again,
/// and the host's mount is free.
fn cross(storages: &Storages, folder: &Path) -> Result<()> {
    let target = allowed(folder.to_str().unwrap_or_default())?;
    hold(storages, target, || {
        // The last part of a path is not come into, so it is not the folder itself.
        std::fs::metadata(target.join(".")).map_err(Error::system(format!("come into {}", target.display())))?;
        Ok(Some(Undo { target: target.to_owned(), verity: None, is_kept: false, is_hosts: true }))
    })
}

/// The folders of a specification that several containers have.
pub(crate) fn shared_folders(spec: &oci_spec::runtime::Spec) -> Vec<PathBuf> {
    let all = Path::new(paths::SHARED).join(paths::VOLUMES);
    let sources = spec.mounts().iter().flatten().filter_map(|mount| mount.source().as_ref());
    let mut folders: Vec<PathBuf> = sources.filter(|source| source.parent() == Some(&all)).cloned().collect();
    folders.sort();
    folders.dedup();
    folders
}

fn make(target: &Path) -> Result<()> {
    std::fs::create_dir_all(target).map_err(Error::system(format!("make {}", target.display())))
}

fn mount_at(target: &Path, source: &str, kind: &str, options: &[String]) -> Result<()> {
    make(target)?;
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "nodev" => flags |= MsFlags::MS_NODEV,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "nodiratime" => flags |= MsFlags::MS_NODIRATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "" => {}
            other => data.push(other),
        }
    }
    let data = data.join(",");
    mount(Some(source), target, Some(kind), flags, Some(data.as_str()))
        .map_err(Error::system(format!("mount {source} ({kind}) on {}", target.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_attach(storage: Storage) -> Result<()> {
        attach(&Config::guest(), &Storages::default(), &storage)
    }

    #[test]
    fn a_folder_of_several_containers_is_come_into_once() {
        let storages = Storages::default();
        assert!(matches!(cross(&storages, Path::new("/etc")), Err(Error::Invalid(_))));
        assert!(matches!(
            cross(&storages, Path::new("/run/kata-containers/nowhere/at-all")),
            Err(Error::System { .. })
        ));
        assert!(storages.held.lock().unwrap().is_empty());
        let json = r#"{"ociVersion":"1.0.2","mounts":[
            {"destination":"/a","source":"/run/kata-containers/shared/containers/@volumes/one"},
            {"destination":"/b","source":"/run/kata-containers/shared/containers/@volumes/one"},
            {"destination":"/c","source":"/run/kata-containers/shared/containers/@volumes/one/below"},
            {"destination":"/d","source":"/run/kata-containers/shared/containers/c1/volume"},
            {"destination":"/proc","type":"proc","source":"proc"}]}"#;
        let spec: oci_spec::runtime::Spec = serde_json::from_str(json).unwrap();
        assert_eq!(shared_folders(&spec), [Path::new("/run/kata-containers/shared/containers/@volumes/one")]);
    }

    #[test]
    fn storages_stay_in_their_place() {
        for mount_point in ["/etc", "/run/kata-containers/../x", "relative", "", "/run/kata-containers"] {
            let storage = Storage { driver: "local".into(), mount_point: mount_point.into(), ..Default::default() };
            assert!(matches!(try_attach(storage), Err(Error::Invalid(_))), "{mount_point}");
        }
        let at = |driver: &str, fstype: &str, options: &[&str]| Storage {
            driver: driver.into(),
            fstype: fstype.into(),
            source: "/dev/disk/by-id/virtio-x".into(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            mount_point: "/run/kata-containers/x".into(),
            ..Default::default()
        };
        assert!(matches!(try_attach(at("scsi", "", &[])), Err(Error::Unsupported(_))));
        assert!(matches!(try_attach(at("blk", "ntfs", &[])), Err(Error::Unsupported(_))));
        assert!(matches!(try_attach(at("nvdimm", "ntfs", &[])), Err(Error::Unsupported(_))));
        assert!(matches!(try_attach(at("nvdimm", "erofs", &["ro"])), Err(Error::Invalid(_))), "no place on a bus");
        let part = |source: &str, path: &str| Storage {
            source: source.into(),
            driver_options: vec![path.into()],
            ..at("bind", "bind", &[])
        };
        assert!(matches!(try_attach(part("/etc", "path=x")), Err(Error::Invalid(_))));
        assert!(matches!(try_attach(part("/run/kata-containers/v", "x")), Err(Error::Invalid(_))));
        for option in ["lowerdir=/run/kata-containers/a:/etc", "upperdir=/run/kata-containers/../../etc", "metacopy=on"]
        {
            assert!(matches!(try_attach(at("overlayfs", "overlay", &[option])), Err(Error::Invalid(_))), "{option}");
        }
    }
}

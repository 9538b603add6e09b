//! A container's root and its bind mounts.

use std::path::{Path, PathBuf};

use coracle_machine::Device;
use coracle_protocol::agent::{self, Storage};
use coracle_protocol::{oci, paths};
use sha2::{Digest, Sha256};

use crate::disks::VOLATILE;
use crate::volumes::{self, EmptyDisk, Volume};
use crate::{Error, root_disks};

/// A mount to make on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMount {
    /// The file system's type; `bind` for a bind mount.
    pub kind: String,
    /// What is mounted.
    pub source: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// Options as in fstab.
    pub options: Vec<String>,
    /// Whose its files show to be, where that is not whose they are. Of a bind mount.
    pub owners: Option<Owners>,
}

/// Other owners for the files of a mount (runtime-spec, config.md, "uidMappings" and "gidMappings" of a mount).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owners {
    /// Of users.
    pub users: Vec<IdMap>,
    /// Of groups.
    pub groups: Vec<IdMap>,
    /// Whether it goes for the mounts below, too.
    pub recursive: bool,
}

/// A row of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdMap {
    /// The first one in the file system.
    pub stored: u32,
    /// What it shows as.
    pub shown: u32,
    /// How many.
    pub count: u32,
}

/// A container, as far as its storage goes.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Its name.
    pub id: String,
    /// Its root as a folder, where `rootfs` is empty.
    pub root: PathBuf,
    /// The mounts that containerd asks for.
    pub rootfs: Vec<HostMount>,
    /// The specification's mounts.
    pub mounts: Vec<oci::Mount>,
    /// Block devices of the host's that it is given.
    pub devices: Vec<oci::LinuxDevice>,
    /// Its rules for devices.
    pub rules: Vec<oci::LinuxDeviceCgroup>,
    /// Whether the guest gets copies of files, and sees none of the host's.
    pub copies_files: bool,
    /// Where in the container its termination message is (Kubernetes' annotation); empty for none.
    pub termination_log: String,
    /// The folder in which volumes are named that are disks (Kata's direct-assigned volumes).
    pub direct_volumes: PathBuf,
    /// The container's limits of huge pages: the size of a page and of all, in bytes.
    pub huge_pages: Vec<(u64, u64)>,
    /// The size at most of a disk, in MiB, where kubelet's `emptyDir` volumes that are no memory are disks of the guest's.
    pub empty_dir_mib: Option<u64>,
    /// Whether the machine has, or takes, the disks of which the root may be made.
    pub has_disks: bool,
    /// Disks that the machine has, for whomever: the host must not mount them.
    pub disks_in_use: Vec<PathBuf>,
    /// Whether the shared memory that a container runtime has made on the host for the pod becomes that of the guest, which the
    /// pod's containers share.
    pub pod_shm: bool,
}

/// What a container needs of a machine that is booted for it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Needs {
    /// Disks.
    pub disks: Vec<Device>,
    /// The files of those that a machine may have as memory: layers.
    pub layers: Vec<PathBuf>,
    /// Those of them that have to be made first.
    pub empty_disks: Vec<EmptyDisk>,
    /// Whether files of the host are shared with the guest.
    pub shares_files: bool,
}

impl Wanted {
    /// What it needs. It looks at files of the host's.
    ///
    /// # Errors
    /// [`Error`].
    pub fn needs(&self) -> Result<Needs, Error> {
        let root = root_disks(&self.id, &self.rootfs)?;
        let mut needs = Needs { shares_files: root.is_none(), ..Needs::default() };
        if let Some(root) = root {
            (needs.disks, needs.layers) = (root.devices, root.layers);
        }
        for mount in self.mounts.iter().filter(|mount| is_bind(mount) && !(self.pod_shm && is_pod_shm(mount))) {
            match volumes::of(mount, self)? {
                Some(Volume::Guests(volume)) => {
                    volume.disk.into_iter().for_each(|disk| add(&mut needs.disks, disk));
                    needs.empty_disks.extend(volume.empty_disk);
                }
                Some(Volume::Mirrored(_)) => {}
                None if is_node(mount) => {}
                None if let Some((disk, _)) = mounted_disk(mount, self)? => add(&mut needs.disks, disk),
                None => needs.shares_files |= !self.is_copied(mount),
            }
        }
        for device in &self.devices {
            add(&mut needs.disks, volumes::raw(device, &self.rules)?.0);
        }
        Ok(needs)
    }

    /// Whether the guest gets a copy of a mount's file, where nothing is shared.
    fn is_copied(&self, mount: &oci::Mount) -> bool {
        is_copy(mount) || self.copies_files && Path::new(&mount.source).is_file()
    }
}

/// Adds a disk, once.
fn add(disks: &mut Vec<Device>, device: Device) {
    if !disks.contains(&device) {
        disks.push(device);
    }
}

/// A file to copy to the guest before the container is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    /// The host's file.
    pub source: PathBuf,
    /// Its path in the guest.
    pub target: String,
}

/// A folder of the host's of which the guest has a copy that follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// The host's folder.
    pub source: PathBuf,
    /// Its path in the guest.
    pub target: String,
}

/// What a container's storage needs.
#[derive(Debug, Clone, Default)]
pub struct ContainerPlan {
    /// The container's folder below the shared one, removed with the container. None where nothing is shared.
    pub folder: Option<PathBuf>,
    /// Mounts to make on the host, in order.
    pub mounts: Vec<HostMount>,
    /// Mounts of folders, before those: each is there once for all containers of the pod that have it, so that what one of them locks,
    /// maps or listens at is the others', too.
    pub shares: Vec<HostMount>,
    /// Files to copy to the guest.
    pub copies: Vec<Copy>,
    /// The host's file to which the container's termination message comes back, where it has written to a copy.
    pub termination_log: Option<PathBuf>,
    /// Folders to copy there, and to follow.
    pub mirrors: Vec<Mirror>,
    /// What the machine has for it.
    pub devices: Vec<Device>,
    /// Devices of which the guest is told.
    pub guest_devices: Vec<agent::Device>,
    /// What the guest makes before the container, in order.
    pub storages: Vec<Storage>,
    /// The container's mounts for the guest.
    pub guest_mounts: Vec<oci::Mount>,
    /// The root's path in the guest.
    pub guest_root: String,
}

impl ContainerPlan {
    /// Plans a volume that is not simply shared; where it is in the guest.
    fn take(&mut self, volume: Volume, mount: &oci::Mount) -> Result<String, Error> {
        if owners(mount)?.is_some() {
            let destination = mount.destination.clone().into();
            return Err(Error::Unsupported { destination, kind: "volume with mapped owners".into() });
        }
        match volume {
            Volume::Mirrored(mirror) => {
                let target = mirror.target.clone();
                self.mirrors.push(mirror);
                Ok(target)
            }
            Volume::Guests(volume) => {
                volume.disk.into_iter().for_each(|disk| add(&mut self.devices, disk));
                for mut storage in volume.storages {
                    // The pages that a container may use are set aside once, for whichever of its volumes.
                    let page = |storage: &Storage| {
                        storage.options.iter().find(|option| option.starts_with("pagesize=")).cloned()
                    };
                    let own = page(&storage);
                    if own.is_some() && self.storages.iter().any(|other| page(other) == own) {
                        storage.driver_options.push(RESERVED.into());
                    }
                    self.storages.push(storage);
                }
                Ok(volume.place)
            }
        }
    }

    /// Whether the guest writes to a disk that somebody reads afterwards.
    #[must_use]
    pub fn has_kept_disk(&self) -> bool {
        let has = |list: &[String], word: &str| list.iter().any(|option| option == word);
        let is_kept = |storage: &Storage| {
            storage.driver == "blk" && !has(&storage.options, "ro") && !has(&storage.driver_options, VOLATILE)
        };
        self.storages.iter().any(is_kept)
    }
}

/// Plans a container's storage: below the pod's `shared` folder, or without one where the pod's machine shares none.
///
/// # Errors
/// [`Error`].
pub fn container(shared: Option<&Path>, wanted: &Wanted) -> Result<ContainerPlan, Error> {
    let guest_folder = format!("{}/{}", paths::SHARED, wanted.id);
    let folder = shared.map(|shared| shared.join(&wanted.id));
    let mut plan = ContainerPlan { folder: folder.clone(), ..ContainerPlan::default() };
    let disks = if wanted.has_disks { root_disks(&wanted.id, &wanted.rootfs)? } else { None };
    // The host can't mount these, or must not: two kernels on one file system would ruin it.
    let only_disks = |mount: &&HostMount| mount.kind == "erofs" || wanted.disks_in_use.contains(&mount.source);
    if let (None, Some(layer)) = (&disks, wanted.rootfs.iter().find(only_disks)) {
        return Err(Error::OnlyDisks(layer.source.clone()));
    }
    match (disks, &folder) {
        (Some(root), _) => {
            (plan.devices, plan.storages, plan.guest_root) = (root.devices, root.storages, root.guest_root);
        }
        (None, Some(folder)) => {
            plan.mounts = root(wanted, &folder.join("rootfs"))?;
            plan.guest_root = format!("{guest_folder}/rootfs");
        }
        (None, None) => return Err(Error::NotShared("/".into())),
    }
    if wanted.mounts.len() > MOUNTS_MAX {
        let count = wanted.mounts.len();
        return Err(Error::Invalid(format!("the container has {count} mounts, and {MOUNTS_MAX} are the most")));
    }
    for mount in &wanted.mounts {
        let mut guest_mount = mount.clone();
        let is_shm = wanted.pod_shm && is_pod_shm(mount);
        let volume = if is_bind(mount) && !is_shm { volumes::of(mount, wanted)? } else { None };
        if is_shm {
            guest_mount.source = paths::SHM.into();
        } else if let Some(volume) = volume {
            guest_mount.source = plan.take(volume, mount)?;
        } else if let Some((disk, name)) = mounted_disk(mount, wanted)? {
            add(&mut plan.devices, disk);
            guest_mount.source = name;
        } else if is_bind(mount) && is_node(mount) {
            // The guest has one of that name, or none: the host's is the host's.
        } else if is_bind(mount) {
            let name = mount_name(mount);
            let mut target = format!("{guest_folder}/{name}");
            match &folder {
                Some(folder) if let Some(name) = share_name(mount)? => {
                    let all = folder.with_file_name(paths::VOLUMES);
                    plan.shares.push(host_bind(mount, all.join(&name))?);
                    target = format!("{}/{}/{name}", paths::SHARED, paths::VOLUMES);
                }
                Some(folder) => plan.mounts.push(host_bind(mount, folder.join(&name))?),
                None if wanted.is_copied(mount) => {
                    let source = file_source(mount)?;
                    if mount.destination == wanted.termination_log {
                        plan.termination_log = Some(source.clone());
                    }
                    plan.copies.push(Copy { source, target: target.clone() });
                }
                None => return Err(Error::NotShared(mount.destination.clone().into())),
            }
            // They are the host's to change.
            guest_mount.UIDMappings.clear();
            guest_mount.GIDMappings.clear();
            guest_mount.options.retain(|option| !matches!(option.as_str(), "idmap" | "ridmap" | COPY));
            guest_mount.source = target;
        } else if mount.destination == "/dev/shm" {
            // In the guest it is the memory of this pod.
            guest_mount.type_ = "tmpfs".into();
            guest_mount.source = "shm".into();
        } else if !KNOWN.contains(&mount.type_.as_str()) {
            return Err(Error::Unsupported {
                destination: mount.destination.clone().into(),
                kind: mount.type_.clone(),
            });
        }
        plan.guest_mounts.push(guest_mount);
    }
    for device in &wanted.devices {
        let (disk, told) = volumes::raw(device, &wanted.rules)?;
        add(&mut plan.devices, disk);
        plan.guest_devices.push(told);
    }
    Ok(plan)
}

/// The mounts on the host that make the root at `target`.
fn root(wanted: &Wanted, target: &Path) -> Result<Vec<HostMount>, Error> {
    if !wanted.rootfs.is_empty() {
        let all = wanted.rootfs.iter();
        return Ok(all.map(|mount| HostMount { target: target.to_owned(), ..mount.clone() }).collect());
    }
    if !wanted.root.is_dir() {
        let root = wanted.root.display();
        return Err(Error::Invalid(format!("the bundle's root file system {root} is not a folder")));
    }
    Ok(vec![HostMount {
        kind: "bind".into(),
        source: wanted.root.clone(),
        target: target.to_owned(),
        options: vec!["rbind".into()],
        owners: None,
    }])
}

/// A bind mount on the host, at `target`.
fn host_bind(mount: &oci::Mount, target: PathBuf) -> Result<HostMount, Error> {
    let mut options = vec!["rbind".to_owned()];
    // The guest is not to be trusted with it: what is read-only for the container is so on the host already.
    if is_readonly(mount) {
        options.push("ro".to_owned());
    }
    Ok(HostMount { kind: "bind".into(), source: bind_source(mount)?, target, options, owners: owners(mount)? })
}

/// The driver's option for huge pages that were set aside before.
const RESERVED: &str = "reserved";

/// The name of the folder that a bind mount shows, as it is shown; `None` where it is a file, or has other owners for this container.
fn share_name(mount: &oci::Mount) -> Result<Option<String>, Error> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(&mount.source).ok().filter(std::fs::Metadata::is_dir);
    let Some(found) = found.filter(|_| mount.UIDMappings.is_empty() && mount.GIDMappings.is_empty()) else {
        return Ok(None);
    };
    if owners(mount)?.is_some() {
        return Ok(None);
    }
    // Another folder that has come to the same place is another one.
    let text = format!("{}\0{}\0{}\0{}", mount.source, found.dev(), found.ino(), is_readonly(mount));
    Ok(hex::encode(Sha256::digest(text)).get(..20).map(str::to_owned))
}

/// The option of a bind mount of a file that the container has for its own: where nothing is shared the guest gets a copy of it.
/// (To mount(8) what begins with `x-` is a comment.)
const COPY: &str = "x-coracle.copy";

fn is_copy(mount: &oci::Mount) -> bool {
    mount.options.iter().any(|option| option == COPY)
}

/// The disk that a bind mount shows, and its name in the guest.
fn mounted_disk(mount: &oci::Mount, wanted: &Wanted) -> Result<Option<(Device, String)>, Error> {
    if is_bind(mount) { volumes::mounted_disk(mount, &wanted.rules) } else { Ok(None) }
}

/// Whether a bind mount is of a character device below `/dev`: a container in a machine gets the machine's.
fn is_node(mount: &oci::Mount) -> bool {
    use std::os::unix::fs::FileTypeExt;
    let source = Path::new(&mount.source);
    let is_plain = source.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    let is_there = source.starts_with("/dev") && is_plain;
    is_there && std::fs::symlink_metadata(source).is_ok_and(|found| found.file_type().is_char_device())
}

fn file_source(mount: &oci::Mount) -> Result<PathBuf, Error> {
    let source = bind_source(mount)?;
    if source.is_file() {
        return Ok(source);
    }
    Err(Error::Invalid(format!("the mount {} is to be copied, and {} is no file", mount.destination, mount.source)))
}

/// The most mounts of a container: far more than any has, and far fewer than a kernel takes long for.
const MOUNTS_MAX: usize = 1000;

/// File systems that the guest makes by itself.
const KNOWN: [&str; 7] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"];

fn is_bind(mount: &oci::Mount) -> bool {
    mount.type_ == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
}

/// The other owners that a mount asks for.
fn owners(mount: &oci::Mount) -> Result<Option<Owners>, Error> {
    let asked = |name: &str| mount.options.iter().any(|option| option == name);
    let map = |list: &[oci::LinuxIDMapping]| -> Vec<IdMap> {
        list.iter().map(|one| IdMap { stored: one.ContainerID, shown: one.HostID, count: one.Size }).collect()
    };
    match (mount.UIDMappings.is_empty(), mount.GIDMappings.is_empty()) {
        (false, false) => Ok(Some(Owners {
            users: map(&mount.UIDMappings),
            groups: map(&mount.GIDMappings),
            recursive: asked("ridmap"),
        })),
        // Then the container's own user namespace would say, and it has none.
        (true, true) if asked("idmap") || asked("ridmap") => {
            Err(Error::Invalid(format!("the mount {} maps owners and does not say how", mount.destination)))
        }
        (true, true) => Ok(None),
        _ => Err(Error::Invalid(format!("the mount {} maps users or groups, and not both", mount.destination))),
    }
}

/// Whether a container may not write to a mount, or to it and all below it: on the host that is the same. The last option counts.
fn is_readonly(mount: &oci::Mount) -> bool {
    let last = mount.options.iter().rev().find(|option| matches!(option.as_str(), "ro" | "rro" | "rw" | "rrw"));
    last.is_some_and(|option| matches!(option.as_str(), "ro" | "rro"))
}

/// Whether a mount is the pod's shared memory, and no volume at its place: by where containerd and CRI-O make it.
fn is_pod_shm(mount: &oci::Mount) -> bool {
    let source = mount.source.as_str();
    let made_for_it = source.ends_with("/shm") && (source.contains("/sandboxes/") || source.contains("/userdata/"));
    is_bind(mount) && mount.destination == "/dev/shm" && (made_for_it || source == "/dev/shm")
}

/// A name in the container's folder: readable, and unlike all others.
fn mount_name(mount: &oci::Mount) -> String {
    let digest = hex::encode(Sha256::digest(&mount.destination));
    let base = mount.destination.rsplit('/').next().unwrap_or_default();
    let base: String =
        base.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')).take(40).collect();
    format!("{}-{base}", digest.get(..12).unwrap_or_default())
}

fn bind_source(mount: &oci::Mount) -> Result<PathBuf, Error> {
    let source = PathBuf::from(&mount.source);
    if !source.is_absolute() {
        return Err(Error::Invalid(format!(
            "the source {:?} of the mount {} is not absolute",
            mount.source, mount.destination
        )));
    }
    match std::fs::metadata(&source) {
        Ok(metadata) if metadata.is_dir() || metadata.is_file() => Ok(source),
        Ok(_) => Err(Error::Unsupported {
            destination: mount.destination.clone().into(),
            kind: "device, socket or pipe".into(),
        }),
        Err(error) => {
            Err(Error::Invalid(format!("the source {} of the mount {}: {error}", mount.source, mount.destination)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> oci::Mount {
        oci::Mount {
            destination: destination.into(),
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Default::default()
        }
    }

    /// A plan with a shared folder `/run/s` and the root `root`.
    fn plan_of(root: &Path, mounts: &[oci::Mount], pod_shm: bool) -> Result<ContainerPlan, Error> {
        let (root, mounts) = (root.to_owned(), mounts.to_vec());
        container(Some(Path::new("/run/s")), &Wanted { id: "c1".into(), root, mounts, pod_shm, ..Wanted::default() })
    }

    #[test]
    fn bind_mounts_move_below_the_shared_folder() {
        let source = tempfile::tempdir().unwrap();
        let path = source.path().to_str().unwrap();
        let file = source.path().join("f");
        std::fs::write(&file, "").unwrap();
        let mounts = [
            mount("/data", "bind", path, &["rbind", "ro"]),
            mount("/proc", "proc", "proc", &[]),
            mount("/again", "bind", path, &["rbind"]),
            mount("/f", "bind", file.to_str().unwrap(), &["ro"]),
        ];
        let plan = plan_of(source.path(), &mounts, false).unwrap();
        // Folders are there once for all containers of the pod, each way in which they are shown.
        let [share, again] = plan.shares.as_slice() else { panic!("{plan:?}") };
        assert_eq!(share.source, source.path());
        assert!(share.target.starts_with("/run/s/@volumes") && share.target != again.target, "{share:?} {again:?}");
        let name = share.target.file_name().unwrap().to_str().unwrap();
        let shared = format!("/run/kata-containers/shared/containers/@volumes/{name}");
        assert_eq!(plan.guest_mounts[0].source, shared);
        assert_eq!(share.options, ["rbind", "ro"], "read-only on the host already");
        assert_eq!(plan.guest_mounts[0].options, ["rbind", "ro"]);
        assert_eq!(plan.guest_mounts[1].source, "proc");
        let other = container(
            Some(Path::new("/run/s")),
            &Wanted { id: "c2".into(), root: source.path().into(), mounts: mounts.to_vec(), ..Wanted::default() },
        );
        assert_eq!(other.unwrap().shares, plan.shares, "another container has the same");
        // A file is each container's own.
        assert_eq!(plan.mounts.len(), 2);
        assert!(plan.mounts[1].target.starts_with("/run/s/c1"));
        assert!(plan.guest_mounts[3].source.starts_with("/run/kata-containers/shared/containers/c1/"));
        assert_eq!(plan.guest_root, "/run/kata-containers/shared/containers/c1/rootfs");
    }

    #[test]
    fn shared_memory_is_the_guests() {
        let root = tempfile::tempdir().unwrap();
        let mounts = [mount("/dev/shm", "bind", "/run/containerd/sandboxes/1/shm", &["rbind", "ro"])];
        let plan = plan_of(root.path(), &mounts, true).unwrap();
        assert_eq!(plan.mounts.len(), 1, "only the root is mounted on the host");
        assert_eq!(plan.guest_mounts[0].source, paths::SHM);
        let own = [mount("/dev/shm", "tmpfs", "shm", &[])];
        let own = plan_of(root.path(), &own, true).unwrap();
        assert_eq!(own.guest_mounts[0].type_, "tmpfs");
        // A volume at that place is a volume.
        let volume = [mount("/dev/shm", "bind", root.path().to_str().unwrap(), &[])];
        let plan = plan_of(root.path(), &volume, true).unwrap();
        assert_eq!(plan.shares.len(), 1);
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let root = tempfile::tempdir().unwrap();
        let plan = |mounts: &[oci::Mount]| plan_of(root.path(), mounts, false).unwrap_err().to_string();
        assert!(plan(&[mount("/d", "bind", "/nowhere", &[])]).contains("/nowhere"));
        assert!(plan(&[mount("/d", "bind", "relative", &[])]).contains("not absolute"));
        assert!(plan(&[mount("/d", "nfs", "x", &[])]).contains("nfs"));
        // The machine has one of its own.
        let node = plan_of(root.path(), &[mount("/d", "bind", "/dev/null", &[])], false).unwrap();
        assert_eq!((node.guest_mounts[0].source.as_str(), node.mounts.len()), ("/dev/null", 1));
        assert!(plan(&[mount("/d", "bind", "/dev/../dev/null", &[])]).contains("device"));
        let missing = plan_of(Path::new("/nowhere"), &[], false).unwrap_err().to_string();
        assert!(missing.contains("/nowhere"));
    }

    #[test]
    fn a_machine_that_shares_nothing_gets_disks_and_copies() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hosts");
        std::fs::write(&file, "127.0.0.1 localhost").unwrap();
        let disk = |kind: &str| HostMount {
            kind: kind.into(),
            source: "/d".into(),
            target: "".into(),
            options: vec![],
            owners: None,
        };
        let mut wanted = Wanted {
            id: "c1".into(),
            root: "/nowhere".into(),
            rootfs: vec![disk("erofs"), disk("ext4"), disk("overlay")],
            mounts: vec![mount("/etc/hosts", "bind", file.to_str().unwrap(), &["bind", "rw", "x-coracle.copy"])],
            has_disks: true,
            ..Wanted::default()
        };
        let shares = |wanted: &Wanted| wanted.needs().unwrap().shares_files;
        assert!(!shares(&wanted) && shares(&Wanted { rootfs: Vec::new(), ..wanted.clone() }));
        assert_eq!(wanted.needs().unwrap().disks.len(), 2, "a layer, and one to write to");
        let plan = container(None, &wanted).unwrap();
        assert!(plan.mounts.is_empty() && plan.folder.is_none());
        assert_eq!((plan.storages.len(), plan.guest_root.as_str()), (3, "/run/kata-containers/c1/rootfs"));
        assert!(plan.has_kept_disk());
        // Made again, the container has no disks; one that the machine has is not mounted beside it.
        let again = Wanted {
            has_disks: false,
            rootfs: vec![HostMount { source: "/dev/x".into(), ..disk("ext4") }],
            disks_in_use: vec!["/dev/x".into()],
            mounts: Vec::new(),
            ..wanted.clone()
        };
        let shared = Some(Path::new("/run/s"));
        assert!(matches!(container(shared, &again), Err(Error::OnlyDisks(path)) if path == Path::new("/dev/x")));
        assert!(container(shared, &Wanted { disks_in_use: Vec::new(), ..again }).is_ok());
        assert_eq!(plan.copies, [Copy { source: file, target: plan.guest_mounts[0].source.clone() }]);
        assert_eq!(plan.guest_mounts[0].options, ["bind", "rw"]);
        // What the host and the container are both to see can't be copied, nor can a folder.
        wanted.mounts.push(mount("/data", "bind", folder.path().to_str().unwrap(), &["bind"]));
        assert!(shares(&wanted));
        assert!(container(None, &wanted).unwrap_err().to_string().contains("/data"));
        wanted.mounts[1].options.push("x-coracle.copy".into());
        assert!(container(None, &wanted).unwrap_err().to_string().contains("no file"));
    }

    #[test]
    fn two_mounts_of_one_name_stay_apart() {
        let one = mount_name(&mount("/a/conf", "bind", "/x", &[]));
        let two = mount_name(&mount("/b/conf", "bind", "/x", &[]));
        assert_ne!(one, two);
        assert!(one.ends_with("-conf") && !mount_name(&mount("/..", "bind", "/", &[])).contains('/'));
    }
}

//! A container's root and its bind mounts.

use std::path::{Path, PathBuf};

use coracle_protocol::{oci, paths};
use sha2::{Digest, Sha256};

use crate::Error;

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

/// What a container's storage needs.
#[derive(Debug, Clone)]
pub struct ContainerPlan {
    /// The container's folder below the shared one, removed with the container.
    pub folder: PathBuf,
    /// Mounts to make on the host, in order.
    pub mounts: Vec<HostMount>,
    /// The container's mounts for the guest.
    pub guest_mounts: Vec<oci::Mount>,
    /// The root's path in the guest.
    pub guest_root: String,
}

/// Plans a container's storage below the pod's `shared` folder.
///
/// `rootfs` are the mounts that containerd asks for; where there are none the root is `root`, a folder. `spec_mounts` are
/// the specification's. With `pod_shm` the shared memory that a container runtime has made on the host for the pod becomes that
/// of the guest, which the pod's containers share.
///
/// # Errors
/// [`Error`].
pub fn container(
    shared: &Path,
    id: &str,
    root: &Path,
    rootfs: &[HostMount],
    spec_mounts: &[oci::Mount],
    pod_shm: bool,
) -> Result<ContainerPlan, Error> {
    let folder = shared.join(id);
    let target = folder.join("rootfs");
    let mut mounts = Vec::new();
    if rootfs.is_empty() {
        if !root.is_dir() {
            return Err(Error::Invalid(format!("the bundle's root file system {} is not a folder", root.display())));
        }
        mounts.push(HostMount {
            kind: "bind".into(),
            source: root.to_owned(),
            target,
            options: vec!["rbind".into()],
            owners: None,
        });
    } else {
        mounts.extend(rootfs.iter().map(|mount| HostMount { target: target.clone(), ..mount.clone() }));
    }
    if spec_mounts.len() > MOUNTS_MAX {
        let count = spec_mounts.len();
        return Err(Error::Invalid(format!("the container has {count} mounts, and {MOUNTS_MAX} are the most")));
    }
    let guest_folder = format!("{}/{id}", paths::SHARED);
    let mut guest_mounts = Vec::new();
    for mount in spec_mounts {
        let mut guest_mount = mount.clone();
        if pod_shm && is_pod_shm(mount) {
            guest_mount.source = paths::SHM.into();
        } else if is_bind(mount) {
            let name = mount_name(mount);
            let mut options = vec!["rbind".to_owned()];
            // The guest is not to be trusted with it: what is read-only for the container is so on the host already.
            if is_readonly(mount) {
                options.push("ro".to_owned());
            }
            mounts.push(HostMount {
                kind: "bind".into(),
                source: bind_source(mount)?,
                target: folder.join(&name),
                options,
                owners: owners(mount)?,
            });
            // They are the host's to change.
            guest_mount.UIDMappings.clear();
            guest_mount.GIDMappings.clear();
            guest_mount.options.retain(|option| !matches!(option.as_str(), "idmap" | "ridmap"));
            guest_mount.source = format!("{guest_folder}/{name}");
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
        guest_mounts.push(guest_mount);
    }
    Ok(ContainerPlan { folder, mounts, guest_mounts, guest_root: format!("{guest_folder}/rootfs") })
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

    #[test]
    fn bind_mounts_move_below_the_shared_folder() {
        let source = tempfile::tempdir().unwrap();
        let path = source.path().to_str().unwrap();
        let mounts = [mount("/data", "bind", path, &["rbind", "ro"]), mount("/proc", "proc", "proc", &[])];
        let plan = container(Path::new("/run/s"), "c1", source.path(), &[], &mounts, false).unwrap();
        assert_eq!(plan.mounts.len(), 2);
        assert_eq!(plan.mounts[1].source, source.path());
        assert!(plan.mounts[1].target.starts_with("/run/s/c1"));
        assert!(plan.guest_mounts[0].source.starts_with("/run/kata-containers/shared/containers/c1/"));
        assert_eq!(plan.mounts[1].options, ["rbind", "ro"], "read-only on the host already");
        assert_eq!(plan.guest_mounts[0].options, ["rbind", "ro"]);
        assert_eq!(plan.guest_mounts[1].source, "proc");
        assert_eq!(plan.guest_root, "/run/kata-containers/shared/containers/c1/rootfs");
    }

    #[test]
    fn shared_memory_is_the_guests() {
        let root = tempfile::tempdir().unwrap();
        let mounts = [mount("/dev/shm", "bind", "/run/containerd/sandboxes/1/shm", &["rbind", "ro"])];
        let plan = container(Path::new("/s"), "c", root.path(), &[], &mounts, true).unwrap();
        assert_eq!(plan.mounts.len(), 1, "only the root is mounted on the host");
        assert_eq!(plan.guest_mounts[0].source, paths::SHM);
        let own = [mount("/dev/shm", "tmpfs", "shm", &[])];
        let own = container(Path::new("/s"), "c", root.path(), &[], &own, true).unwrap();
        assert_eq!(own.guest_mounts[0].type_, "tmpfs");
        // A volume at that place is a volume.
        let volume = [mount("/dev/shm", "bind", root.path().to_str().unwrap(), &[])];
        let plan = container(Path::new("/s"), "c", root.path(), &[], &volume, true).unwrap();
        assert_eq!(plan.mounts.len(), 2);
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let root = tempfile::tempdir().unwrap();
        let plan = |mounts: &[oci::Mount]| {
            container(Path::new("/s"), "c", root.path(), &[], mounts, false).unwrap_err().to_string()
        };
        assert!(plan(&[mount("/d", "bind", "/nowhere", &[])]).contains("/nowhere"));
        assert!(plan(&[mount("/d", "bind", "relative", &[])]).contains("not absolute"));
        assert!(plan(&[mount("/d", "nfs", "x", &[])]).contains("nfs"));
        assert!(plan(&[mount("/d", "bind", "/dev/null", &[])]).contains("device"));
        let missing = container(Path::new("/s"), "c", Path::new("/nowhere"), &[], &[], false).unwrap_err().to_string();
        assert!(missing.contains("/nowhere"));
    }

    #[test]
    fn two_mounts_of_one_name_stay_apart() {
        let one = mount_name(&mount("/a/conf", "bind", "/x", &[]));
        let two = mount_name(&mount("/b/conf", "bind", "/x", &[]));
        assert_ne!(one, two);
        assert!(one.ends_with("-conf") && !mount_name(&mount("/..", "bind", "/", &[])).contains('/'));
    }
}

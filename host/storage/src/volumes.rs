//! Volumes that are more than a folder of the host: disks, memory of the pod, and folders whose changes the guest has to hear of.
//! Which a mount is, is said by where its source lies.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use coracle_machine::Device;
use coracle_protocol::agent::{self, FSGroup, Storage};
use coracle_protocol::protobuf::MessageField;
use coracle_protocol::types::FSGroupChangePolicy;
use coracle_protocol::{oci, paths};
use serde::Deserialize;

use crate::disks::{disk, guest_name, serial, storage};
use crate::mountinfo::mounts;
use crate::{Error, Mirror, Wanted};

/// A mount that is not simply shared.
#[derive(Debug)]
pub(crate) enum Volume {
    /// A folder that kubelet changes as a whole: the guest has a copy, and changes of it are changes there.
    Mirrored(Mirror),
    /// Memory of the pod, where the host has memory of its own, and where in it the container's is.
    Memory(Vec<Storage>, String),
    /// A disk with a file system, which the guest mounts.
    Disk(Device, Box<Storage>),
}

/// The volume that a bind mount of a container is; `None` where it is only files.
///
/// # Errors
/// [`Error::Invalid`], [`Error::Unsupported`].
pub(crate) fn of(mount: &oci::Mount, wanted: &Wanted) -> Result<Option<Volume>, Error> {
    let source = Path::new(&mount.source);
    if let Some(info) = mount_info(source, &wanted.direct_volumes)? {
        let (device, storage) = direct_volume(mount, &info)?;
        return Ok(Some(Volume::Disk(device, Box::new(storage))));
    }
    match kubelet_kind(source) {
        // Written as a whole by Kubernetes' atomic writer: by the link alone it is known.
        Some("configmap" | "secret" | "projected" | "downward-api") if is_link(&source.join(paths::DATA)) => {
            let target = format!("{}/{}", paths::COPIES, serial(source));
            Ok(Some(Volume::Mirrored(Mirror { source: source.to_owned(), target })))
        }
        Some("empty-dir") => Ok(memory(source, wanted.copies_files)?.map(|storage| {
            let place = storage.mount_point.clone();
            Volume::Memory(vec![storage], place)
        })),
        _ => sub_path(source, wanted.copies_files),
    }
}

/// A part of a volume (`subPath`): kubelet mounts it at `volume-subpaths/VOLUME/CONTAINER/NUMBER` of the pod's folder. Of memory it is that
/// part of the guest's; otherwise it is files.
fn sub_path(source: &Path, must: bool) -> Result<Option<Volume>, Error> {
    let Some(volume) = source.parent().and_then(Path::parent) else { return Ok(None) };
    let Some(all) = volume.parent().filter(|all| all.file_name().is_some_and(|name| name == "volume-subpaths")) else {
        return Ok(None);
    };
    let (Some(pod), Some(name)) = (all.parent(), volume.file_name()) else { return Ok(None) };
    let whole = pod.join("volumes/kubernetes.io~empty-dir").join(name);
    if !whole.is_dir() {
        return Ok(None);
    }
    let Some(storage) = memory(&whole, must)? else { return Ok(None) };
    let invalid = |what: String| Error::Invalid(format!("the part {} of a volume in memory: {what}", source.display()));
    if !source.is_dir() {
        return Err(invalid("only folders of it can be mounted by themselves (subPath)".into()));
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(|error| invalid(error.to_string()))?;
    let inner = root_of(&table, source).ok_or_else(|| invalid("nothing is mounted there".into()))?;
    let place = format!("{}{inner}", storage.mount_point);
    // The guest's has it not yet.
    let folder = Storage { driver: "local".into(), mount_point: place.clone(), ..Default::default() };
    Ok(Some(Volume::Memory(vec![storage, folder], place)))
}

/// What of its file system is mounted at `point`.
fn root_of(table: &str, point: &Path) -> Option<String> {
    let found = mounts(table).into_iter().rev().find(|mount| mount.point == point);
    // The kernel writes no path that climbs; what is below a deleted folder has words behind it.
    found.map(|mount| mount.root).filter(|root| root.starts_with('/') && !root.contains("//deleted"))
}

/// Below which folder of a pod's kubelet has a volume, without its prefix. (The folder of a volume's name is the last one.)
fn kubelet_kind(source: &Path) -> Option<&str> {
    let kind = source.parent()?;
    let is_volumes = kind.parent()?.file_name()? == "volumes";
    kind.file_name()?.to_str()?.strip_prefix("kubernetes.io~").filter(|_| is_volumes)
}

fn is_link(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink())
}

/// What the host's kernel calls its file systems (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Kubelet's `emptyDir`: of the medium `Memory` it is one in the guest, with its size, owner and mode. Otherwise it is files, or memory of
/// the guest all the same where it `must` be, as far as that goes.
fn memory(source: &Path, must: bool) -> Result<Option<Storage>, Error> {
    use std::os::unix::fs::MetadataExt;
    let failed = |error: std::io::Error| Error::Invalid(format!("look at {}: {error}", source.display()));
    let found = rustix::fs::statfs(source).map_err(|errno| failed(errno.into()))?;
    if found.f_type == HUGETLBFS_MAGIC {
        return Err(Error::Unsupported { destination: source.to_owned(), kind: "huge pages".into() });
    }
    let metadata = std::fs::metadata(source).map_err(failed)?;
    // A folder on a file system of memory has no memory of its own.
    let is_mount = std::fs::metadata(source.join("..")).map_err(failed)?.dev() != metadata.dev();
    let is_memory = found.f_type == TMPFS_MAGIC && is_mount;
    if !is_memory && !must {
        return Ok(None);
    }
    let bytes = found.f_blocks.saturating_mul(u64::try_from(found.f_bsize).unwrap_or(0));
    let bytes = if is_memory { bytes } else { 0 };
    let mut options = vec![
        format!("mode={:o}", metadata.mode() & 0o7777),
        format!("uid={}", metadata.uid()),
        format!("gid={}", metadata.gid()),
    ];
    if bytes > 0 {
        options.push(format!("size={bytes}"));
    }
    Ok(Some(Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options,
        mount_point: place(source),
        ..Default::default()
    }))
}

/// Where a volume is in the guest: in one place for all containers of the pod.
fn place(source: &Path) -> String {
    format!("{}/volumes/{}", paths::STATE, serial(source))
}

/// How a volume that is a disk is described, where it is.
const INFO_FILE: &str = "mountInfo.json";
const INFO_BYTES_MAX: u64 = 64 * 1024;

/// The description (Kata Containers: docs/design/direct-blk-device-assignment.md).
#[derive(Debug, Deserialize)]
struct MountInfo {
    #[serde(rename = "volume-type")]
    volume_type: String,
    device: PathBuf,
    #[serde(rename = "fstype", default)]
    fstype: String,
    #[serde(default)]
    metadata: std::collections::BTreeMap<String, String>,
    #[serde(default)]
    options: Vec<String>,
}

fn mount_info(source: &Path, direct: &Path) -> Result<Option<MountInfo>, Error> {
    use std::io::Read;
    let Some(name) = source.to_str().map(|text| URL_SAFE.encode(text)) else { return Ok(None) };
    let path = direct.join(name).join(INFO_FILE);
    let file = match std::fs::File::open(&path) {
        Ok(file) => file,
        // A name that is too long for a file system is none of it, and what a user may not see is not theirs.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENAMETOOLONG | libc::ENOTDIR | libc::EACCES)
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(Error::Invalid(format!("read {}: {error}", path.display()))),
    };
    let invalid = |error: String| Error::Invalid(format!("{}: {error}", path.display()));
    let mut text = String::new();
    file.take(INFO_BYTES_MAX).read_to_string(&mut text).map_err(|error| invalid(error.to_string()))?;
    serde_json::from_str(&text).map(Some).map_err(|error| invalid(error.to_string()))
}

fn direct_volume(mount: &oci::Mount, info: &MountInfo) -> Result<(Device, Storage), Error> {
    let invalid = |what: String| Error::Invalid(format!("the direct volume {}: {what}", mount.source));
    if info.volume_type != "block" {
        return Err(invalid(format!("the type {:?} is not supported: \"block\" is", info.volume_type)));
    }
    if !info.device.is_absolute() {
        return Err(invalid(format!("the device {} has no absolute path", info.device.display())));
    }
    let is_readonly = info.options.iter().any(|option| option == "ro");
    let options: Vec<&str> = info.options.iter().map(String::as_str).collect();
    let place = place(Path::new(&mount.source));
    let mut made = storage(&info.device, &info.fstype, &options, &place, Vec::new());
    if let Some(group) = info.metadata.get("fsGroup") {
        let group_id = group.parse().map_err(|_| invalid(format!("{group:?} is no group")))?;
        let group_change_policy = match info.metadata.get("fsGroupChangePolicy").map(String::as_str) {
            None | Some("" | "Always") => FSGroupChangePolicy::Always,
            Some("OnRootMismatch") => FSGroupChangePolicy::OnRootMismatch,
            Some(other) => return Err(invalid(format!("{other:?} is no policy for its group"))),
        };
        let group_change_policy = group_change_policy.into();
        made.fs_group = MessageField::some(FSGroup { group_id, group_change_policy, ..Default::default() });
    }
    Ok((disk(&info.device, is_readonly), made))
}

/// A block device of the host's that a specification gives to a container: the disk, and what the guest is told of it. The rules for
/// devices say whether it may be written to.
///
/// # Errors
/// [`Error::Invalid`] where the host has no such device.
pub(crate) fn raw(
    device: &oci::LinuxDevice,
    rules: &[oci::LinuxDeviceCgroup],
) -> Result<(Device, agent::Device), Error> {
    let path = host_device(Path::new("/sys/dev/block"), Path::new("/dev"), device)?;
    let fits = |own: i64, rule: Option<i64>| rule.is_none_or(|number| number < 0 || number == own);
    let is_about = |rule: &&oci::LinuxDeviceCgroup| {
        matches!(rule.Type.as_str(), "b" | "a" | "") && fits(device.Major, rule.Major) && fits(device.Minor, rule.Minor)
    };
    let about_writes = |rule: &&oci::LinuxDeviceCgroup| rule.Access.is_empty() || rule.Access.contains('w');
    // The last one that says anything of it counts; without one it is closed, and the guest is not to be trusted with that.
    let read_only = !rules.iter().rev().filter(is_about).find(about_writes).is_some_and(|rule| rule.Allow);
    let told = agent::Device {
        type_: "blk".into(),
        vm_path: guest_name(&path),
        container_path: device.Path.clone(),
        ..Default::default()
    };
    Ok((disk(&path, read_only), told))
}

/// The device file of a block device, by its number.
fn host_device(sys: &Path, dev: &Path, device: &oci::LinuxDevice) -> Result<PathBuf, Error> {
    let missing = |why: String| {
        Error::Invalid(format!("the block device {} ({}:{}): {why}", device.Path, device.Major, device.Minor))
    };
    let about = sys.join(format!("{}:{}/uevent", device.Major, device.Minor));
    let text =
        std::fs::read_to_string(&about).map_err(|error| missing(format!("read {}: {error}", about.display())))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| missing("the kernel has no name for it".into()))?;
    Ok(dev.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bind(source: &Path) -> oci::Mount {
        oci::Mount {
            destination: "/v".into(),
            type_: "bind".into(),
            source: source.display().to_string(),
            ..Default::default()
        }
    }

    #[test]
    fn what_kubelet_writes_as_a_whole_is_copied() {
        let pod = tempfile::tempdir().unwrap();
        let volume = |kind: &str| {
            let folder = pod.path().join("volumes").join(kind).join("name");
            std::fs::create_dir_all(folder.join("..2026")).unwrap();
            folder
        };
        let none = &Wanted { direct_volumes: "/nowhere".into(), ..Wanted::default() };
        for kind in ["configmap", "secret", "projected", "downward-api"] {
            let folder = volume(&format!("kubernetes.io~{kind}"));
            assert!(of(&bind(&folder), none).unwrap().is_none(), "nothing that is written as a whole");
            std::os::unix::fs::symlink("..2026", folder.join(paths::DATA)).unwrap();
            let Some(Volume::Mirrored(mirror)) = of(&bind(&folder), none).unwrap() else { panic!("{kind}") };
            assert_eq!(mirror.source, folder);
            assert!(mirror.target.starts_with("/run/kata-containers/copies/"), "{}", mirror.target);
            // A part of it is a file or folder as any other: that does not change in Kubernetes, either.
            assert!(of(&bind(&folder.join("..2026")), none).unwrap().is_none());
        }
        let other = volume("kubernetes.io~csi");
        std::os::unix::fs::symlink("..2026", other.join(paths::DATA)).unwrap();
        assert!(of(&bind(&other), none).unwrap().is_none());
        let empty = bind(&volume("kubernetes.io~empty-dir"));
        assert!(of(&empty, none).unwrap().is_none(), "files of the host's");
        let sealed = Wanted { copies_files: true, ..none.clone() };
        assert!(
            matches!(of(&empty, &sealed).unwrap(), Some(Volume::Memory(storages, _)) if storages[0].fstype == "tmpfs")
        );
        // A part of it is that part of the guest's; here nothing is mounted, and that is said.
        let pod_folder = pod.path().join("volume-subpaths/name/c/0");
        std::fs::create_dir_all(&pod_folder).unwrap();
        assert!(of(&bind(&pod_folder), none).unwrap().is_none());
        assert!(of(&bind(&pod_folder), &sealed).unwrap_err().to_string().contains("nothing is mounted"));
        let table = "36 35 0:44 / /v rw - tmpfs t rw\n37 35 0:44 /a\\040b /p/x rw - tmpfs t rw\n";
        assert_eq!(root_of(table, Path::new("/p/x")).unwrap(), "/a b");
        assert_eq!(root_of(table, Path::new("/p")), None);
    }

    fn described(text: &str) -> Result<Option<Volume>, Error> {
        let direct = tempfile::tempdir().unwrap();
        let source = Path::new("/var/lib/kubelet/pods/p/volumes/kubernetes.io~csi/v/mount");
        let folder = direct.path().join(URL_SAFE.encode(source.to_str().unwrap()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(INFO_FILE), text).unwrap();
        of(&bind(source), &Wanted { direct_volumes: direct.path().into(), ..Wanted::default() })
    }

    #[test]
    fn a_direct_volume_is_a_disk_that_the_guest_mounts() {
        let text = r#"{"volume-type":"block","device":"/dev/sdf","fstype":"ext4","options":["ro","noatime"],
            "metadata":{"fsGroup":"3000","fsGroupChangePolicy":"OnRootMismatch","FSGroup":"ignored"}}"#;
        let Some(Volume::Disk(device, storage)) = described(text).unwrap() else { panic!("no disk") };
        assert!(matches!(&device, Device::Block { path, read_only: true, .. } if path == Path::new("/dev/sdf")));
        assert_eq!((storage.driver.as_str(), storage.fstype.as_str()), ("blk", "ext4"));
        assert_eq!(storage.options, ["ro", "noatime"]);
        assert_eq!(storage.fs_group.group_id, 3000);
        assert_eq!(storage.fs_group.group_change_policy.enum_value(), Ok(FSGroupChangePolicy::OnRootMismatch));
    }

    #[test]
    fn a_direct_volume_that_makes_no_sense_is_named() {
        for (text, word) in [
            ("{", "mountInfo.json"),
            (r#"{"volume-type":"vfiovol","device":"/dev/x"}"#, "vfiovol"),
            (r#"{"volume-type":"block","device":"x"}"#, "absolute"),
            (r#"{"volume-type":"block","device":"/x","metadata":{"fsGroup":"many"}}"#, "no group"),
            (
                r#"{"volume-type":"block","device":"/x","metadata":{"fsGroup":"1","fsGroupChangePolicy":"Never"}}"#,
                "Never",
            ),
        ] {
            let error = described(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_block_device_is_found_by_its_number() {
        let sys = tempfile::tempdir().unwrap();
        std::fs::create_dir(sys.path().join("7:1")).unwrap();
        std::fs::write(sys.path().join("7:1/uevent"), "MAJOR=7\nMINOR=1\nDEVNAME=loop1\nDEVTYPE=disk\n").unwrap();
        let device = |minor| oci::LinuxDevice {
            Path: "/dev/xvda".into(),
            Type: "b".into(),
            Major: 7,
            Minor: minor,
            ..Default::default()
        };
        let find = |minor| host_device(sys.path(), Path::new("/dev"), &device(minor));
        assert_eq!(find(1).unwrap(), Path::new("/dev/loop1"));
        let error = find(2).unwrap_err().to_string();
        assert!(error.contains("/dev/xvda (7:2)"), "{error}");
    }
}

//! Volumes that are more than a folder of the host: disks, memory of the pod, and folders whose changes the guest has to hear of.
//! Which a mount is, is said by where its source lies.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use coracle_machine::Device;
use coracle_process::mountinfo::{Mounted, mounts, table};
use coracle_protocol::agent::{self, FSGroup, Storage};
use coracle_protocol::protobuf::MessageField;
use coracle_protocol::types::FSGroupChangePolicy;
use coracle_protocol::{oci, paths};
use serde::Deserialize;

use crate::disks::{disk, guest_name, serial, storage};
use crate::{Error, Mirror, Wanted};

/// A mount that is not simply shared.
#[derive(Debug)]
pub(crate) enum Volume {
    /// A folder that kubelet changes as a whole: the guest has a copy, and changes of it are changes there.
    Mirrored(Mirror),
    /// What the guest has by itself: memory, or a disk.
    Guests(Guests),
}

/// A volume that the guest has by itself.
#[derive(Debug, Default)]
pub(crate) struct Guests {
    /// What it mounts, in order.
    pub(crate) storages: Vec<Storage>,
    /// Where in it the container's is.
    pub(crate) place: String,
    /// The disk that is mounted.
    pub(crate) disk: Option<Device>,
    /// The same disk, where it has to be made first.
    pub(crate) empty_disk: Option<EmptyDisk>,
}

impl Guests {
    fn of(storage: Storage) -> Self {
        Self { place: storage.mount_point.clone(), storages: vec![storage], ..Self::default() }
    }
}

/// A disk to make, with an empty file system, where it is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmptyDisk {
    /// The file.
    pub path: PathBuf,
    /// Its size at most, in MiB.
    pub size_mib: u64,
}

/// The volume that a bind mount of a container is; `None` where it is only files.
///
/// # Errors
/// [`Error::Invalid`], [`Error::Unsupported`].
pub(crate) fn of(mount: &oci::Mount, wanted: &Wanted) -> Result<Option<Volume>, Error> {
    let source = Path::new(&mount.source);
    if let Some(info) = mount_info(source, &wanted.direct_volumes)? {
        let (device, storage) = direct_volume(mount, &info)?;
        return Ok(Some(Volume::Guests(Guests { disk: Some(device), ..Guests::of(storage) })));
    }
    match kubelet_kind(source) {
        // Written as a whole by Kubernetes' atomic writer: by the link alone it is known.
        Some("configmap" | "secret" | "projected" | "downward-api") if is_link(&source.join(paths::DATA)) => {
            let target = format!("{}/{}", paths::COPIES, serial(source));
            Ok(Some(Volume::Mirrored(Mirror { source: source.to_owned(), target })))
        }
        Some("empty-dir") => Ok(empty_dir(source, wanted)?.map(Volume::Guests)),
        _ => sub_path(source, wanted),
    }
}

/// A part of a volume (`subPath`): kubelet mounts it at `volume-subpaths/VOLUME/CONTAINER/NUMBER` of the pod's folder. Of what the guest has
/// by itself it is that part of the guest's; otherwise it is files.
fn sub_path(source: &Path, wanted: &Wanted) -> Result<Option<Volume>, Error> {
    let Some(volume) = source.parent().and_then(Path::parent) else { return Ok(None) };
    let Some(all) = volume.parent().filter(|all| all.file_name().is_some_and(|name| name == "volume-subpaths")) else {
        return Ok(None);
    };
    let (Some(pod), Some(name)) = (all.parent(), volume.file_name()) else { return Ok(None) };
    let whole = pod.join("volumes/kubernetes.io~empty-dir").join(name);
    if !whole.is_dir() {
        return Ok(None);
    }
    let Some(mut volume) = empty_dir(&whole, wanted)? else { return Ok(None) };
    let invalid = |what: String| Error::Invalid(format!("the part {} of a volume: {what}", source.display()));
    if !source.is_dir() {
        return Err(invalid("only folders of it can be mounted by themselves (subPath)".into()));
    }
    let table = table().map_err(|error| invalid(error.to_string()))?;
    let part = mount_of(&table, source).ok_or_else(|| invalid("nothing is mounted there".into()))?;
    let inner = inside(&table, &whole, &part).ok_or_else(|| invalid("it is no part of its volume".into()))?;
    let owner = Root::of(&std::fs::metadata(source).map_err(|error| invalid(error.to_string()))?);
    // The guest mounts it by itself: whoever has the whole could lead a path astray.
    let storage = Storage {
        driver: "bind".into(),
        fstype: "bind".into(),
        source: std::mem::replace(&mut volume.place, volume_place(source)),
        driver_options: vec![format!("path={inner}")],
        options: owner.options(),
        mount_point: volume_place(source),
        ..Default::default()
    };
    volume.storages.push(storage);
    Ok(Some(Volume::Guests(volume)))
}

/// What is mounted at `point`.
fn mount_of(table: &[u8], point: &Path) -> Option<Mounted> {
    let found = mounts(table).into_iter().rev().find(|mount| mount.point == point);
    // The kernel writes no path that climbs; what is below a deleted folder has words behind it.
    found.filter(|mount| mount.root.starts_with('/') && !mount.root.contains("//deleted"))
}

/// Where below the folder `whole` the folder is that `part` shows, without a slash at its beginning. None where it is not below it.
fn inside(table: &[u8], whole: &Path, part: &Mounted) -> Option<String> {
    // The mount that `whole` is on: the last one of the longest way.
    let holder = mounts(table)
        .into_iter()
        .filter(|mount| whole.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len())?;
    let from_root = Path::new(&holder.root).join(whole.strip_prefix(&holder.point).ok()?);
    let below = Path::new(&part.root).strip_prefix(&from_root).ok()?;
    (holder.device == part.device).then(|| below.to_str().map(str::to_owned)).flatten()
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

/// The file of a volume's folder on the host that is the disk of which the guest has it. There kubelet counts what it takes, and removes
/// it with the rest.
const VOLUME_DISK: &str = "coracle.ext4";

/// Kubelet's `emptyDir`: of the media `Memory` and `HugePages` it is memory of the guest, with its size, owner and mode. Otherwise it is
/// files, or a disk of the guest's where it is wanted so, or memory of the guest all the same where there are no files, as far as that
/// goes.
fn empty_dir(source: &Path, wanted: &Wanted) -> Result<Option<Guests>, Error> {
    use std::os::unix::fs::MetadataExt;
    let failed = |error: std::io::Error| Error::Invalid(format!("look at {}: {error}", source.display()));
    let found = rustix::fs::statfs(source).map_err(|errno| failed(errno.into()))?;
    let metadata = std::fs::metadata(source).map_err(failed)?;
    // A folder on a file system of memory has no memory of its own.
    let is_mount = std::fs::metadata(source.join("..")).map_err(failed)?.dev() != metadata.dev();
    let block_bytes = u64::try_from(found.f_bsize).unwrap_or(0);
    let bytes = found.f_blocks.saturating_mul(block_bytes);
    let root = Root::of(&metadata);
    match found.f_type {
        HUGETLBFS_MAGIC => {
            let mut options = root.options();
            options.push(format!("pagesize={block_bytes}"));
            // Kubelet gives it none: it has as much as its first container may use. One that may use none finds it there.
            let limit = wanted.huge_pages.iter().find(|(page, _)| *page == block_bytes).map_or(0, |(_, limit)| *limit);
            let bytes = if bytes == 0 { limit } else { bytes };
            if bytes > 0 {
                options.push(format!("size={bytes}"));
            }
            Ok(Some(Guests::of(memory(source, "hugetlbfs", options))))
        }
        TMPFS_MAGIC if is_mount => {
            let mut options = root.options();
            if bytes > 0 {
                options.push(format!("size={bytes}"));
            }
            Ok(Some(Guests::of(memory(source, "tmpfs", options))))
        }
        _ => Ok(match wanted.empty_dir_mib {
            Some(size_mib) => {
                let path = source.join(VOLUME_DISK);
                let storage = storage(&path, "ext4", &["discard"], &volume_place(source), root.options());
                let (disk, empty_disk) = (Some(disk(&path, false)), Some(EmptyDisk { path, size_mib }));
                Some(Guests { disk, empty_disk, ..Guests::of(storage) })
            }
            None if wanted.copies_files => Some(Guests::of(memory(source, "tmpfs", root.options()))),
            None => None,
        }),
    }
}

/// Whose the root of a volume is, and its mode.
struct Root {
    mode: u32,
    user: u32,
    group: u32,
}

impl Root {
    fn of(found: &std::fs::Metadata) -> Self {
        use std::os::unix::fs::MetadataExt;
        Self { mode: found.mode() & 0o7777, user: found.uid(), group: found.gid() }
    }

    fn options(&self) -> Vec<String> {
        vec![format!("mode={:o}", self.mode), format!("uid={}", self.user), format!("gid={}", self.group)]
    }
}

fn memory(source: &Path, kind: &str, options: Vec<String>) -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: kind.into(),
        fstype: kind.into(),
        options,
        mount_point: volume_place(source),
        ..Default::default()
    }
}

/// Where a volume that the guest has by itself is there: in one place for all containers of the pod.
#[must_use]
pub fn volume_place(source: &Path) -> String {
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
    // Kata's Go runtime has the first word, its Rust one the second, for the same.
    if !matches!(info.volume_type.as_str(), "block" | "directvol") {
        return Err(invalid(format!(
            "the type {:?} is not supported: \"block\" and \"directvol\" are",
            info.volume_type
        )));
    }
    if !info.device.is_absolute() {
        return Err(invalid(format!("the device {} has no absolute path", info.device.display())));
    }
    let is_readonly = info.options.iter().any(|option| option == "ro");
    let options: Vec<&str> = info.options.iter().map(String::as_str).collect();
    let place = volume_place(Path::new(&mount.source));
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
    // The guest is not to be trusted with what the container may not do.
    let read_only = !may(device, rules, 'w');
    let told = agent::Device {
        type_: "blk".into(),
        vm_path: guest_name(&path),
        container_path: device.Path.clone(),
        ..Default::default()
    };
    Ok((disk(&path, read_only), told))
}

/// The disk that a bind mount of a block device shows, and its name in the guest; `None` for any other mount. It is a device file of the
/// host's own: a guest can make one of any number where the host shares a folder with it.
///
/// # Errors
/// As [`raw`]; [`Error::Unsupported`] where no rule for devices opens it, as for a container that is not privileged.
pub(crate) fn mounted_disk(
    mount: &oci::Mount,
    rules: &[oci::LinuxDeviceCgroup],
) -> Result<Option<(Device, String)>, Error> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let source = Path::new(&mount.source);
    // A link of somebody's is not followed to a disk.
    let found = std::fs::symlink_metadata(source).ok().filter(|found| found.file_type().is_block_device());
    let Some(found) = found.filter(|_| source.starts_with("/dev")) else { return Ok(None) };
    let device = oci::LinuxDevice {
        Path: mount.source.clone(),
        Type: "b".into(),
        Major: rustix::fs::major(found.rdev()).into(),
        Minor: rustix::fs::minor(found.rdev()).into(),
        ..Default::default()
    };
    let (disk, told) = raw(&device, rules)?;
    if disk.path() != Some(source) {
        return Ok(None);
    }
    if !may(&device, rules, 'r') {
        let destination = mount.destination.clone().into();
        return Err(Error::Unsupported { destination, kind: "block device that the container may not open".into() });
    }
    Ok(Some((disk, told.vm_path)))
}

/// Whether a container's rules let it do that to a device: the last one that says anything of it counts, and without one it is closed.
fn may(device: &oci::LinuxDevice, rules: &[oci::LinuxDeviceCgroup], access: char) -> bool {
    let fits = |own: i64, rule: Option<i64>| rule.is_none_or(|number| number < 0 || number == own);
    let is_about = |rule: &&oci::LinuxDeviceCgroup| {
        matches!(rule.Type.as_str(), "b" | "a" | "") && fits(device.Major, rule.Major) && fits(device.Minor, rule.Minor)
    };
    let about_it = |rule: &&oci::LinuxDeviceCgroup| rule.Access.is_empty() || rule.Access.contains(access);
    rules.iter().rev().filter(is_about).find(about_it).is_some_and(|rule| rule.Allow)
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
            matches!(of(&empty, &sealed).unwrap(), Some(Volume::Guests(volume)) if volume.storages[0].fstype == "tmpfs")
        );
        // A part of it is that part of the guest's; here nothing is mounted, and that is said.
        let pod_folder = pod.path().join("volume-subpaths/name/c/0");
        std::fs::create_dir_all(&pod_folder).unwrap();
        assert!(of(&bind(&pod_folder), none).unwrap().is_none());
        assert!(of(&bind(&pod_folder), &sealed).unwrap_err().to_string().contains("nothing is mounted"));
        let table = "36 35 0:44 / /v rw - tmpfs t rw\n37 35 0:44 /a\\040b /p/x rw - tmpfs t rw\n";
        let part = mount_of(table.as_bytes(), Path::new("/p/x")).unwrap();
        assert_eq!(inside(table.as_bytes(), Path::new("/v"), &part).as_deref(), Some("a b"));
        assert_eq!(mount_of(table.as_bytes(), Path::new("/p")), None);
    }

    #[test]
    fn an_empty_dir_is_a_disk_where_that_is_wanted() {
        let pod = tempfile::tempdir().unwrap();
        let (whole, part) =
            (pod.path().join("volumes/kubernetes.io~empty-dir/v"), pod.path().join("volume-subpaths/v/c/0"));
        std::fs::create_dir_all(&whole).unwrap();
        std::fs::create_dir_all(&part).unwrap();
        let wanted = &Wanted { empty_dir_mib: Some(64), direct_volumes: "/nowhere".into(), ..Wanted::default() };
        let Some(Volume::Guests(volume)) = of(&bind(&whole), wanted).unwrap() else { panic!("no disk") };
        let disk = EmptyDisk { path: whole.join("coracle.ext4"), size_mib: 64 };
        assert_eq!(volume.disk.as_ref().and_then(Device::path), Some(&*disk.path));
        assert_eq!((volume.empty_disk, volume.place.as_str()), (Some(disk), volume.storages[0].mount_point.as_str()));
        assert!(volume.storages[0].driver_options.iter().any(|option| option.starts_with("mode=")));
        // What is not mounted there is no part of anything.
        assert!(of(&bind(&part), wanted).unwrap_err().to_string().contains("nothing is mounted"));
        let whole = Path::new("/var/lib/kubelet/v");
        let table = "1 0 8:1 / / rw - ext4 d rw\n2 1 8:2 /sub /var/lib rw - ext4 e rw\n3 2 8:3 / /var/lib/kubelet/v/x rw - ext4 f rw\n";
        for (device, inner, expected) in [
            ("8:2", "/sub/kubelet/v/a/b", Some("a/b")),
            ("8:2", "/sub/kubelet/v", Some("")),
            ("8:2", "/sub/kubelet/vv", None),
            ("8:2", "/var/lib/kubelet/v/a", None),
            // The same path of another file system.
            ("8:1", "/sub/kubelet/v/a/b", None),
        ] {
            let part = Mounted { device: device.into(), root: inner.into(), point: part.clone() };
            assert_eq!(inside(table.as_bytes(), whole, &part).as_deref(), expected, "{device} {inner}");
        }
    }

    #[test]
    fn whatever_is_mounted_a_part_of_a_volume_stays_inside_it() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut number = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut count = 0;
        for _ in 0..20_000 {
            let mut path = |most: u64| -> String {
                let parts = (0..number(most)).map(|_| ["a", "b", "ab", "v"][usize::try_from(number(4)).unwrap()]);
                format!("/{}", parts.collect::<Vec<_>>().join("/"))
            };
            let lines: Vec<String> =
                (0..4).map(|at| format!("{at} 0 8:{} {} {} rw - ext4 d rw", at % 2, path(4), path(4))).collect();
            let (whole, root) = (PathBuf::from(path(5)), path(6));
            let table = format!("9 0 8:0 / / rw - ext4 d rw\n{}\n", lines.join("\n"));
            let part = Mounted { device: "8:0".into(), root, point: "/p".into() };
            let Some(found) = inside(table.as_bytes(), &whole, &part) else { continue };
            // A mount that the volume's folder is on shows, below that folder, what was found.
            let shows = |mount: &Mounted| {
                let rest = whole.strip_prefix(&mount.point).ok()?;
                Some(
                    mount.device == part.device
                        && Path::new(&mount.root).join(rest).join(&found) == Path::new(&part.root),
                )
            };
            assert!(
                mounts(table.as_bytes()).iter().any(|mount| shows(mount) == Some(true)),
                "{table}{}: {found}",
                part.root
            );
            count += 1;
        }
        assert!(count > 100, "{count} parts were found");
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
        let Some(Volume::Guests(volume)) = described(text).unwrap() else { panic!("no disk") };
        assert!(
            matches!(&volume.disk, Some(Device::Block { path, read_only: true, .. }) if path == Path::new("/dev/sdf"))
        );
        assert_eq!(volume.empty_disk, None);
        // As Kata's other runtime has it.
        let other = described(&text.replace("\"block\"", "\"directvol\"")).unwrap();
        assert!(matches!(other, Some(Volume::Guests(other)) if other.storages == volume.storages));
        let storage = &volume.storages[0];
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

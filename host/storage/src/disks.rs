//! A container's root made of disks: read-only layers, one that is written to, and an overlay of them in the guest. Nothing of the
//! host is shared for it.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use coracle_machine::Device;
use coracle_protocol::agent::Storage;
use coracle_protocol::paths;
use sha2::{Digest, Sha256};

use crate::{Error, HostMount};

/// By which the guest finds a disk, after its serial number.
const BY_SERIAL: &str = "/dev/disk/by-id/virtio-";

/// Options of mount(8) for a verified file system; the guest needs them, the kernel's mount does not.
const VERITY: &str = "verity.";

/// Overlayfs' option for an upper folder whose contents are not to outlive the mount.
pub(crate) const VOLATILE: &str = "volatile";

/// What such a root needs.
#[derive(Debug, Clone, PartialEq)]
pub struct RootDisks {
    /// The disks.
    pub devices: Vec<Device>,
    /// The files of those that are layers, and that nothing verifies: a machine may have them as memory.
    pub layers: Vec<PathBuf>,
    /// What the guest makes of them, in order.
    pub storages: Vec<Storage>,
    /// The root's path in the guest.
    pub guest_root: String,
}

/// Plans the root of the container `id`, where `rootfs` is made of disks. It is one file system of the type `ext4` (containerd's
/// snapshotters `blockfile` and `devmapper`); or mounts of the type `erofs`, the topmost layer first, one of the type `ext4` to
/// write to, and the `overlay` of them all, whose options name what is before it (containerd's mount templates). `None` where it is
/// anything else.
///
/// # Errors
/// [`Error::Invalid`] for layers with more, or too little.
pub fn root_disks(id: &str, rootfs: &[HostMount]) -> Result<Option<RootDisks>, Error> {
    let of = |kind: &'static str| rootfs.iter().filter(move |mount| mount.kind == kind);
    if let [whole] = rootfs
        && whole.kind == "ext4"
    {
        return Ok(Some(one_disk(id, whole)));
    }
    if of("erofs").next().is_none() || of("ext4").next().is_none() {
        return Ok(None);
    }
    let overlays = rootfs.iter().filter(|mount| mount.kind == "overlay" || mount.kind.ends_with("/overlay"));
    let (count, writable) = (of("erofs").count(), of("ext4").count());
    if writable != 1 || overlays.count() != 1 || rootfs.len() != count + 2 {
        return Err(Error::Invalid(
            "a root of disks has layers of EROFS, one disk of ext4 and one overlay, and nothing else".into(),
        ));
    }
    let folder = format!("{}/{id}", paths::STATE);
    let (mut devices, mut layers, mut storages, mut lower) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (number, layer) in of("erofs").enumerate() {
        let place = format!("{folder}/layers/{number}");
        let verity: Vec<_> = layer.options.iter().filter(|option| option.starts_with(VERITY)).cloned().collect();
        layers.extend(verity.is_empty().then(|| layer.source.clone()));
        devices.push(disk(&layer.source, true));
        storages.push(storage(&layer.source, "erofs", &["ro"], &place, verity));
        lower.push(place);
    }
    let writable = format!("{folder}/writable");
    // What overlayfs calls so: nobody reads it again, and nothing waits for the disk.
    let is_volatile = rootfs.iter().any(|mount| mount.options.iter().any(|option| option == VOLATILE));
    let volatile = is_volatile.then(|| VOLATILE.to_owned());
    for mount in of("ext4") {
        devices.push(disk(&mount.source, false));
        // What is deleted is free again on the host.
        storages.push(storage(&mount.source, "ext4", &["discard"], &writable, volatile.iter().cloned().collect()));
    }
    let guest_root = format!("{folder}/rootfs");
    storages.push(Storage {
        driver: "overlayfs".into(),
        source: "overlay".into(),
        fstype: "overlay".into(),
        options: [
            format!("lowerdir={}", lower.join(":")),
            format!("upperdir={writable}/upper"),
            format!("workdir={writable}/work"),
        ]
        .into_iter()
        .chain(volatile)
        .collect(),
        mount_point: guest_root.clone(),
        ..Default::default()
    });
    Ok(Some(RootDisks { devices, layers, storages, guest_root }))
}

/// A root that is one file system.
fn one_disk(id: &str, mount: &HostMount) -> RootDisks {
    let guest_root = format!("{}/{id}/rootfs", paths::STATE);
    let read_only = mount.options.iter().any(|option| option == "ro");
    // How the host would have to mount it is not the guest's.
    let options = mount.options.iter().map(String::as_str).filter(|option| !matches!(*option, "loop" | "rw"));
    let options: Vec<&str> = options.collect();
    RootDisks {
        devices: vec![disk(&mount.source, read_only)],
        layers: Vec::new(),
        storages: vec![storage(&mount.source, "ext4", &options, &guest_root, Vec::new())],
        guest_root,
    }
}

/// A disk's serial number: 20 hexadecimal digits that stand for its path on the host, so that one disk has one, whoever uses it.
#[must_use]
pub fn serial(path: &Path) -> String {
    let mut text = hex::encode(Sha256::digest(path.as_os_str().as_bytes()));
    text.truncate(SERIAL_BYTES);
    text
}

/// The bytes of a virtio disk's serial number (virtio 1.3, 5.2.6, `VIRTIO_BLK_T_GET_ID`).
const SERIAL_BYTES: usize = 20;

pub(crate) fn disk(path: &Path, read_only: bool) -> Device {
    Device::Block { path: path.to_owned(), read_only, direct: false, serial: serial(path) }
}

/// The name in the guest of the disk that a file of the host's is.
#[must_use]
pub fn guest_name(path: &Path) -> String {
    format!("{BY_SERIAL}{}", serial(path))
}

/// Has the guest read a layer as memory of its machine's, which it has at this place on its PCI bus, and keep no copy of it.
pub fn read_as_memory(storages: &mut [Storage], layer: &Path, place: &str) {
    let name = guest_name(layer);
    for storage in storages.iter_mut().filter(|storage| storage.driver == "blk" && storage.source == name) {
        (storage.driver, storage.source) = ("nvdimm".into(), place.into());
        storage.options.push("dax=always".into());
    }
}

pub(crate) fn storage(
    path: &Path,
    fstype: &str,
    options: &[&str],
    place: &str,
    driver_options: Vec<String>,
) -> Storage {
    Storage {
        driver: "blk".into(),
        driver_options,
        source: guest_name(path),
        fstype: fstype.into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        mount_point: place.into(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> HostMount {
        HostMount {
            kind: kind.into(),
            source: source.into(),
            target: "".into(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            owners: None,
        }
    }

    #[test]
    fn layers_become_disks_with_the_topmost_first() {
        let rootfs = [
            mount("erofs", "/i/top.erofs", &["ro", "loop", "verity.roothash=ab", "verity.hashoffset=8192"]),
            mount("erofs", "/i/base.erofs", &["ro", "loop"]),
            mount("ext4", "/c/writable.ext4", &["rw", "loop"]),
            mount("format/mkdir/overlay", "overlay", &["lowerdir={{ overlay 0 1 }}"]),
        ];
        let plan = root_disks("c1", &rootfs).unwrap().unwrap();
        let disks: Vec<_> = plan
            .devices
            .iter()
            .zip(&plan.storages)
            .map(|(device, storage)| match device {
                Device::Block { serial, read_only, path, .. } => {
                    assert_eq!(storage.source, format!("{BY_SERIAL}{serial}"));
                    assert_eq!(serial.len(), SERIAL_BYTES);
                    (path.to_str().unwrap(), *read_only)
                }
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(disks, [("/i/top.erofs", true), ("/i/base.erofs", true), ("/c/writable.ext4", false)]);
        assert_eq!(plan.storages[0].driver_options, ["verity.roothash=ab", "verity.hashoffset=8192"]);
        assert!(plan.storages[1].driver_options.is_empty());
        assert_eq!(plan.layers, [Path::new("/i/base.erofs")], "what is verified is read by blocks");
        let mut as_memory = plan.storages.clone();
        read_as_memory(&mut as_memory, &plan.layers[0], "04");
        assert_eq!((as_memory[1].driver.as_str(), as_memory[1].source.as_str()), ("nvdimm", "04"));
        assert_eq!(as_memory[1].options, ["ro", "dax=always"]);
        assert_eq!((&as_memory[0], &as_memory[2..]), (&plan.storages[0], &plan.storages[2..]));
        let overlay = plan.storages.last().unwrap();
        assert!(overlay.options.len() == 3 && plan.storages[2].driver_options.is_empty(), "what was written is kept");
        let mut rootfs = rootfs;
        rootfs[3].options.push("volatile".into());
        let passing = root_disks("c1", &rootfs).unwrap().unwrap();
        assert_eq!(
            (passing.storages[2].driver_options[0].as_str(), passing.storages[3].options[3].as_str()),
            (VOLATILE, VOLATILE)
        );
        let layers = "/run/kata-containers/c1/layers";
        assert_eq!(overlay.options[0], format!("lowerdir={layers}/0:{layers}/1"));
        assert_eq!(
            (overlay.mount_point.as_str(), plan.guest_root.as_str()),
            (plan.guest_root.as_str(), "/run/kata-containers/c1/rootfs")
        );
    }

    #[test]
    fn one_file_system_is_one_disk() {
        let plan = |options: &[&str]| root_disks("c", &[mount("ext4", "/dev/mapper/x", options)]).unwrap().unwrap();
        let whole = plan(&["loop", "rw", "discard"]);
        assert!(matches!(&whole.devices[..], [Device::Block { read_only: false, path, .. }] if path.ends_with("x")));
        assert_eq!(whole.storages[0].options, ["discard"]);
        assert_eq!((whole.storages.len(), whole.storages[0].mount_point.as_str()), (1, whole.guest_root.as_str()));
        assert!(matches!(plan(&["ro"]).devices[0], Device::Block { read_only: true, .. }));
    }

    #[test]
    fn other_roots_are_the_hosts_to_mount() {
        let overlay = || mount("overlay", "overlay", &["lowerdir=/a"]);
        for rootfs in
            [vec![], vec![overlay()], vec![mount("erofs", "/a", &["ro"])], vec![mount("xfs", "/dev/mapper/x", &[])]]
        {
            assert_eq!(root_disks("c", &rootfs).unwrap(), None, "{rootfs:?}");
        }
        let (layer, writable) = (|| mount("erofs", "/a", &[]), || mount("ext4", "/b", &[]));
        for rootfs in [
            vec![layer(), writable()],
            vec![layer(), writable(), writable(), overlay()],
            vec![layer(), writable(), overlay(), mount("bind", "/c", &[])],
        ] {
            assert!(matches!(root_disks("c", &rootfs), Err(Error::Invalid(_))), "{rootfs:?}");
        }
    }
}

//! Storages of the wire: what must be mounted in the guest before a container can use it.

use std::path::Path;

use coracle_protocol::agent::Storage;
use nix::mount::{MsFlags, mount};

use crate::{Config, Error, Result, SharedSource};

/// The drivers that [`attach`] knows, by their names on the wire.
pub(crate) const DRIVERS: [&str; 3] = ["ephemeral", "local", "virtio-fs"];

/// The folder below which the host may have things mounted.
const ALLOWED: &str = "/run/kata-containers";

/// Mounts one storage.
pub(crate) fn attach(config: &Config, storage: &Storage) -> Result<()> {
    let target = Path::new(&storage.mount_point);
    let inside = target.strip_prefix(ALLOWED).is_ok()
        && target.components().all(|part| !matches!(part, std::path::Component::ParentDir));
    if !inside {
        return Err(Error::Invalid(format!("{} is no place for a storage", target.display())));
    }
    match storage.driver.as_str() {
        "virtio-fs" if config.shared == SharedSource::InPlace => Ok(()),
        "virtio-fs" => mount_at(target, &storage.source, "virtiofs", storage),
        "ephemeral" if storage.fstype == "tmpfs" && config.shared == SharedSource::VirtioFs => {
            mount_at(target, "tmpfs", "tmpfs", storage)
        }
        "ephemeral" if storage.fstype == "tmpfs" => make(target),
        "local" => make(target),
        other => Err(Error::Unsupported(format!("the storage driver {other}"))),
    }
}

fn make(target: &Path) -> Result<()> {
    std::fs::create_dir_all(target).map_err(Error::system(format!("make {}", target.display())))
}

fn mount_at(target: &Path, source: &str, kind: &str, storage: &Storage) -> Result<()> {
    make(target)?;
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in &storage.options {
        match option.as_str() {
            "nodev" => flags |= MsFlags::MS_NODEV,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
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

    #[test]
    fn storages_stay_in_their_place() {
        for mount_point in ["/etc", "/run/kata-containers/../x", "relative", ""] {
            let storage = Storage { driver: "local".into(), mount_point: mount_point.into(), ..Default::default() };
            assert!(matches!(attach(&Config::guest(), &storage), Err(Error::Invalid(_))), "{mount_point}");
        }
        let storage =
            Storage { driver: "scsi".into(), mount_point: "/run/kata-containers/x".into(), ..Default::default() };
        assert!(matches!(attach(&Config::guest(), &storage), Err(Error::Unsupported(_))));
    }
}

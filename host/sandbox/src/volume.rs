//! Volumes that the guest has mounted: how full they are, and more room for those that are disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_machine::Device;
use coracle_protocol::agent::{ResizeVolumeRequest, VolumeStatsRequest};
use coracle_protocol::csi::VolumeStatsResponse;

use crate::agent::Patience;
use crate::pod::Pod;
use crate::{Error, Result, Sandbox};

/// A volume of a container: where the guest has it, and the disk that it is on.
struct Found {
    pod: Arc<Pod>,
    place: String,
    disk: Option<Device>,
}

impl Sandbox {
    /// How full the volume is whose folder on the host this is, as the guest sees it.
    ///
    /// # Errors
    /// [`Error::NotFound`] where no container of the pod has it mounted in the guest.
    pub async fn volume_stats(&self, source: &Path) -> Result<VolumeStatsResponse> {
        let Found { pod, place, .. } = self.volume(source).await?;
        let request = VolumeStatsRequest { volume_guest_path: place, ..Default::default() };
        pod.agent
            .call("GetVolumeStats", Patience::Bounded, async |agent, ctx| agent.get_volume_stats(ctx, &request).await)
            .await
    }

    /// Gives a volume that is a disk `bytes`: the disk, which a file of the host is, and then its file system, while it is used. Less than it
    /// has it can't get.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Unsupported`] for what is no disk or on a machine whose disks keep their size, [`Error::Invalid`].
    pub async fn resize_volume(&self, source: &Path, bytes: u64) -> Result<()> {
        let Found { pod, place, disk } = self.volume(source).await?;
        let Some(disk) = disk else {
            return Err(Error::Unsupported(format!(
                "the volume {} is no disk, and has no size of its own",
                source.display()
            )));
        };
        // One at a time: of two the smaller would take away what the other one has given.
        let _turn = pod.updates.lock().await;
        let path = disk.path().unwrap_or(Path::new("")).to_owned();
        let size = tokio::task::spawn_blocking(move || size(path))
            .await
            .map_err(|error| Error::Failed(error.to_string()))??;
        if bytes < size {
            return Err(Error::Invalid(format!(
                "the volume {} has {size} bytes: with {bytes} it would lose some",
                source.display()
            )));
        }
        pod.machine.resize_disk(disk, bytes).await?;
        let request = ResizeVolumeRequest { volume_guest_path: place, size: bytes, ..Default::default() };
        pod.agent
            .call("ResizeVolume", Patience::Bounded, async |agent, ctx| agent.resize_volume(ctx, &request).await)
            .await
            .map(drop)
    }

    async fn volume(&self, source: &Path) -> Result<Found> {
        let (place, missing) = (coracle_storage::volume_place(source), source.display().to_string());
        self.ask(move |state| {
            let mut containers = state.containers.values().filter_map(|container| container.storage.as_ref());
            let found = containers.find_map(|plan| {
                let storage = plan.storages.iter().find(|storage| storage.mount_point == place)?;
                let is_its = |device: &&Device| {
                    device.path().is_some_and(|path| storage.source == coracle_storage::guest_name(path))
                };
                Some(plan.devices.iter().find(is_its).cloned())
            });
            let disk = found.ok_or_else(|| Error::NotFound(format!("the volume {missing}")))?;
            Ok(Found { pod: state.up()?, place, disk })
        })
        .await?
    }
}

/// The size of a file or block device, in bytes.
fn size(path: PathBuf) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    let opened = std::fs::File::open(&path).and_then(|mut file| file.seek(SeekFrom::End(0)));
    opened.map_err(|error| Error::Failed(format!("look at {}: {error}", path.display())))
}

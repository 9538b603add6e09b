//! GetVolumeStats: how full a volume is. ResizeVolume: a file system that takes what its disk has gained.

use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use coracle_protocol::agent::{ResizeVolumeRequest, VolumeStatsRequest};
use coracle_protocol::csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage, volume_usage::Unit};
use coracle_protocol::paths;
use coracle_protocol::protobuf::MessageField;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::kernel_events::await_device;
use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result};

/// What the kernel calls the file system (linux/magic.h, `EXT4_SUPER_MAGIC`).
const EXT4_MAGIC: i64 = 0xef53;

/// `EXT4_IOC_RESIZE_FS` (linux/ext4.h): `_IOW('f', 16, __u64)`, a number of blocks.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;

/// A volume's path: below the pod's state, whatever it says.
fn allowed(path: &str) -> Result<PathBuf> {
    let path = PathBuf::from(path);
    if !path.starts_with(paths::STATE) || path.components().any(|part| part == Component::ParentDir) {
        return Err(Error::Invalid(format!("{} is no volume", path.display())));
    }
    Ok(path)
}

/// Grows the file system at a path of the pod's to so many bytes, once its disk has them.
pub(crate) async fn resize(_: &Arc<Agent>, request: ResizeVolumeRequest) -> Result<Empty> {
    let path = allowed(&request.volume_guest_path)?;
    on_thread(move || grow(&path, request.size)).await.map(|()| Empty::new())
}

fn grow(path: &Path, bytes: u64) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    let failed = || format!("look at {}", path.display());
    let found = rustix::fs::statfs(path).map_err(Error::system(failed()))?;
    if found.f_type != EXT4_MAGIC {
        return Err(Error::Unsupported(format!("growing what is no ext4, at {}", path.display())));
    }
    let device = std::fs::metadata(path).map_err(Error::system(failed()))?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let size = format!("/sys/dev/block/{major}:{minor}/size");
    // The kernel says it in sectors of 512 bytes, whatever the disk's own are.
    await_device(|| {
        let text = std::fs::read_to_string(&size).map_err(Error::system(format!("read {size}")))?;
        match text.trim().parse::<u64>() {
            Ok(sectors) if sectors.saturating_mul(512) >= bytes => Ok(()),
            _ => Err(Error::NotFound(format!("a disk of {bytes} bytes: it has {} sectors", text.trim()))),
        }
    })
    // The volume itself is there.
    .map_err(|error| match error {
        Error::NotFound(text) => Error::State(text),
        other => other,
    })?;
    let block = u64::try_from(found.f_bsize).unwrap_or(0).max(1);
    let blocks = bytes / block;
    let folder = std::fs::File::open(path).map_err(Error::system(failed()))?;
    // SAFETY: the request reads a number of eight bytes, which lives during the call.
    #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
    let result = unsafe { libc::ioctl(folder.as_raw_fd(), EXT4_IOC_RESIZE_FS, &raw const blocks) };
    if result < 0 {
        return Err(Error::system(format!("grow the file system at {}", path.display()))(
            std::io::Error::last_os_error(),
        ));
    }
    Ok(())
}

/// Bytes, then inodes, of the file system at a path of the pod's.
pub(crate) async fn stats(_: &Arc<Agent>, request: VolumeStatsRequest) -> Result<VolumeStatsResponse> {
    let path = allowed(&request.volume_guest_path)?;
    // It may be on the host, which takes its time.
    let look = move || rustix::fs::statvfs(&path).map_err(Error::system(format!("look at {}", path.display())));
    let found = on_thread(look).await?;
    let usage = |total: u64, free: u64, unit: Unit| VolumeUsage {
        available: free,
        total,
        used: total.saturating_sub(free),
        unit: unit.into(),
        ..Default::default()
    };
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Ok(VolumeStatsResponse {
        usage: vec![
            usage(bytes(found.f_blocks), bytes(found.f_bfree), Unit::BYTES),
            usage(found.f_files, found.f_ffree, Unit::INODES),
        ],
        volume_condition: MessageField::some(VolumeCondition { message: "OK".into(), ..Default::default() }),
        ..Default::default()
    })
}

//! GetVolumeStats: how full a volume is.

use std::path::Component;
use std::sync::Arc;

use coracle_protocol::agent::VolumeStatsRequest;
use coracle_protocol::csi::{VolumeCondition, VolumeStatsResponse, VolumeUsage, volume_usage::Unit};
use coracle_protocol::paths;
use coracle_protocol::protobuf::MessageField;

use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result};

/// Bytes, then inodes, of the file system at a path of the pod's.
pub(crate) async fn stats(_: &Arc<Agent>, request: VolumeStatsRequest) -> Result<VolumeStatsResponse> {
    let path = std::path::PathBuf::from(&request.volume_guest_path);
    if !path.starts_with(paths::STATE) || path.components().any(|part| part == Component::ParentDir) {
        return Err(Error::Invalid(format!("{} is no volume", path.display())));
    }
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

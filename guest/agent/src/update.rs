//! UpdateContainer: new limits for a container that lives.

use std::sync::Arc;

use coracle_protocol::agent::UpdateContainerRequest;
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use oci_spec::runtime::LinuxResources;

use crate::create::from_wire;
use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result};

/// Sets the limits that the request names.
pub(crate) async fn update(agent: &Arc<Agent>, request: UpdateContainerRequest) -> Result<Empty> {
    let container = agent.container(&request.container_id)?;
    let resources =
        request.resources.as_ref().ok_or_else(|| Error::Invalid("UpdateContainer without resources".into()))?;
    let resources: LinuxResources = from_wire(resources)?;
    let cgroup = container.cgroup.clone();
    let limit =
        resources.memory().as_ref().and_then(|memory| memory.limit()).and_then(|limit| u64::try_from(limit).ok());
    if let Some(limit) = limit.filter(|limit| *limit > 0) {
        // The kernel would take it and kill. What files take can be given back.
        let stats = cgroup.stats();
        let held = stats.memory_usage.saturating_sub(stats.memory.get("file").copied().unwrap_or(0));
        if held > limit {
            return Err(Error::State(format!(
                "a memory limit of {limit} bytes is below what container {} has in use, {held} bytes",
                container.id
            )));
        }
    }
    // Less memory than is in use is given back before the kernel answers, which may take long.
    on_thread(move || cgroup.apply(&resources)).await?;
    Ok(Empty::new())
}

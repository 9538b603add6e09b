//! UpdateContainer: new limits for a container that lives.

use std::sync::Arc;

use coracle_protocol::agent::UpdateContainerRequest;
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use oci_spec::runtime::LinuxResources;

use crate::create::from_wire;
use crate::state::Agent;
use crate::{Error, Result};

/// Sets the limits that the request names.
pub(crate) async fn update(agent: &Arc<Agent>, request: UpdateContainerRequest) -> Result<Empty> {
    let container = agent.container(&request.container_id)?;
    let resources =
        request.resources.as_ref().ok_or_else(|| Error::Invalid("UpdateContainer without resources".into()))?;
    let resources: LinuxResources = from_wire(resources)?;
    let cgroup = container.cgroup.clone();
    // Less memory than is in use is given back before the kernel answers, which may take long.
    tokio::task::spawn_blocking(move || cgroup.apply(&resources))
        .await
        .map_err(|error| Error::State(error.to_string()))??;
    Ok(Empty::new())
}

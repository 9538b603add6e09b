//! StartContainer: lets the first process exec.

use std::sync::Arc;

use coracle_protocol::agent::StartContainerRequest;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::Result;
use crate::state::Agent;

/// Starts the container.
pub(crate) async fn start(agent: &Arc<Agent>, request: StartContainerRequest) -> Result<Empty> {
    agent.container(&request.container_id)?.init.start().await?;
    Ok(Empty::new())
}

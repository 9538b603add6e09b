//! StartContainer: lets the first process exec.

use std::sync::Arc;

use coracle_protocol::agent::StartContainerRequest;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::Result;
use crate::hooks::Point;
use crate::state::Agent;

/// Starts the container.
pub(crate) async fn start(agent: &Arc<Agent>, request: StartContainerRequest) -> Result<Empty> {
    let container = agent.container(&request.container_id)?;
    container.init.start().await?;
    // The process runs by now; a hook that fails can't undo that.
    if let Err(error) = agent.hooks(Point::Poststart, &container.id, container.pid, &container.root).await {
        println!("coracle-agent: {error}");
    }
    Ok(Empty::new())
}

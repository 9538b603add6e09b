//! PauseContainer and ResumeContainer.

use std::sync::Arc;

use coracle_protocol::agent::{PauseContainerRequest, ResumeContainerRequest};
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::Result;
use crate::state::Agent;
use crate::thread::on_thread;

/// Stops all tasks of the container.
pub(crate) async fn pause(agent: &Arc<Agent>, request: PauseContainerRequest) -> Result<Empty> {
    set(agent, &request.container_id, true).await
}

/// Lets them go on.
pub(crate) async fn resume(agent: &Arc<Agent>, request: ResumeContainerRequest) -> Result<Empty> {
    set(agent, &request.container_id, false).await
}

async fn set(agent: &Arc<Agent>, id: &str, frozen: bool) -> Result<Empty> {
    let cgroup = agent.container(id)?.cgroup.clone();
    // The engine waits for the kernel's word.
    on_thread(move || if frozen { cgroup.freeze() } else { cgroup.thaw() }).await?;
    Ok(Empty::new())
}

//! WaitProcess: answers when the process has ended.

use std::sync::Arc;

use coracle_protocol::agent::{WaitProcessRequest, WaitProcessResponse};

use crate::Result;
use crate::state::Agent;

/// Waits for the exit status: the code, or 128 and the signal that ended the process.
pub(crate) async fn wait(agent: &Arc<Agent>, request: WaitProcessRequest) -> Result<WaitProcessResponse> {
    let process = agent.process(&request.container_id, &request.exec_id)?;
    let status = process.wait().await;
    process.set_waited();
    if !request.exec_id.is_empty() {
        agent.container(&request.container_id)?.forget_exec(&request.exec_id);
    }
    Ok(WaitProcessResponse { status, ..Default::default() })
}

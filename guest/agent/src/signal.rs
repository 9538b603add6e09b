//! SignalProcess. An empty exec_id names the container's first process; when that one is killed, the kernel kills all
//! others of its pid namespace.

use std::sync::Arc;

use coracle_protocol::agent::SignalProcessRequest;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::state::Agent;
use crate::{Error, Result};

/// Sends the signal.
pub(crate) async fn signal(agent: &Arc<Agent>, request: SignalProcessRequest) -> Result<Empty> {
    let number = i32::try_from(request.signal).map_err(|_| Error::Invalid("no such signal".into()))?;
    agent.process(&request.container_id, &request.exec_id)?.signal(number)?;
    Ok(Empty::new())
}

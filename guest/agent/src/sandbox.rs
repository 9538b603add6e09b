//! CreateSandbox and DestroySandbox: what all containers of the pod share.

use std::sync::Arc;

use coracle_protocol::agent::{CreateSandboxRequest, DestroySandboxRequest};
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::state::Agent;
use crate::{Error, Result, remove, storage};

/// Sets the pod up.
pub(crate) async fn create(agent: &Arc<Agent>, request: CreateSandboxRequest) -> Result<Empty> {
    for (asked, name) in [
        (!request.guest_hook_path.is_empty(), "a guest hook path"),
        (!request.kernel_modules.is_empty(), "a kernel module of the sandbox"),
        (!request.dns.is_empty(), "DNS of the sandbox"),
    ] {
        if asked {
            return Err(Error::Unsupported(name.into()));
        }
    }
    if request.sandbox_pidns {
        agent.pause().await?;
    }
    if !request.hostname.is_empty() {
        std::fs::write("/proc/sys/kernel/hostname", &request.hostname).map_err(Error::system("set the host name"))?;
    }
    for wanted in &request.storages {
        storage::attach(&agent.config, wanted)?;
    }
    Ok(Empty::new())
}

/// Ends all containers.
pub(crate) async fn destroy(agent: &Arc<Agent>, _: DestroySandboxRequest) -> Result<Empty> {
    for container in agent.all() {
        remove::destroy(&container).await?;
        agent.forget(&container.id);
    }
    Ok(Empty::new())
}

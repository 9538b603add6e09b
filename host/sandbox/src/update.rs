//! Update: new limits for a container.

use std::sync::Arc;

use coracle_protocol::agent::UpdateContainerRequest;
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_protocol::oci;
use coracle_protocol::protobuf::MessageField;

use crate::agent::Patience;
use crate::pod::Pod;
use crate::to_its_end::to_its_end;
use crate::{Result, Sandbox, size, spec, swap};

impl Sandbox {
    /// Sets the limits that `resources` names. The machine grows first, or shrinks afterwards, where it can.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more than the machine can have; what the agent says. Then the limits are as they were.
    pub async fn update(&self, container: &str, resources: oci::LinuxResources) -> Result<()> {
        let pod = self.running(container).await?;
        let (sandbox, container) = (self.clone(), container.to_owned());
        to_its_end(async move { update(&sandbox, &pod, container, resources).await }).await
    }
}

async fn update(
    sandbox: &Sandbox,
    pod: &Arc<Pod>,
    container: String,
    mut resources: oci::LinuxResources,
) -> Result<()> {
    size::check_host_cpus(&resources)?;
    let _turn = pod.updates.lock().await;
    let name = container.clone();
    let before = sandbox.ask(move |state| state.container(&name).map(|container| container.limits.clone())).await??;
    let after = before.changed(&resources);
    if after != before {
        let proposed = (container.clone(), after.clone());
        size::check(sandbox, pod, proposed.clone()).await?;
        size::grow(sandbox, pod, Some(proposed)).await?;
    }
    if after.swap_bytes() > 0 {
        swap::allow(Some(&mut resources), after.swap_bytes());
    }
    spec::for_guest_resources(&mut resources);
    let request = UpdateContainerRequest {
        container_id: container.clone(),
        resources: MessageField::some(resources),
        ..Default::default()
    };
    let call = async |agent: &AgentServiceClient, ctx| agent.update_container(ctx, &request).await;
    let outcome = pod.agent.call("UpdateContainer", Patience::Bounded, call).await.map(drop);
    let is_changed = after != before;
    if is_changed {
        if outcome.is_ok() {
            // One that is gone meanwhile has no limits.
            sandbox.tell(move |state| drop(state.container(&container).map(|container| container.limits = after)));
        }
        size::fit(sandbox, pod);
    }
    outcome
}

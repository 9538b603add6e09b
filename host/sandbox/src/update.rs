//! Update: new limits for a container.

use coracle_protocol::agent::UpdateContainerRequest;
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_protocol::oci;
use coracle_protocol::protobuf::MessageField;

use crate::agent::Patience;
use crate::{Error, Result, Sandbox, size, spec};

impl Sandbox {
    /// Sets the limits that `resources` names. The machine grows first, or shrinks afterwards, where it can.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more than the machine can have; what the agent says. Then the limits are as they were.
    pub async fn update(&self, container: &str, mut resources: oci::LinuxResources) -> Result<()> {
        let pod = self.running(container).await?;
        let (name, new) = (container.to_owned(), resources.clone());
        let before = self
            .ask(move |state| {
                let limits = &mut state.container(&name)?.limits;
                let changed = limits.changed(&new);
                Ok::<_, Error>(std::mem::replace(limits, changed))
            })
            .await??;
        let updated = async {
            size::check(self, &pod).await?;
            size::grow(self, &pod).await?;
            spec::for_guest_resources(&mut resources);
            let request = UpdateContainerRequest {
                container_id: container.to_owned(),
                resources: MessageField::some(resources),
                ..Default::default()
            };
            let update = async |agent: &AgentServiceClient, ctx| agent.update_container(ctx, &request).await;
            pod.agent.call("UpdateContainer", Patience::Bounded, update).await
        };
        let outcome = updated.await.map(drop);
        if outcome.is_err() {
            let name = container.to_owned();
            // One that is gone meanwhile has no limits.
            self.tell(move |state| drop(state.container(&name).map(|container| container.limits = before)));
        }
        if let Err(error) = size::fit(self, &pod).await {
            log::warn!("the pod's machine keeps its size: {error}");
        }
        outcome
    }
}

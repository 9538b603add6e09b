//! Update: new limits for a container.

use coracle_protocol::agent::UpdateContainerRequest;
use coracle_protocol::oci;
use coracle_protocol::protobuf::MessageField;

use crate::agent::Patience;
use crate::{Result, Sandbox, spec};

impl Sandbox {
    /// Sets the limits that `resources` names, within the machine's size.
    ///
    /// # Errors
    /// What the agent says.
    pub async fn update(&self, container: &str, mut resources: oci::LinuxResources) -> Result<()> {
        let pod = self.running(container).await?;
        spec::for_guest_resources(&mut resources);
        let request = UpdateContainerRequest {
            container_id: container.to_owned(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        pod.agent
            .call("UpdateContainer", Patience::Bounded, async |agent, ctx| agent.update_container(ctx, &request).await)
            .await
            .map(drop)
    }
}

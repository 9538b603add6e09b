//! Pause and resume of a container.

use coracle_protocol::agent::{PauseContainerRequest, ResumeContainerRequest};

use crate::agent::Patience;
use crate::state::Status;
use crate::{Error, Result, Sandbox};

impl Sandbox {
    /// Stops all tasks of a container.
    ///
    /// # Errors
    /// [`Error::State`] for one that does not run.
    pub async fn pause(&self, container: &str) -> Result<()> {
        let pod = self.running(container).await?;
        let request = PauseContainerRequest { container_id: container.to_owned(), ..Default::default() };
        pod.agent
            .call("PauseContainer", Patience::Bounded, async |agent, ctx| agent.pause_container(ctx, &request).await)
            .await?;
        self.set_paused(container, true).await
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// [`Error::State`] for one that does not run.
    pub async fn resume(&self, container: &str) -> Result<()> {
        let pod = self.running(container).await?;
        let request = ResumeContainerRequest { container_id: container.to_owned(), ..Default::default() };
        pod.agent
            .call("ResumeContainer", Patience::Bounded, async |agent, ctx| agent.resume_container(ctx, &request).await)
            .await?;
        self.set_paused(container, false).await
    }

    async fn set_paused(&self, container: &str, paused: bool) -> Result<()> {
        let id = container.to_owned();
        self.ask(move |state| state.container(&id).map(|container| container.paused = paused)).await?
    }

    pub(crate) async fn running(&self, container: &str) -> Result<std::sync::Arc<crate::pod::Pod>> {
        let id = container.to_owned();
        self.ask(move |state| {
            let container = state.container(&id)?;
            if container.is_pod {
                return Err(Error::Unsupported(format!("container {id} is the pod itself: that")));
            }
            if container.init.status != Status::Running {
                return Err(Error::State(format!("container {id} does not run")));
            }
            state.up()
        })
        .await?
    }
}

//! Stats.

use std::sync::Arc;

use coracle_protocol::agent::{StatsContainerRequest, StatsContainerResponse};

use crate::agent::Patience;
use crate::bounded::bounded;
use crate::pod::Pod;
use crate::{Error, Result, Sandbox};

impl Sandbox {
    /// What a container has used, as the agent says.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::State`] for a container that is being created.
    pub async fn stats(&self, container: &str) -> Result<StatsContainerResponse> {
        let id = container.to_owned();
        let pod = self
            .ask(move |state| {
                let container = state.container(&id)?;
                if container.creating.is_some() {
                    return Err(Error::State(format!("container {id} is being created")));
                }
                let is_pod = container.is_pod;
                state.up().map(|pod| (!is_pod).then_some(pod))
            })
            .await??;
        // What stands for the pod uses nothing of its own.
        let Some(pod) = pod else { return Ok(StatsContainerResponse::new()) };
        let sandbox = self.clone();
        let name = container.to_owned();
        let fresh = bounded(async move { read(&sandbox, &pod, name).await }).await;
        if let Some(answer) = fresh {
            return answer;
        }
        // Slower than the caller may be kept: the figures of the last time are the answer, where there are any.
        let id = container.to_owned();
        let known = self.ask(move |state| state.container(&id).map(|container| container.stats.clone())).await??;
        known.ok_or_else(|| Error::Timeout("the agent has not answered yet: ask again".into()))
    }

    /// What each container has used. One that is being made or removed uses nothing worth counting, and is left out.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub async fn stats_of_all(&self) -> Result<Vec<(String, StatsContainerResponse)>> {
        let mut all = Vec::new();
        for container in self.containers().await? {
            if let Ok(stats) = self.stats(&container).await {
                all.push((container, stats));
            }
        }
        Ok(all)
    }

    /// Reads a container's figures in the background, so that there are some.
    pub(crate) fn prefetch_stats(&self, pod: &Arc<Pod>, container: &str) {
        let (sandbox, pod, id) = (self.clone(), Arc::clone(pod), container.to_owned());
        tokio::spawn(async move {
            // A failure shows when somebody asks.
            let _ = read(&sandbox, &pod, id).await;
        });
    }
}

async fn read(sandbox: &Sandbox, pod: &Arc<Pod>, id: String) -> Result<StatsContainerResponse> {
    let request = StatsContainerRequest { container_id: id.clone(), ..Default::default() };
    let stats = pod
        .agent
        .call("StatsContainer", Patience::Bounded, async |agent, ctx| agent.stats_container(ctx, &request).await)
        .await?;
    let known = stats.clone();
    sandbox.tell(move |state| {
        if let Ok(container) = state.container(&id) {
            container.stats = Some(known);
        }
    });
    Ok(stats)
}

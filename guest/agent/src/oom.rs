//! GetOOMEvent: a long poll that is answered with the name of a container in which the kernel has killed for memory.

use std::sync::Arc;

use coracle_container::cgroup::Cgroup;
use coracle_protocol::agent::{GetOOMEventRequest, OOMEvent};
use tokio::io::Interest;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::process::watched;
use crate::state::Agent;
use crate::{Error, Result};

/// Answers with the next event.
pub(crate) async fn next(agent: &Arc<Agent>, _: GetOOMEventRequest) -> Result<OOMEvent> {
    let mut events = agent.oom_events.lock().await;
    let container_id = events.recv().await.ok_or_else(|| Error::State("the agent is ending".into()))?;
    Ok(OOMEvent { container_id, ..Default::default() })
}

/// Watches a cgroup until the task is aborted. Without a memory controller there is nothing to watch.
pub(crate) fn watch(cgroup: &Cgroup, id: String, events: mpsc::UnboundedSender<String>) -> Option<AbortHandle> {
    let file = cgroup.oom_events().ok()?;
    let file = watched(file.into(), Interest::PRIORITY).ok()?;
    let cgroup = cgroup.clone();
    let task = tokio::spawn(async move {
        let mut seen = cgroup.oom_kills();
        loop {
            let Ok(mut ready) = file.ready(Interest::PRIORITY).await else { return };
            ready.clear_ready();
            let now = cgroup.oom_kills();
            if now > seen && events.send(id.clone()).is_err() {
                return;
            }
            seen = now;
        }
    });
    Some(task.abort_handle())
}

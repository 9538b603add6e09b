//! GetOOMEvent: a long poll that is answered with the name of a container in which the kernel has killed for memory.

use std::sync::Arc;

use coracle_container::cgroup::Cgroup;
use coracle_protocol::agent::{GetOOMEventRequest, OOMEvent};
use tokio::io::Interest;
use tokio::sync::mpsc;

use crate::process::watched;
use crate::state::Agent;
use crate::{Error, Result};

/// Answers with the next event.
pub(crate) async fn next(agent: &Arc<Agent>, _: GetOOMEventRequest) -> Result<OOMEvent> {
    let mut events = agent.oom_events.lock().await;
    let container_id = events.recv().await.ok_or_else(|| Error::State("the agent is ending".into()))?;
    Ok(OOMEvent { container_id, ..Default::default() })
}

/// Watches a cgroup for as long as it is there. Without a memory controller there is nothing to watch.
pub(crate) fn watch(cgroup: &Cgroup, id: String, events: mpsc::UnboundedSender<String>) {
    let Ok(file) = cgroup.oom_events() else { return };
    let Ok(file) = watched(file.into(), Interest::PRIORITY) else { return };
    let cgroup = cgroup.clone();
    tokio::spawn(async move {
        let mut seen = cgroup.oom_kills();
        while cgroup.path().exists() {
            let Ok(mut ready) = file.ready(Interest::PRIORITY).await else { return };
            ready.clear_ready();
            let now = cgroup.oom_kills();
            if now > seen && events.send(id.clone()).is_err() {
                return;
            }
            seen = now;
        }
    });
}

//! RemoveContainer: kills what still runs, then leaves nothing.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use coracle_faults as faults;
use coracle_protocol::agent::RemoveContainerRequest;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::hooks::Point;
use crate::state::{Agent, Container};
use crate::thread::on_thread;
use crate::{Error, Result, storage};

/// Removes the container. A `timeout` of 0 seconds waits for as long as it takes.
pub(crate) async fn remove(agent: &Arc<Agent>, request: RemoveContainerRequest) -> Result<Empty> {
    let container = agent.container(&request.container_id)?;
    let removal = destroy(agent, &container);
    if request.timeout == 0 {
        removal.await?;
    } else {
        tokio::time::timeout(Duration::from_secs(request.timeout.into()), removal)
            .await
            .map_err(|_| Error::State(format!("container {} did not end in {} s", container.id, request.timeout)))??;
    }
    agent.forget(&container.id);
    let agent = Arc::clone(agent);
    // Beside the answer: a hook that takes its time must not be taken for a container that can't be removed.
    tokio::spawn(async move {
        if let Err(error) = agent.hooks(Point::Poststop, &container.id, 0, &container.root).await {
            println!("coracle-agent: {error}");
        }
    });
    Ok(Empty::new())
}

/// Ends the container's processes, removes its cgroup, and lets go of its mounts and storages.
pub(crate) async fn destroy(agent: &Arc<Agent>, container: &Arc<Container>) -> Result<()> {
    let cgroup = container.cgroup.clone();
    cgroup.kill()?;
    for process in container.processes() {
        process.wait().await;
    }
    faults::at("guest.remove.processes").await?;
    let mounts = container.mounts.lock().unwrap_or_else(PoisonError::into_inner).take();
    let (agent, container) = (Arc::clone(agent), Arc::clone(container));
    on_thread(move || {
        let removed = cgroup.remove();
        // Who took them first lets go of the storages, too: a second removal must not let go of another container's.
        if let Some(mounts) = mounts {
            mounts.let_go();
            storage::release(&agent.storages, &container.storages);
        }
        removed
    })
    .await
}

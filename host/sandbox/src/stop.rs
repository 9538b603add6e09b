//! Stop: the pod's end.

use std::time::Duration;

use tokio::sync::watch;

use crate::delete::REMOVAL_PATIENCE;
use crate::pod::Pod;
use crate::state::{Phase, State};
use crate::{Error, Exit, Result, Sandbox, mount};

/// How long a create that was given up may take to be through.
const CREATE_PATIENCE: Duration = Duration::from_secs(10);

type Creating = watch::Receiver<Option<Exit>>;

/// Ends the pod's state: no create goes on, and nothing new begins.
fn give_up(state: &mut State) -> (Option<std::sync::Arc<Pod>>, Vec<coracle_storage::ContainerPlan>, Vec<Creating>) {
    let pod = state.pod();
    let mut storages = Vec::new();
    let mut creating = Vec::new();
    for container in state.containers.values_mut() {
        if container.storage.is_none() && container.creating.take().is_some() {
            creating.push(container.init.exit.subscribe());
        }
        storages.extend(container.storage.take());
    }
    if pod.is_none() {
        state.phase = Phase::Ended("the pod was stopped".into());
    }
    (pod, storages, creating)
}

impl Sandbox {
    /// Whether the pod has no containers but those whose delete was answered.
    ///
    /// # Errors
    /// [`crate::Error::Gone`].
    pub async fn is_empty(&self) -> Result<bool> {
        self.ask(|state| state.containers.values().all(|container| container.deleting)).await
    }

    /// Ends the machine and removes the pod's folder, whatever is in it.
    ///
    /// # Errors
    /// Where the monitor does not end.
    pub async fn stop(&self) -> Result<()> {
        // What the guest has still to write to a disk would be lost.
        if tokio::time::timeout(REMOVAL_PATIENCE, self.removals.write()).await.is_err() {
            log::warn!("a container is still being removed");
        }
        let (pod, storages, creating) = self.ask(give_up).await?;
        if let Some(network) = pod.as_ref().and_then(|pod| pod.network.as_ref()) {
            network.give_back().await;
        }
        for mut container in creating {
            // A create that was given up takes its own mounts down; when it is through, its container is gone.
            let through = async { while container.changed().await.is_ok() {} };
            if tokio::time::timeout(CREATE_PATIENCE, through).await.is_err() {
                return Err(Error::Timeout("a container's mounts are still being made".into()));
            }
        }
        // A boot that was given up gives its links back by itself; who asks for this stop takes the network down next.
        if tokio::time::timeout(CREATE_PATIENCE, self.links.write()).await.is_err() {
            log::warn!("links of the pod's network are still being given back");
        }
        if let Some(pod) = &pod {
            pod.machine.stop().await?;
            let passt = pod.served.as_ref().and_then(|served| served.passt.as_ref()).map(|(child, _)| child);
            for server in pod.virtiofsd.iter().chain(passt) {
                server.kill();
                server.wait().await;
            }
        }
        let folder = self.config.folder.clone();
        let cleanup = move || {
            for storage in &storages {
                mount::undo(storage);
            }
            let shared = folder.join("shared");
            mount::unshare(&shared);
            let _ = std::fs::remove_file(folder.join("fs.sock"));
            if let Err(error) = std::fs::remove_dir(&folder) {
                log::debug!("{} stays: {error}", folder.display());
            }
        };
        let _ = tokio::task::spawn_blocking(cleanup).await;
        Ok(())
    }
}

//! Stop: the pod's end.

use std::time::Duration;

use coracle_faults as faults;
use tokio::sync::watch;

use crate::delete::REMOVAL_PATIENCE;
use crate::pod::Pod;
use crate::state::{Container, Phase, State};
use crate::{Error, Exit, Result, Sandbox, mount};

/// How long a create that was given up may take to be through.
const CREATE_PATIENCE: Duration = Duration::from_secs(10);

type Creating = watch::Receiver<Option<Exit>>;

/// Begins the end: no create goes on, and nothing new begins.
fn begin(state: &mut State) -> Vec<Creating> {
    state.stopping = true;
    let given_up = |container: &mut Container| container.storage.is_none() && container.creating.take().is_some();
    let containers = state.containers.values_mut();
    containers.filter_map(|container| given_up(container).then(|| container.init.exit.subscribe())).collect()
}

/// Takes what has to be undone.
fn take(state: &mut State) -> (Option<std::sync::Arc<Pod>>, Vec<coracle_storage::ContainerPlan>) {
    let pod = state.pod();
    let storages = state.containers.values_mut().filter_map(|container| container.storage.take()).collect();
    if pod.is_none() {
        state.phase = Phase::Ended("the pod was stopped".into());
    }
    (pod, storages)
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
        let creating = self.ask(begin).await?;
        for mut container in creating {
            // A create that was given up takes its own mounts down; when it is through, its container is gone.
            let through = async { while container.changed().await.is_ok() {} };
            if tokio::time::timeout(CREATE_PATIENCE, through).await.is_ok() {
                continue;
            }
            // It may wait for the guest, which can take its time: without its machine it does not.
            if let Some(pod) = self.ask(|state| state.pod()).await? {
                pod.machine.stop().await?;
            }
            let through = async { while container.changed().await.is_ok() {} };
            if tokio::time::timeout(CREATE_PATIENCE, through).await.is_err() {
                return Err(Error::Timeout("a container's mounts are still being made".into()));
            }
        }
        // What the guest has still to write to a disk would be lost.
        let mut removals = self.removals.subscribe();
        if tokio::time::timeout(REMOVAL_PATIENCE, removals.wait_for(|count| *count == 0)).await.is_err() {
            log::warn!("a container's disk is still being written back");
        }
        faults::reached("host.stop.begun").await;
        let (pod, storages) = self.ask(take).await?;
        // First: a device that the machine has itself its guest would have to let go of.
        let stopped = match &pod {
            Some(pod) => pod.machine.stop().await,
            None => Ok(()),
        };
        if let Some(network) = pod.as_ref().and_then(|pod| pod.network.as_ref()) {
            network.give_back().await;
        }
        // A boot that was given up gives its links back by itself; who asks for this stop takes the network down next.
        if tokio::time::timeout(CREATE_PATIENCE, self.links.write()).await.is_err() {
            log::warn!("links of the pod's network are still being given back");
        }
        stopped?;
        faults::at("host.stop.machine").await?;
        if let Some(pod) = &pod {
            let passt = pod.served.as_ref().and_then(|served| served.passt.as_ref()).map(|(child, _)| child);
            for server in pod.virtiofsd.iter().chain(passt) {
                server.kill();
                server.wait().await;
            }
        }
        let (folder, shares) = (self.config.folder.clone(), std::sync::Arc::clone(&self.shares));
        let cleanup = move || {
            for storage in &storages {
                mount::undo(storage, &shares);
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

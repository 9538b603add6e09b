//! Stop: the pod's end.

use crate::state::Phase;
use crate::{Result, Sandbox, mount};

impl Sandbox {
    /// Whether the pod has no containers.
    ///
    /// # Errors
    /// [`crate::Error::Gone`].
    pub async fn is_empty(&self) -> Result<bool> {
        self.ask(|state| state.containers.is_empty()).await
    }

    /// Ends the machine and removes the pod's folder, whatever is in it.
    ///
    /// # Errors
    /// Where the monitor does not end.
    pub async fn stop(&self) -> Result<()> {
        let (pod, storages) = self
            .ask(|state| {
                let pod = state.pod();
                let storages: Vec<_> = state
                    .containers
                    .values_mut()
                    .filter_map(|container| {
                        container.creating = None;
                        container.storage.take()
                    })
                    .collect();
                if pod.is_none() {
                    state.phase = Phase::Ended("the pod was stopped".into());
                }
                (pod, storages)
            })
            .await?;
        if let Some(pod) = &pod {
            pod.machine.stop().await?;
            if let Some(server) = &pod.virtiofsd {
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
            // Without its mounts the folder is empty; only then may it go.
            let _ = std::fs::remove_dir(&shared);
            let _ = std::fs::remove_file(folder.join("fs.sock"));
            if let Err(error) = std::fs::remove_dir(&folder) {
                log::debug!("{} stays: {error}", folder.display());
            }
        };
        let _ = tokio::task::spawn_blocking(cleanup).await;
        Ok(())
    }
}

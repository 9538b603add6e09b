//! Delete: leaves nothing of a process or container.

use std::sync::Arc;
use std::time::Duration;

use coracle_faults as faults;
use coracle_protocol::agent::RemoveContainerRequest;

use tokio::sync::watch;

use crate::agent::Patience;
use crate::bounded::bounded;
use crate::state::{State, Status};
use crate::{Error, Exit, ProcessId, Result, Sandbox, mount, size};

/// How long the outputs of a process that has ended may take to reach their end: a child may hold them open.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(2);

/// How long the agent may take to remove a container, and how long where a disk has to be written back; then the machine is ended.
const REMOVE_PATIENCE: Duration = Duration::from_secs(10);
const WRITE_PATIENCE: Duration = Duration::from_secs(60);
/// How long a removal takes at most.
pub(crate) const REMOVAL_PATIENCE: Duration = Duration::from_secs(65);

/// A removal that is under way and has a disk to write back, counted until this is dropped.
struct Removal(Arc<watch::Sender<usize>>);

impl Removal {
    fn begin(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(Arc::clone(count))
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl Sandbox {
    /// Deletes a process that has ended, or was never started; for a container's first process the container goes with it.
    ///
    /// # Errors
    /// [`Error::State`] for one that runs.
    pub async fn delete(&self, process: &ProcessId) -> Result<Exit> {
        let removals = Arc::clone(&self.removals);
        let id = process.clone();
        let (exit, pumps, removal) = self
            .ask(move |state| {
                if state.container(&id.container)?.creating.take().is_some() {
                    // Its end comes by the create's own future.
                    return Err(Error::State(format!(
                        "container {} was being created: that is given up",
                        id.container
                    )));
                }
                let found = state.process(&id)?;
                if found.status == Status::Running {
                    return Err(Error::State("the process runs: kill it first".into()));
                }
                if found.status == Status::Created {
                    state.exited(&id, 137);
                }
                let found = state.process(&id)?;
                let exit = (*found.exit.borrow()).ok_or(Error::Gone)?;
                let pumps = found.pumps.take();
                let mut removal = None;
                if id.exec.is_empty() {
                    let container = state.container(&id.container)?;
                    if std::mem::replace(&mut container.deleting, true) {
                        return Err(Error::NotFound(format!("container {}", id.container)));
                    }
                    // A stop of the pod waits until a disk was written back, and for nothing else that hangs in the guest.
                    let writes = container.storage.as_ref().is_some_and(coracle_storage::ContainerPlan::has_kept_disk);
                    removal = writes.then(|| Removal::begin(&removals));
                }
                Ok::<_, Error>((exit, pumps, removal))
            })
            .await??;
        let (sandbox, id) = (self.clone(), process.clone());
        // What hangs in the guest is taken care of after the answer.
        let work = async move {
            let outcome = sandbox.clean_up(&id, pumps).await;
            drop(removal);
            outcome
        };
        match bounded(work).await {
            Some(outcome) => outcome?,
            None => log::info!("the removal of {process:?} goes on"),
        }
        Ok(exit)
    }

    async fn clean_up(&self, process: &ProcessId, pumps: Option<tokio::task::JoinHandle<()>>) -> Result<()> {
        if let Some(pumps) = pumps {
            let abort = pumps.abort_handle();
            if tokio::time::timeout(OUTPUT_PATIENCE, pumps).await.is_err() {
                abort.abort();
            }
        }
        if process.exec.is_empty() {
            faults::reached("host.delete.outputs").await;
            let removed = self.remove_container(&process.container).await;
            if removed.is_err() {
                let id = process.container.clone();
                self.tell(move |state| {
                    if let Ok(container) = state.container(&id) {
                        container.deleting = false;
                    }
                });
            }
            return removed;
        }
        let id = process.clone();
        self.ask(move |state| {
            state.container(&id.container).map(|container| container.execs.remove(&id.exec)).map(drop)
        })
        .await?
    }

    async fn remove_container(&self, id: &str) -> Result<()> {
        let name = id.to_owned();
        let (is_pod, patience, pod) = self
            .ask(move |state| {
                let found = state.container(&name)?;
                let writes = found.storage.as_ref().is_some_and(coracle_storage::ContainerPlan::has_kept_disk);
                let patience = if writes { WRITE_PATIENCE } else { REMOVE_PATIENCE };
                Ok::<_, Error>((found.is_pod, patience, state.pod()))
            })
            .await??;
        if let Some(pod) = pod.filter(|_| !is_pod) {
            let request = RemoveContainerRequest { container_id: id.to_owned(), timeout: 0, ..Default::default() };
            let removed = pod.agent.call("RemoveContainer", Patience::Event, async |agent, ctx| {
                agent.remove_container(ctx, &request).await
            });
            match tokio::time::timeout(patience, removed).await {
                Ok(Ok(_) | Err(Error::NotFound(_))) => {}
                Ok(Err(error)) => {
                    // What the guest can't let go of goes with the guest.
                    log::warn!("container {id} can't be removed in the guest ({error}): the machine is ended");
                    pod.machine.stop().await?;
                }
                Err(_) => {
                    log::warn!("the agent does not remove container {id}: the machine is ended");
                    pod.machine.stop().await?;
                }
            }
        }
        faults::reached("host.delete.removed").await;
        let name = id.to_owned();
        let disks = move |state: &mut State| {
            let storage = state.containers.get(&name).and_then(|container| container.storage.as_ref());
            (storage.map(|storage| storage.devices.clone()).unwrap_or_default(), state.pod())
        };
        if let (disks, Some(pod)) = self.ask(disks).await? {
            pod.devices.detach(&*pod.machine, &disks).await;
        }
        // Taken only now: a stop of the pod meanwhile takes it, and undoes it, in this one's stead.
        let name = id.to_owned();
        let storage = self
            .ask(move |state| state.containers.get_mut(&name).and_then(|container| container.storage.take()))
            .await?;
        if let Some(storage) = storage {
            let shares = Arc::clone(&self.shares);
            tokio::task::spawn_blocking(move || mount::undo(&storage, &shares))
                .await
                .map_err(|error| Error::Failed(error.to_string()))?;
        }
        faults::reached("host.delete.mounts").await;
        let name = id.to_owned();
        let pod = self.ask(move |state| state.containers.remove(&name).and(state.pod())).await?;
        if let Some(pod) = pod {
            size::fit(self, &pod);
        }
        Ok(())
    }
}

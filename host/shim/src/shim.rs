//! What the daemon knows beside the pod's own state: bundles, names of streams, and how events are published.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics::{TASK_EXIT_EVENT_TOPIC, TASK_OOM_EVENT_TOPIC};
use coracle_process::Cgroup;
use coracle_protocol::management::{Description, Kubernetes};
use coracle_sandbox::{Error, Event, ProcessId, Sandbox};
use coracle_settings::deprecation::{self, Kind};
use tokio::sync::{Notify, mpsc};

use crate::counts::Counts;
use crate::events::Publisher;
use crate::latency::Latencies;
use crate::log::Log;
use crate::metrics::timestamp;
use crate::{folder, machine, pod_settings};

/// What containerd has said of a process, to be repeated to it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Streams {
    pub(crate) bundle: String,
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// See the module.
pub(crate) struct Shim {
    pub(crate) namespace: String,
    pub(crate) id: String,
    pub(crate) folder: PathBuf,
    pub(crate) publisher: Publisher,
    // Made by the first create; the handlers of requests run side by side and look it up.
    sandbox: Mutex<Option<Sandbox>>,
    // As above: look-ups.
    descriptions: Mutex<HashMap<ProcessId, Streams>>,
    // The pod's, which the first create joins.
    cgroup: tokio::sync::Mutex<Option<Cgroup>>,
    // Set once, by CreateSandbox.
    described: AtomicBool,
    ended: Notify,
    /// When this was made.
    pub(crate) started: SystemTime,
    pub(crate) latencies: Arc<Latencies>,
    pub(crate) log: Log,
    pub(crate) counts: Counts,
    // Set once, with the pod: the monitor of its machine, and its name in Kubernetes.
    about: OnceLock<(&'static str, Kubernetes)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shim {
    pub(crate) fn new(namespace: &str, id: &str, folder: PathBuf, latencies: Arc<Latencies>, log: Log) -> Arc<Self> {
        Arc::new(Self {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
            folder,
            publisher: Publisher::new(namespace),
            sandbox: Mutex::new(None),
            descriptions: Mutex::new(HashMap::new()),
            cgroup: tokio::sync::Mutex::new(None),
            described: AtomicBool::new(false),
            ended: Notify::new(),
            started: SystemTime::now(),
            latencies,
            log,
            counts: Counts::default(),
            about: OnceLock::new(),
        })
    }

    /// Joins the pod's control group on the host, once: all that the pod starts is in it.
    pub(crate) async fn join_cgroup(&self, path: &str) -> Result<(), Error> {
        let mut place = self.cgroup.lock().await;
        if place.is_some() || path.is_empty() {
            return Ok(());
        }
        let failed = |error| Error::Failed(format!("join the control group {path}: {error}"));
        let cgroup = Cgroup::at(path).map_err(failed)?;
        let joining = cgroup.clone();
        // The kernel may take its time to move the threads.
        let joined = tokio::task::spawn_blocking(move || joining.join()).await;
        joined.map_err(|error| failed(error.into()))?.map_err(failed)?;
        *place = Some(cgroup);
        Ok(())
    }

    /// The pod, which the first create makes.
    pub(crate) fn sandbox(&self) -> Result<Sandbox, Error> {
        lock(&self.sandbox).clone().ok_or_else(|| Error::NotFound(format!("the pod {}", self.id)))
    }

    /// The pod of container `id`, which is any but the one that stands for a pod of the Sandbox API.
    pub(crate) fn pod_of(&self, id: &str) -> Result<Sandbox, Error> {
        if self.is_described() && id == self.id {
            return Err(Error::NotFound(format!("task {id}")));
        }
        self.sandbox()
    }

    /// From now on the pod is that of the Sandbox API.
    pub(crate) fn set_described(&self) {
        self.described.store(true, Ordering::Relaxed);
    }

    /// Whether the pod was made by the Sandbox API: then it is no task, and no task's end is its own.
    pub(crate) fn is_described(&self) -> bool {
        self.described.load(Ordering::Relaxed)
    }

    /// The pod; made by the host's settings, the file that containerd names and these annotations, where it is not there yet.
    pub(crate) fn sandbox_or_new(
        self: &Arc<Self>,
        file: Option<&Path>,
        annotations: &HashMap<String, String>,
    ) -> Result<Sandbox, Error> {
        let mut place = lock(&self.sandbox);
        if let Some(sandbox) = &*place {
            return Ok(sandbox.clone());
        }
        let (settings, mut deprecated) = pod_settings::of(file, annotations)?;
        let monitor = machine::monitor(&settings)?;
        if let Some(entry) = deprecation::of(Kind::Driver, monitor) {
            log::warn!("{entry}");
            deprecated.push(entry);
        }
        self.log.follow(&settings);
        for entry in deprecated {
            self.counts.deprecated(entry.kind.name(), entry.name);
        }
        let name =
            |key: &str| annotations.get(&format!("io.kubernetes.cri.sandbox-{key}")).cloned().unwrap_or_default();
        let kubernetes = Kubernetes { name: name("name"), namespace: name("namespace"), uid: name("uid") };
        let about = (monitor, kubernetes);
        let config = machine::config(&settings, &self.id, &folder::machine(&self.folder))?;
        let (sandbox, events) = Sandbox::new(config, machine::driver(&settings)?);
        tokio::spawn(publish_events(Arc::clone(self), events));
        *place = Some(sandbox.clone());
        // The place was empty, and is filled once.
        let _ = self.about.set(about);
        Ok(sandbox)
    }

    /// What the pod is.
    pub(crate) async fn describe_pod(&self) -> Description {
        let (monitor, kubernetes) = self.about.get().cloned().unwrap_or_default();
        let sandbox = self.sandbox().ok();
        let (accelerator, agent, containers) = match &sandbox {
            Some(sandbox) => (
                sandbox.accelerator().await.unwrap_or_default(),
                sandbox.agent_url().await.unwrap_or_default(),
                sandbox.containers().await.unwrap_or_default(),
            ),
            None => Default::default(),
        };
        Description {
            namespace: self.namespace.clone(),
            id: self.id.clone(),
            version: coracle_protocol::VERSION.into(),
            pid: std::process::id(),
            started: self.started.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
            monitor: monitor.into(),
            accelerator: accelerator.into(),
            agent,
            containers,
            kubernetes,
        }
    }

    pub(crate) fn describe(&self, process: ProcessId, description: Streams) {
        lock(&self.descriptions).insert(process, description);
    }

    pub(crate) fn description(&self, process: &ProcessId) -> Streams {
        lock(&self.descriptions).get(process).cloned().unwrap_or_default()
    }

    pub(crate) fn forget(&self, process: &ProcessId) {
        lock(&self.descriptions).remove(process);
    }

    /// Ends the daemon.
    pub(crate) fn end(&self) {
        self.ended.notify_one();
    }

    /// Waits for [`Self::end`].
    pub(crate) async fn ended(&self) {
        self.ended.notified().await;
    }

    /// Stops the pod and sends what is left to send.
    ///
    /// False where something of it may still be there.
    pub(crate) async fn stop(&self) -> bool {
        let mut stopped = true;
        if let Ok(sandbox) = self.sandbox()
            && let Err(error) = sandbox.stop().await
        {
            log::error!("the pod does not stop: {error}");
            stopped = false;
        }
        let cgroup = self.cgroup.lock().await.take();
        if let Some(cgroup) = cgroup {
            // It waits for the last process.
            let _ = tokio::task::spawn_blocking(move || cgroup.leave()).await;
        }
        let goodbye = tokio::time::timeout(std::time::Duration::from_secs(2), self.publisher.flush());
        if goodbye.await.is_err() {
            log::warn!("events were left unsent");
        }
        stopped
    }
}

/// Tells containerd what happens in the pod.
async fn publish_events(shim: Arc<Shim>, mut events: mpsc::UnboundedReceiver<Event>) {
    while let Some(event) = events.recv().await {
        match event {
            Event::Exited { process, .. } if shim.is_described() && process.container == shim.id => {
                log::info!("the pod has ended");
            }
            Event::Exited { process, exit } => {
                let id = if process.exec.is_empty() { process.container.clone() } else { process.exec.clone() };
                let message = TaskExit {
                    container_id: process.container.clone(),
                    id,
                    pid: std::process::id(),
                    exit_status: exit.status,
                    exited_at: MessageField::some(timestamp(exit.at)),
                    ..Default::default()
                };
                shim.publisher.publish(TASK_EXIT_EVENT_TOPIC, "containerd.events.TaskExit", &message);
            }
            Event::OutOfMemory { container } => {
                shim.counts.killed_for_memory();
                let message = TaskOOM { container_id: container, ..Default::default() };
                shim.publisher.publish(TASK_OOM_EVENT_TOPIC, "containerd.events.TaskOOM", &message);
            }
            Event::MachineEnded { reason } => {
                shim.counts.machine_ended();
                log::info!("the machine has ended: {reason}");
            }
        }
    }
}

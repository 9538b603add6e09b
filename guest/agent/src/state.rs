//! The agent's state: containers and their processes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use coracle_container::cgroup::Cgroup;
use oci_spec::runtime::{LinuxPersonality, LinuxSeccomp};
use tokio::sync::{Mutex as AsyncMutex, OnceCell, mpsc};
use tokio::task::AbortHandle;

use crate::connections::Connections;
use crate::hooks::{self, Point};
use crate::mounts::Mounts;
use crate::process::Process;
use crate::storage::{self, Storages};
use crate::thread::on_thread;
use crate::{Config, Error, Result};

/// The whole agent.
pub(crate) struct Agent {
    pub(crate) config: Config,
    // ttrpc runs handlers side by side and wants them `Send`; each holds this lock for a look-up, never across an await.
    containers: Mutex<HashMap<String, Slot>>,
    pub(crate) connections: Arc<Connections>,
    pub(crate) oom_sender: mpsc::UnboundedSender<String>,
    // One reader at a time takes the next event.
    pub(crate) oom_events: AsyncMutex<mpsc::UnboundedReceiver<String>>,
    /// The folder of the guest's hooks, once the pod was set up with one.
    pub(crate) hooks: OnceLock<PathBuf>,
    pub(crate) storages: Storages,
    /// Of requests that are part of a trace.
    pub(crate) spans: crate::spans::Ended,
    /// The first process of the pid namespace that containers share; made for the first one that asks for it.
    pause: OnceCell<i32>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Nobody else reaps it, so the number is still its own.
        if let Some(pid) = self.pause.get().copied().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// A container's place: taken while it is being made, so that no two have one name.
enum Slot {
    Reserved,
    Made(Arc<Container>),
}

/// One container.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) cgroup: Cgroup,
    /// The first process's pid in the agent's pid namespace.
    pub(crate) pid: i32,
    /// Its root file system, a folder.
    pub(crate) root: PathBuf,
    /// Where its termination message is, where it has one.
    pub(crate) termination_log: Option<PathBuf>,
    /// What all its processes may ask of the kernel.
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) personality: Option<LinuxPersonality>,
    pub(crate) init: Arc<Process>,
    /// Taken once, by the removal.
    pub(crate) mounts: Mutex<Option<Mounts>>,
    /// Let go of by whoever takes the mounts.
    pub(crate) storages: storage::Names,
    /// Nothing wakes a watch on a cgroup that is gone: it ends with the container.
    oom_watch: Option<AbortHandle>,
    // As above: a look-up, never held across an await.
    execs: Mutex<HashMap<String, Arc<Process>>>,
}

/// What is known of a container when it is made.
pub(crate) struct Made {
    pub(crate) id: String,
    pub(crate) cgroup: Cgroup,
    pub(crate) pid: i32,
    pub(crate) root: PathBuf,
    pub(crate) termination_log: Option<PathBuf>,
    pub(crate) seccomp: Option<LinuxSeccomp>,
    pub(crate) personality: Option<LinuxPersonality>,
    pub(crate) mounts: Mounts,
    pub(crate) storages: storage::Names,
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Some(watch) = &self.oom_watch {
            watch.abort();
        }
    }
}

/// Gives a reserved name back where the making fails.
pub(crate) struct Reservation<'a> {
    agent: &'a Agent,
    id: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        let mut containers = lock(&self.agent.containers);
        if matches!(containers.get(&self.id), Some(Slot::Reserved)) {
            containers.remove(&self.id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A holder that panicked has left a map in a valid state: every change is one call.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Agent {
    pub(crate) fn new(config: Config) -> Arc<Self> {
        let (oom_sender, oom_events) = mpsc::unbounded_channel();
        Arc::new(Self {
            config,
            containers: Mutex::new(HashMap::new()),
            connections: Arc::default(),
            oom_sender,
            oom_events: AsyncMutex::new(oom_events),
            hooks: OnceLock::new(),
            storages: Storages::default(),
            spans: crate::spans::Ended::default(),
            pause: OnceCell::new(),
        })
    }

    /// The pid of the pod's pause process.
    pub(crate) async fn pause(&self) -> Result<i32> {
        let start = || async {
            let program = self.config.program.clone();
            on_thread(move || coracle_container::pause::start(&program)).await
        };
        self.pause.get_or_try_init(start).await.copied()
    }

    /// Runs the guest's hooks for a container, where there are any.
    pub(crate) async fn hooks(&self, point: Point, id: &str, pid: i32, root: &Path) -> Result<()> {
        let Some(folder) = self.hooks.get().cloned() else { return Ok(()) };
        let (id, root) = (id.to_owned(), root.to_owned());
        on_thread(move || hooks::run(&folder, point, &id, pid, &root)).await
    }

    /// Takes the name `id`.
    pub(crate) fn reserve(&self, id: &str) -> Result<Reservation<'_>> {
        let mut containers = lock(&self.containers);
        if containers.contains_key(id) {
            return Err(Error::Exists(format!("container {id}")));
        }
        containers.insert(id.to_owned(), Slot::Reserved);
        Ok(Reservation { agent: self, id: id.to_owned() })
    }

    pub(crate) fn insert(&self, container: Container) {
        lock(&self.containers).insert(container.id.clone(), Slot::Made(Arc::new(container)));
    }

    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>> {
        match lock(&self.containers).get(id) {
            Some(Slot::Made(container)) => Ok(Arc::clone(container)),
            Some(Slot::Reserved) => Err(Error::State(format!("container {id} is being created"))),
            None => Err(Error::NotFound(format!("container {id}"))),
        }
    }

    pub(crate) fn forget(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    pub(crate) fn all(&self) -> Vec<Arc<Container>> {
        lock(&self.containers)
            .values()
            .filter_map(|slot| match slot {
                Slot::Made(container) => Some(Arc::clone(container)),
                Slot::Reserved => None,
            })
            .collect()
    }

    /// The process `exec_id` of container `id`; an empty name is the container's own.
    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        let container = self.container(id)?;
        container.process(exec_id)
    }
}

impl Container {
    pub(crate) fn new(made: Made, init: Arc<Process>, oom_watch: Option<AbortHandle>) -> Self {
        let Made { id, cgroup, pid, root, termination_log, seccomp, personality, mounts, storages } = made;
        Self {
            id,
            cgroup,
            pid,
            root,
            termination_log,
            seccomp,
            personality,
            mounts: Mutex::new(Some(mounts)),
            storages,
            init,
            oom_watch,
            execs: Mutex::new(HashMap::new()),
        }
    }

    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        lock(&self.execs)
            .get(exec_id)
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("process {exec_id} of container {}", self.id)))
    }

    pub(crate) fn processes(&self) -> Vec<Arc<Process>> {
        let mut all: Vec<_> = lock(&self.execs).values().cloned().collect();
        all.push(Arc::clone(&self.init));
        all
    }

    pub(crate) fn insert_exec(&self, exec_id: &str, process: Arc<Process>) -> Result<()> {
        match lock(&self.execs).entry(exec_id.to_owned()) {
            std::collections::hash_map::Entry::Occupied(_) => Err(Error::Exists(format!("process {exec_id}"))),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(process);
                Ok(())
            }
        }
    }

    pub(crate) fn has_exec(&self, exec_id: &str) -> bool {
        lock(&self.execs).contains_key(exec_id)
    }

    /// Forgets a process that was started beside the first one, once it was waited for and its streams were read.
    pub(crate) fn forget_exec(&self, exec_id: &str) {
        let mut execs = lock(&self.execs);
        if execs.get(exec_id).is_some_and(|process| process.is_done()) {
            execs.remove(exec_id);
        }
    }
}

//! The pod's state, owned by one task.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use coracle_protocol::oci;
use tokio::sync::{mpsc, oneshot, watch};

use crate::io::{Connected, Stdio};
use crate::pod::Pod;
use crate::size::Limits;
use crate::{Error, Event, Exit, ProcessId, Result};

/// How far a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Being made, or made and not started.
    Created,
    /// Started.
    Running,
    /// Its container stands.
    Paused,
    /// Ended.
    Stopped,
}

/// What can be said of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// How far it is.
    pub status: Status,
    /// How it ended.
    pub exit: Option<Exit>,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// A process as the pod knows it.
pub(crate) struct Process {
    pub(crate) status: Status,
    pub(crate) exit: watch::Sender<Option<Exit>>,
    pub(crate) terminal: bool,
    /// Until it is started.
    pub(crate) stdio: Option<Stdio>,
    /// The guest's ends of its streams, from its making to its start. An exec is made at its start.
    pub(crate) connected: Option<Connected>,
    /// What keeps the input open; see [`crate::io::Input`].
    pub(crate) keeper: Option<Box<dyn Send + Sync>>,
    /// Of an exec, until it is started.
    pub(crate) spec: Option<oci::Process>,
    /// The task that moves its streams: done when they are at their end.
    pub(crate) pumps: Option<tokio::task::JoinHandle<()>>,
    /// Its end, from when it is known until it is told.
    ending: Option<Exit>,
}

impl Process {
    pub(crate) fn new(terminal: bool, mut stdio: Stdio, spec: Option<oci::Process>) -> Self {
        let keeper = stdio.stdin.as_mut().and_then(|input| input.keeper.take());
        let (exit, _) = watch::channel(None);
        Self {
            status: Status::Created,
            exit,
            terminal,
            stdio: Some(stdio),
            connected: None,
            keeper,
            spec,
            pumps: None,
            ending: None,
        }
    }
}

/// A container as the pod knows it.
pub(crate) struct Container {
    pub(crate) init: Process,
    /// Whether it stands for the pod alone, and has no process in the guest (see [`crate::run_pod`]).
    pub(crate) is_pod: bool,
    pub(crate) execs: HashMap<String, Process>,
    /// While it is being made: gives that up when it is sent or dropped.
    pub(crate) creating: Option<oneshot::Sender<()>>,
    pub(crate) paused: bool,
    /// What it may use.
    pub(crate) limits: Limits,
    /// Its delete was answered, or is about to be.
    pub(crate) deleting: bool,
    /// What it had used when that was read last.
    pub(crate) stats: Option<coracle_protocol::agent::StatsContainerResponse>,
    /// Below the shared folder: undone when the container is deleted.
    pub(crate) storage: Option<coracle_storage::ContainerPlan>,
}

/// How far the machine is.
pub(crate) enum Phase {
    Absent,
    /// A container's create boots it.
    Booting,
    Up(Arc<Pod>),
    Ended(String),
}

/// See the module.
pub(crate) struct State {
    pub(crate) phase: Phase,
    pub(crate) containers: HashMap<String, Container>,
    /// Whether the pod is being stopped: nothing new begins.
    pub(crate) stopping: bool,
    events: mpsc::UnboundedSender<Event>,
}

impl State {
    pub(crate) fn new(events: mpsc::UnboundedSender<Event>) -> Self {
        Self { phase: Phase::Absent, containers: HashMap::new(), stopping: false, events }
    }

    pub(crate) fn emit(&self, event: Event) {
        // A receiver that has gone wants no events.
        let _ = self.events.send(event);
    }

    pub(crate) fn pod(&self) -> Option<Arc<Pod>> {
        match &self.phase {
            Phase::Up(pod) => Some(Arc::clone(pod)),
            _ => None,
        }
    }

    /// The pod, which must be up.
    pub(crate) fn up(&self) -> Result<Arc<Pod>> {
        match &self.phase {
            Phase::Up(pod) => Ok(Arc::clone(pod)),
            Phase::Ended(reason) => Err(Error::Ended(reason.clone())),
            Phase::Absent | Phase::Booting => Err(Error::State("the pod's machine is not up".into())),
        }
    }

    pub(crate) fn end_reason(&self) -> Option<String> {
        match &self.phase {
            Phase::Ended(reason) => Some(reason.clone()),
            _ => None,
        }
    }

    pub(crate) fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Error::NotFound(format!("container {id}")))
    }

    pub(crate) fn process(&mut self, id: &ProcessId) -> Result<&mut Process> {
        let container = self.container(&id.container)?;
        if id.exec.is_empty() {
            return Ok(&mut container.init);
        }
        let missing = || Error::NotFound(format!("process {} of container {}", id.exec, id.container));
        container.execs.get_mut(&id.exec).ok_or_else(missing)
    }

    pub(crate) fn describe(&mut self, id: &ProcessId) -> Result<ProcessState> {
        let paused = self.container(&id.container)?.paused;
        let process = self.process(id)?;
        let status = match process.status {
            Status::Running if paused => Status::Paused,
            other => other,
        };
        Ok(ProcessState { status, exit: *process.exit.borrow(), terminal: process.terminal })
    }

    pub(crate) fn processes(&mut self, id: &str) -> Result<Vec<String>> {
        let container = self.container(id)?;
        let mut names = Vec::new();
        if container.init.status != Status::Stopped {
            names.push(String::new());
        }
        names.extend(
            container.execs.iter().filter(|(_, exec)| exec.status == Status::Running).map(|(name, _)| name.clone()),
        );
        Ok(names)
    }

    /// Notes a process's end, which [`Self::exited`] tells.
    pub(crate) fn ending(&mut self, id: &ProcessId, status: u32) {
        if let Ok(process) = self.process(id) {
            process.ending.get_or_insert(Exit { status, at: SystemTime::now() });
        }
    }

    /// Tells everybody of a process's end, once: of the one that was noted before, if any.
    pub(crate) fn exited(&mut self, id: &ProcessId, status: u32) {
        let Ok(process) = self.process(id) else { return };
        if process.status == Status::Stopped {
            return;
        }
        let exit = process.ending.unwrap_or(Exit { status, at: SystemTime::now() });
        process.status = Status::Stopped;
        process.keeper = None;
        process.exit.send_replace(Some(exit));
        self.emit(Event::Exited { process: id.clone(), exit });
    }

    /// Notes the machine's end: all that ran in it has ended.
    pub(crate) fn machine_ended(&mut self, reason: &str) {
        if matches!(self.phase, Phase::Ended(_)) {
            return;
        }
        self.phase = Phase::Ended(reason.to_owned());
        let mut ended = Vec::new();
        for (id, container) in &mut self.containers {
            // A create that is under way fails by itself.
            if container.creating.is_none() {
                ended.push(ProcessId { container: id.clone(), exec: String::new() });
                ended
                    .extend(container.execs.keys().map(|exec| ProcessId { container: id.clone(), exec: exec.clone() }));
            }
        }
        for process in ended {
            // As after SIGKILL.
            self.exited(&process, 137);
        }
        self.emit(Event::MachineEnded { reason: reason.to_owned() });
    }
}

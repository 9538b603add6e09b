//! One pod: its machine, its agent, its containers.
//!
//! One task owns the [`state`]; everybody else sends it messages, each of which is handled at once. Whatever takes time (a
//! boot, a request to the agent) is a future beside the owner whose end comes back as a message, so State, Kill, Delete and
//! Stats are answered while a create hangs. Each verb has a file.
//!
//! ```text
//! Sandbox::create ─ask▶ owner: reserve ─▶ boot.rs: plan, shared fs, machine, greeting ─▶ create.rs: plan, mounts, agent ─ask▶ owner: created
//! ```

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod agent;
mod boot;
mod bounded;
mod clock;
mod copy;
mod create;
mod delete;
mod devices;
mod error;
mod exec;
mod files;
mod forward;
mod io;
mod iptables;
mod kill;
mod metrics;
mod mirror;
mod mount;
mod network;
mod oom;
mod owners;
mod passthrough;
mod pause;
mod pod;
mod run_pod;
mod size;
mod spec;
mod start;
mod state;
mod stats;
mod stop;
mod swap;
mod terminal;
mod to_its_end;
mod update;
mod user_network;
mod volume;
mod wait;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use coracle_machine::{Driver, Kernel, Limits};
use coracle_protocol::oci;
use tokio::sync::{RwLock, mpsc, oneshot, watch};

pub use error::Error;
pub use io::{Input, Output, Stdio};
pub use metrics::Figures;
pub use network::{give_back_network, taken_links};
use state::State;
pub use state::{ProcessState, Status};

/// What the sandbox gives back.
pub type Result<T> = std::result::Result<T, Error>;

/// What a pod is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its name, for the process list.
    pub name: String,
    /// Its folder, which exists and is removed when the pod stops. The path is short.
    pub folder: PathBuf,
    /// The guest's kernel.
    pub kernel: Kernel,
    /// The guest's initial RAM disk.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub command_line: String,
    /// Memory of the machine before containers' limits are added.
    pub memory_mib: u64,
    /// Memory that the machine can have at most, where it can grow.
    pub memory_max_mib: u64,
    /// Processors that it can have at most.
    pub vcpus_max: u32,
    /// Whether the machine's memory is made of the host's huge pages.
    pub huge_pages: bool,
    /// Processors of the host on which the machine runs, and nodes of its memory; empty for any.
    pub host_cpus: Vec<u32>,
    /// See [`Self::host_cpus`].
    pub host_nodes: Vec<u32>,
    /// What each of the machine's disks may do.
    pub disk_limits: Limits,
    /// Processors where containers ask for none.
    pub vcpus: u32,
    /// Where virtiofsd is looked for, and how many files it may have open. None: the machine's file system is in place already (a fake).
    pub virtiofsd: Option<(Vec<String>, u64)>,
    /// Whether the guest may see folders of the host's; where not it has copies of files.
    pub shares_files: bool,
    /// Whether layers that are disks are memory of the machine, where it can have that.
    pub layers_as_memory: bool,
    /// Whether the machine is one as confidential guests have it: see the setting `machine.sealed`.
    pub sealed: bool,
    /// The network of a pod that has no network namespace. None: none.
    pub user_network: Option<UserNetwork>,
    /// Whether labels of mandatory access control go to the guest, whose profiles they then name.
    pub labels: bool,
    /// The folder of hooks in the guest; empty where there is none.
    pub hook_folder: String,
    /// How links of the pod's network namespace are taken over.
    pub network: coracle_network::Options,
    /// The folder in which volumes are named that are disks (Kata's direct-assigned volumes).
    pub direct_volumes: std::path::PathBuf,
    /// The folder for the guests' swap, where they get any.
    pub swap_folder: Option<std::path::PathBuf>,
    /// The size at most of a disk, in MiB, where `emptyDir` volumes that are no memory are disks.
    pub empty_dir_mib: Option<u64>,
    /// How often the guest's clock is compared with the host's, beside the times when that one was set.
    pub clock_period: Duration,
    /// How long the guest may take to come up.
    pub boot_timeout: Duration,
    /// How long the agent may take to answer what is not a wait.
    pub agent_timeout: Duration,
    /// How the pod is traced; none where nobody does.
    pub trace: Option<Trace>,
    /// The version that the guest must have.
    pub version: String,
}

/// How a pod's work becomes part of a trace.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Gives the context of the current span, as a `traceparent` ([`coracle_protocol::spans`]).
    pub current: fn() -> Option<String>,
    /// Takes the guest's spans, as its agent has said them; how many they are.
    pub guest: fn(&[u8]) -> usize,
}

/// A network that takes no privileges on the host.
#[derive(Debug, Clone)]
pub struct UserNetwork {
    /// Ports of the host that lead to the pod.
    pub forwards: Vec<coracle_machine::Forward>,
    /// Where passt is looked for; where it is nowhere, the monitor serves the network itself.
    pub passt: Vec<String>,
}

/// A process: a container's first one, or one beside it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ProcessId {
    /// The container.
    pub container: String,
    /// Empty for the first process.
    pub exec: String,
}

/// What a container is made from.
#[derive(Debug)]
pub struct CreateRequest {
    /// Its name.
    pub id: String,
    /// Its specification, as the bundle has it.
    pub spec: oci::Spec,
    /// Its root file system as a folder, where `rootfs` is empty.
    pub root: PathBuf,
    /// Mounts that make its root file system. Their targets are chosen here.
    pub rootfs: Vec<coracle_storage::HostMount>,
    /// Its standard streams.
    pub stdio: Stdio,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The code, or 128 and the signal.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// What happens without having been asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process has ended.
    Exited {
        /// Which.
        process: ProcessId,
        /// How.
        exit: Exit,
    },
    /// The guest's kernel has killed in a container for want of memory.
    OutOfMemory {
        /// The container.
        container: String,
    },
    /// The machine has ended.
    MachineEnded {
        /// Why, for people.
        reason: String,
    },
}

type Message = Box<dyn FnOnce(&mut State) + Send>;

/// A handle on a pod. Clones are handles on the same pod.
#[derive(Clone)]
pub struct Sandbox {
    messages: mpsc::UnboundedSender<Message>,
    config: Arc<Config>,
    driver: Arc<dyn Driver>,
    /// Held by whoever has taken over links of the pod's network, until they are given back.
    links: Arc<RwLock<()>>,
    /// How many removals of containers are under way that have a disk to write back.
    removals: Arc<watch::Sender<usize>>,
    /// The folders of the host that several containers have.
    shares: Arc<mount::Shares>,
}

impl Sandbox {
    /// A pod without a machine: the first container boots it. Events arrive at the receiver.
    pub fn new(config: Config, driver: Arc<dyn Driver>) -> (Self, mpsc::UnboundedReceiver<Event>) {
        let (messages, mut inbox) = mpsc::unbounded_channel::<Message>();
        let (events, receiver) = mpsc::unbounded_channel();
        let mut state = State::new(events);
        tokio::spawn(async move {
            while let Some(message) = inbox.recv().await {
                message(&mut state);
            }
        });
        (
            Self {
                messages,
                config: Arc::new(config),
                driver,
                links: Arc::default(),
                removals: Arc::new(watch::channel(0).0),
                shares: Arc::default(),
            },
            receiver,
        )
    }

    /// Runs `question` on the state and gives the answer.
    async fn ask<T: Send + 'static>(&self, question: impl FnOnce(&mut State) -> T + Send + 'static) -> Result<T> {
        let (sender, answer) = oneshot::channel();
        self.tell(move |state| {
            // Who asked may have gone.
            let _ = sender.send(question(state));
        });
        answer.await.map_err(|_| Error::Gone)
    }

    /// Runs `change` on the state.
    fn tell(&self, change: impl FnOnce(&mut State) + Send + 'static) {
        // The owner lives as long as any handle.
        let _ = self.messages.send(Box::new(change));
    }

    /// The state of a process.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn state(&self, process: &ProcessId) -> Result<ProcessState> {
        let process = process.clone();
        self.ask(move |state| state.describe(&process)).await?
    }

    /// Why the machine has ended, where it has.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub async fn end_reason(&self) -> Result<Option<String>> {
        self.ask(|state| state.end_reason()).await
    }

    /// The names of the processes of a container that have not ended, the first one's being empty.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn processes(&self, container: &str) -> Result<Vec<String>> {
        let container = container.to_owned();
        self.ask(move |state| state.processes(&container)).await?
    }

    /// The names of the containers that are made, but the one that stands for the pod.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub async fn containers(&self) -> Result<Vec<String>> {
        self.ask(|state| {
            let all = state.containers.iter();
            all.filter(|(_, container)| !container.is_pod && container.creating.is_none())
                .map(|(id, _)| id.clone())
                .collect()
        })
        .await
    }

    /// The last lines of the guest's console.
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub async fn console(&self, lines: usize) -> Result<Vec<String>> {
        let pod = self.ask(|state| state.pod()).await?;
        Ok(pod.map(|pod| pod.machine.console(lines)).unwrap_or_default())
    }
}

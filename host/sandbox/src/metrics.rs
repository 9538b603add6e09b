//! Figures of the pod's machine and guest.

use std::sync::PoisonError;
use std::time::Duration;

use coracle_machine::{AgentAddress, Stats};
use coracle_protocol::agent::GetMetricsRequest;
use coracle_protocol::metrics::{Bounds, Kind, Read, read};

use crate::agent::Patience;
use crate::{Error, Result, Sandbox};

/// How long the machine and its agent may take together: whoever asks asks many pods.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a guest may say, of which kind, and what that is: it speaks of itself, and not in others' names.
const FAMILIES: [(&str, Kind, &str); 16] = [
    ("kata_agent_scrape_count", Kind::Counter, "How often the agent was asked for figures."),
    ("kata_agent_threads", Kind::Gauge, "Threads of the agent."),
    ("kata_agent_proc_stat", Kind::Gauge, "Processor time of the agent and of its children, in 10 ms."),
    (
        "kata_agent_proc_status",
        Kind::Gauge,
        "What /proc says of the agent: memory in bytes, switches between processes.",
    ),
    ("kata_agent_io_stat", Kind::Gauge, "What the agent has read and written, in bytes and calls."),
    ("kata_agent_process_resident_memory_bytes", Kind::Gauge, "Resident memory of the agent."),
    ("kata_agent_process_anonymous_memory_bytes", Kind::Gauge, "Anonymous memory of the agent."),
    ("coracle_agent_containers", Kind::Gauge, "Containers that the agent has."),
    ("coracle_guest_tsc_at_ready", Kind::Gauge, "Time stamp counter when the agent began to serve."),
    ("kata_guest_load", Kind::Gauge, "The guest's load over 1, 5 and 15 minutes."),
    ("kata_guest_tasks", Kind::Gauge, "The guest's tasks: that run, and all."),
    ("kata_guest_cpu_time", Kind::Gauge, "Processor time of the guest, in milliseconds."),
    ("kata_guest_meminfo", Kind::Gauge, "Memory of the guest, in bytes or in pages."),
    ("kata_guest_vm_stat", Kind::Gauge, "The guest's /proc/vmstat."),
    ("kata_guest_netdev_stat", Kind::Gauge, "Counts of the guest's links."),
    ("kata_guest_diskstat", Kind::Gauge, "Counts of the guest's disks; times in ms."),
];

/// To what the guest's text is held.
const GUEST: Bounds<'_> = Bounds {
    prefixes: &[],
    families: &FAMILIES,
    labels: &["item", "cpu", "disk", "interface"],
    reserved: &[],
    bytes: 512 << 10,
    samples: SERIES_MAX,
};

/// How many series there can be of one guest, over all its life.
const SERIES_MAX: usize = 4000;

/// What is known of a running pod.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The machine's; none where its monitor has not said in time.
    pub machine: Option<Stats>,
    /// The guest's own words; none where its agent has not answered in time.
    pub guest: Option<Read>,
}

impl Sandbox {
    /// Figures of the machine and of the guest.
    ///
    /// # Errors
    /// [`Error::State`] or [`Error::Ended`] of a pod without a machine.
    pub async fn figures(&self) -> Result<Figures> {
        let pod = self.ask(|state| state.up()).await??;
        let request = GetMetricsRequest::new();
        let guest = async {
            let asked = pod
                .agent
                .call("GetMetrics", Patience::Bounded, async |agent, ctx| agent.get_metrics(ctx, &request).await);
            let answer =
                tokio::time::timeout(PATIENCE, asked).await.map_err(|_| Error::Timeout("too slow".into()))??;
            let mut found = read(&answer.metrics, &GUEST);
            let mut known = pod.series.lock().unwrap_or_else(PoisonError::into_inner);
            found.refused += found.families.keep_known(&mut known, SERIES_MAX);
            Ok::<_, Error>(found)
        };
        let machine = tokio::time::timeout(PATIENCE, pod.machine.stats());
        let (guest, machine) = tokio::join!(guest, machine);
        if let Err(error) = &guest {
            log::debug!("the guest has said no figures: {error}");
        }
        Ok(Figures { machine: machine.ok().and_then(std::result::Result::ok), guest: guest.ok() })
    }

    /// Where the guest can be reached, by Kata's words: `hvsock://PATH`, `vsock://CID`.
    ///
    /// # Errors
    /// As [`Self::figures`].
    pub async fn agent_url(&self) -> Result<String> {
        let pod = self.ask(|state| state.up()).await??;
        Ok(match pod.machine.agent_address() {
            AgentAddress::Hybrid(path) => format!("hvsock://{}", path.display()),
            AgentAddress::Vsock { cid } => format!("vsock://{cid}"),
            AgentAddress::Sockets(_) => String::new(),
        })
    }

    /// How the machine is run: `kvm`, `emulation`.
    ///
    /// # Errors
    /// As [`Self::figures`].
    pub async fn accelerator(&self) -> Result<&'static str> {
        Ok(self.ask(|state| state.up()).await??.machine.accelerator().name())
    }
}

//! Figures of the pod's machine and guest.

use std::time::Duration;

use coracle_machine::{AgentAddress, Stats};
use coracle_protocol::agent::GetMetricsRequest;
use coracle_protocol::metrics::{Bounds, Read, read};

use crate::agent::Patience;
use crate::{Error, Result, Sandbox};

/// How long the machine and its agent may take together: whoever asks asks many pods.
const PATIENCE: Duration = Duration::from_secs(2);

/// To what the guest's text is held: it speaks of itself, under names that are its own.
const GUEST: Bounds<'_> = Bounds {
    prefixes: &["kata_agent_", "kata_guest_", "coracle_agent_", "coracle_guest_"],
    reserved: &["sandbox_id", "job", "instance", "cri_uid", "cri_name", "cri_namespace"],
    bytes: 512 << 10,
    samples: 5000,
};

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
            Ok::<_, Error>(read(&answer.metrics, &GUEST))
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

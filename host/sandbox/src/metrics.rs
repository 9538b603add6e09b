//! Figures of the pod's machine and guest.

use std::sync::PoisonError;
use std::time::Duration;

use coracle_machine::Stats;
use coracle_protocol::agent::GetMetricsRequest;
use coracle_protocol::metrics::{GUEST, Read, read};

use crate::agent::Patience;
use crate::{Error, Result, Sandbox};

/// How long the machine and its agent may take together: whoever asks asks many pods.
const PATIENCE: Duration = Duration::from_secs(2);

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
            found.refused += found.families.keep_known(&mut known, GUEST.samples);
            Ok::<_, Error>(found)
        };
        let machine = tokio::time::timeout(PATIENCE, pod.machine.stats());
        let (guest, machine) = tokio::join!(guest, machine);
        if let Err(error) = &guest {
            log::debug!("the guest has said no figures: {error}");
        }
        Ok(Figures { machine: machine.ok().and_then(std::result::Result::ok), guest: guest.ok() })
    }

    /// Where the guest can be reached ([`coracle_machine::AgentAddress::url`]); empty where only this process knows.
    ///
    /// # Errors
    /// As [`Self::figures`].
    pub async fn agent_url(&self) -> Result<String> {
        let pod = self.ask(|state| state.up()).await??;
        Ok(pod.machine.agent_address().url().unwrap_or_default())
    }

    /// How the machine is run: `kvm`, `emulation`.
    ///
    /// # Errors
    /// As [`Self::figures`].
    pub async fn accelerator(&self) -> Result<&'static str> {
        Ok(self.ask(|state| state.up()).await??.machine.accelerator().name())
    }
}

//! The guest's clock follows the host's: it is set when the pod comes up, when the host's clock was set or has stood still (a
//! suspend), and from time to time. A small difference is the guest's to make up without a jump. As nothing else is asked of an agent that has
//! nothing to do, this is also what notices that it answers nobody any more.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use coracle_process::ClockWatch;
use coracle_protocol::agent::SetGuestDateTimeRequest;

use crate::agent::{Agent, Patience};
use crate::pod::Pod;
use crate::{Error, Result, Sandbox};

/// How often in a row an agent may not answer before its machine is ended. Each time takes `agent.timeout_seconds`.
const SILENCES_MAX: u32 = 2;

/// Sets the guest's clock to the host's; whether the agent has answered. A guest whose policy does not allow it keeps its own, and so does one that can't; only a
/// connection that has broken is an error.
pub(crate) async fn set(agent: &Agent) -> Result<bool> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let request = SetGuestDateTimeRequest {
        Sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Usec: i64::from(since.subsec_micros()),
        ..Default::default()
    };
    let set = agent
        .call("SetGuestDateTime", Patience::Bounded, async |agent, ctx| agent.set_guest_date_time(ctx, &request).await);
    match set.await {
        Ok(_) => Ok(true),
        Err(error @ (Error::Unreachable(_) | Error::Ended(_))) => Err(error),
        Err(error) => {
            log::info!("the guest keeps its own clock: {error}");
            Ok(!matches!(error, Error::Timeout(_)))
        }
    }
}

/// Keeps it set until the machine ends, and ends the machine of an agent that answers no more.
pub(crate) fn follow(sandbox: &Sandbox, pod: &Arc<Pod>, period: Duration) {
    let (sandbox, end, pod) = (sandbox.clone(), pod.machine.wait(), Arc::downgrade(pod));
    tokio::spawn(async move {
        let following = async {
            let watch = ClockWatch::new(period).map_err(|error| Error::Failed(format!("watch the clock: {error}")))?;
            let mut silences = 0;
            loop {
                watch.changed().await.map_err(|error| Error::Failed(format!("watch the clock: {error}")))?;
                let Some(pod) = pod.upgrade() else { return Ok::<_, Error>(()) };
                silences = if set(&pod.agent).await? { 0 } else { silences + 1 };
                if silences >= SILENCES_MAX {
                    let seconds = pod.agent.timeout().as_secs();
                    let reason = format!("the agent has not answered {silences} times, for {seconds} s each");
                    log::error!("{reason}: the machine is ended");
                    // The reason first: the end that follows is only ours.
                    sandbox.tell(move |state| state.machine_ended(&reason));
                    return Ok(pod.machine.stop().await?);
                }
            }
        };
        tokio::select! {
            biased;
            _ = end => {}
            outcome = following => {
                if let Err(error) = outcome {
                    log::warn!("the guest's clock follows no more: {error}");
                }
            }
        }
    });
}

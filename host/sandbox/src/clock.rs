//! The guest's clock follows the host's: it is set when the pod comes up, when the host's clock was set or has stood still (a
//! suspend), and from time to time. A small difference is the guest's to make up without a jump.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use coracle_process::ClockWatch;
use coracle_protocol::agent::SetGuestDateTimeRequest;

use crate::agent::{Agent, Patience};
use crate::pod::Pod;
use crate::{Error, Result};

/// Sets the guest's clock to the host's. A guest whose policy does not allow it keeps its own, and so does one that can't; only a
/// connection that has broken is an error.
pub(crate) async fn set(agent: &Agent) -> Result<()> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let request = SetGuestDateTimeRequest {
        Sec: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Usec: i64::from(since.subsec_micros()),
        ..Default::default()
    };
    let set = agent
        .call("SetGuestDateTime", Patience::Bounded, async |agent, ctx| agent.set_guest_date_time(ctx, &request).await);
    match set.await {
        Ok(_) => Ok(()),
        Err(error @ (Error::Unreachable(_) | Error::Ended(_))) => Err(error),
        Err(error) => {
            log::info!("the guest keeps its own clock: {error}");
            Ok(())
        }
    }
}

/// Keeps it set until the machine ends.
pub(crate) fn follow(pod: &Arc<Pod>, period: Duration) {
    let (end, pod) = (pod.machine.wait(), Arc::downgrade(pod));
    tokio::spawn(async move {
        let following = async {
            let watch = ClockWatch::new(period).map_err(|error| Error::Failed(format!("watch the clock: {error}")))?;
            loop {
                watch.changed().await.map_err(|error| Error::Failed(format!("watch the clock: {error}")))?;
                let Some(pod) = pod.upgrade() else { return Ok::<_, Error>(()) };
                set(&pod.agent).await?;
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

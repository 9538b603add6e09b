//! Kill: a signal for a process, and the way out of a create or an agent that hangs.

use std::sync::Arc;
use std::time::Duration;

use coracle_protocol::agent::SignalProcessRequest;
use tokio::sync::watch;

use crate::agent::Patience;
use crate::bounded::bounded;
use crate::pod::Pod;
use crate::state::{State, Status};
use crate::{Error, Exit, ProcessId, Result, Sandbox};

const SIGINT: u32 = 2;
const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;
/// The last of the real-time signals (signal(7)).
const SIGNAL_MAX: u32 = 64;

/// How long an agent may take over SIGKILL before the machine is ended in its stead.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// How long a process may take to have ended after its agent has taken SIGKILL: a large one has much to give back. An agent that never tells the
/// end would keep its pod from being removed.
const END_PATIENCE: Duration = Duration::from_secs(30);

/// The ends of a process.
type Ends = watch::Receiver<Option<Exit>>;

enum Target {
    /// A container that was being created, and no longer is.
    Cancelled,
    /// A process that was not started: it ends without the guest's help where it is an exec.
    Unstarted,
    Guest(Arc<Pod>, Ends),
    /// A first process that waits for its start, and has ended for everybody but the guest.
    Unborn(Arc<Pod>, Ends),
    /// The pod itself, which has ended for everybody but its machine.
    Machine(Option<Arc<Pod>>),
}

impl Sandbox {
    /// Sends a signal. A container that is being created is given up by SIGKILL and SIGTERM.
    ///
    /// # Errors
    /// [`Error::NotFound`] for a process that has ended, [`Error::Invalid`] for a number that is no signal.
    pub async fn kill(&self, process: &ProcessId, signal: u32) -> Result<()> {
        // Checked here: the guest's answer may come too late to be told.
        if !(1..=SIGNAL_MAX).contains(&signal) {
            return Err(Error::Invalid(format!("{signal} is no signal")));
        }
        let id = process.clone();
        let target = self
            .ask(move |state| {
                let container = state.container(&id.container)?;
                if id.exec.is_empty() && container.creating.is_some() {
                    if signal != SIGKILL && signal != SIGTERM {
                        return Err(Error::State(format!("container {} is being created", id.container)));
                    }
                    container.creating = None;
                    return Ok(Target::Cancelled);
                }
                if container.is_pod && id.exec.is_empty() {
                    return end_pod(state, &id, signal);
                }
                let unstarted = !id.exec.is_empty();
                let found = state.process(&id)?;
                let starting = found.stdio.is_none();
                let ends = found.exit.subscribe();
                match found.status {
                    Status::Stopped => Err(Error::NotFound(format!("process {}: already ended; it", id.exec))),
                    Status::Created if unstarted && starting => {
                        Err(Error::State(format!("process {} is being started", id.exec)))
                    }
                    // The kernel gives a first process that waits for its start no signal but the last.
                    Status::Created if !unstarted && !starting && (signal == SIGKILL || signal == SIGTERM) => {
                        state.exited(&id, 128 + signal);
                        state.up().map(|pod| Target::Unborn(pod, ends))
                    }
                    Status::Created if unstarted => {
                        state.exited(&id, 128 + signal);
                        Ok(Target::Unstarted)
                    }
                    _ => state.up().map(|pod| Target::Guest(pod, ends)),
                }
            })
            .await??;
        let (pod, signal, ends) = match target {
            Target::Cancelled | Target::Unstarted => return Ok(()),
            Target::Machine(pod) => {
                // The end of the container is told already; that of the machine ends whatever else ran in it.
                tokio::spawn(async move { pod?.machine.stop().await.ok() });
                return Ok(());
            }
            Target::Guest(pod, ends) => (pod, signal, ends),
            Target::Unborn(pod, ends) => (pod, SIGKILL, ends),
        };
        let request = SignalProcessRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            signal,
            ..Default::default()
        };
        // A signal is sent, not awaited: once it is on its way in order, the answer may be that.
        bounded(deliver(pod, request, ends)).await.unwrap_or(Ok(()))
    }
}

/// Ends the container that stands for the pod, as its pause process would end.
fn end_pod(state: &mut State, id: &ProcessId, signal: u32) -> Result<Target> {
    if state.process(id)?.status == Status::Stopped {
        return Err(Error::NotFound(format!("process {}: already ended; it", id.container)));
    }
    if !matches!(signal, SIGKILL | SIGTERM | SIGINT) {
        return Err(Error::Unsupported(format!("signal {signal} for the pod itself: it takes TERM, INT and KILL")));
    }
    state.exited(id, 128 + signal);
    Ok(Target::Machine(state.pod()))
}

/// Brings the signal to the agent. Where that does not take SIGKILL, or takes it and tells of no end, the machine ends in its stead.
async fn deliver(pod: Arc<Pod>, request: SignalProcessRequest, ends: Ends) -> Result<()> {
    let answer = pod
        .agent
        .call("SignalProcess", Patience::Bounded, async |agent, ctx| agent.signal_process(ctx, &request).await);
    if request.signal != SIGKILL {
        return answer.await.map(drop).inspect_err(|error| log::warn!("signal {}: {error}", request.signal));
    }
    let failure = match tokio::time::timeout(KILL_PATIENCE, answer).await {
        Ok(Ok(_)) => {
            tokio::spawn(see_it_end(Arc::clone(&pod), ends));
            return Ok(());
        }
        // One that can't be reached any more tells of nothing, whatever becomes of its guest.
        Ok(Err(Error::Timeout(text) | Error::Unreachable(text))) => text,
        Ok(Err(error)) => {
            // It has ended, the agent says, and has not told that; or could not be sent a signal, as one that is ending.
            if matches!(error, Error::NotFound(_) | Error::Failed(_)) {
                tokio::spawn(see_it_end(Arc::clone(&pod), ends));
            }
            return Err(error);
        }
        Err(_) => "no answer".into(),
    };
    log::warn!("the agent does not take SIGKILL ({failure}): the machine is ended");
    Ok(pod.machine.stop().await?)
}

/// Ends the machine where the end of a process that was killed is not told.
async fn see_it_end(pod: Arc<Pod>, mut ends: Ends) {
    let patience = END_PATIENCE.min(pod.agent.timeout()).max(KILL_PATIENCE);
    if tokio::time::timeout(patience, ends.wait_for(Option::is_some)).await.is_err() {
        log::warn!("the agent tells of no end {} s after SIGKILL: the machine is ended", patience.as_secs());
        if let Err(error) = pod.machine.stop().await {
            log::error!("the machine does not end: {error}");
        }
    }
}

//! What the guest tells of memory that ran out: one answer after the other, and no faster than anybody needs.

use std::sync::{Arc, Weak};
use std::time::Duration;

use coracle_protocol::agent::{GetOOMEventRequest, OOMEvent};

use crate::agent::Patience;
use crate::pod::Pod;
use crate::{Event, Sandbox};

/// The least time between two of them. An agent that invents some is asked no more often, whatever it answers.
const PACE: Duration = Duration::from_millis(100);

/// Tells of each, until the machine ends.
pub(crate) fn follow(sandbox: Sandbox, pod: &Arc<Pod>) {
    let pod = Arc::downgrade(pod);
    let tell = move |event: OOMEvent| {
        sandbox.tell(move |state| {
            // The guest names only what is its own.
            if state.containers.contains_key(&event.container_id) {
                state.emit(Event::OutOfMemory { container: event.container_id });
            }
        });
    };
    tokio::spawn(paced(move || next(Weak::clone(&pod)), tell));
}

/// The next one; none once the machine has ended.
async fn next(pod: Weak<Pod>) -> Option<OOMEvent> {
    let (pod, request) = (pod.upgrade()?, GetOOMEventRequest::new());
    let call =
        pod.agent.call("GetOOMEvent", Patience::Event, async |agent, ctx| agent.get_oom_event(ctx, &request).await);
    call.await.ok()
}

/// Takes what comes until there is no more, with [`PACE`] between two.
async fn paced<T, N: Future<Output = Option<T>>>(mut next: impl FnMut() -> N, mut tell: impl FnMut(T)) {
    while let Some(event) = next().await {
        tell(event);
        // Not for an event: the bound itself, for the guest says when one comes.
        tokio::time::sleep(PACE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_them_is_asked_for_no_faster_than_anybody_needs() {
        let start = tokio::time::Instant::now();
        let (mut asked, mut told) = (0_u32, Vec::new());
        let next = || {
            asked += 1;
            let number = asked;
            async move {
                // After a long quiet as before it. The clock is the test's, and takes no time.
                if number == 50 {
                    tokio::time::sleep(Duration::from_secs(600)).await;
                }
                (number <= 100).then_some(number)
            }
        };
        paced(next, |event| told.push((event, start.elapsed()))).await;
        assert_eq!((told.len(), told[0].1), (100, Duration::ZERO), "the first at once, and none is lost");
        let closest = told.windows(2).map(|pair| pair[1].1 - pair[0].1).min().unwrap();
        assert!(closest >= PACE, "{closest:?}");
        assert!(start.elapsed() < Duration::from_secs(600) + PACE * 101, "{:?}", start.elapsed());
    }
}

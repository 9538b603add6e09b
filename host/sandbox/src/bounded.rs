//! Answers in bounded time, whatever the agent does: a hanging guest must not make its host's runtime look dead.

use std::time::Duration;

use crate::{Error, Result};

/// How long the caller of State, Kill, Delete or Stats waits for the agent: together with the way there and back, less
/// than 100 ms.
const ANSWER_BOUND: Duration = Duration::from_millis(80);

/// Runs `work` to its end, and gives its outcome where that comes within the bound; `None` where it goes on by itself.
pub(crate) async fn bounded<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Option<Result<T>> {
    let work = tokio::spawn(tracing::Instrument::in_current_span(work));
    match tokio::time::timeout(ANSWER_BOUND, work).await {
        Ok(outcome) => Some(outcome.unwrap_or_else(|error| Err(Error::Failed(error.to_string())))),
        Err(_) => None,
    }
}

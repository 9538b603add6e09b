//! Work that blocks: the engine's, and files that may be on the host.

use crate::{Error, Result};

/// Runs `work` on a thread of its own, so that other requests go on.
///
/// # Errors
/// What it says; [`Error::State`] where it panicked.
pub(crate) async fn on_thread<T, E>(work: impl FnOnce() -> std::result::Result<T, E> + Send + 'static) -> Result<T>
where
    T: Send + 'static,
    E: Send + 'static,
    Error: From<E>,
{
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|error| Error::State(error.to_string()))??)
}

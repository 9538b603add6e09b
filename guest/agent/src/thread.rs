//! Work that blocks: the engine's, and files that may be on the host. And work that must not stop in the middle.

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

/// Does `work` to its end, even where the request's deadline passes meanwhile: what it has on a thread could not be taken back, and its name is its
/// own until then. What it has made for nobody, `undo` takes away.
///
/// # Errors
/// What `work` says; [`Error::State`] where it panicked.
pub(crate) async fn to_its_end<T, U>(
    work: impl Future<Output = Result<T>> + Send + 'static,
    undo: impl FnOnce() -> U + Send + 'static,
) -> Result<T>
where
    T: Send + 'static,
    U: Future<Output = ()> + Send,
{
    let (sender, answer) = tokio::sync::oneshot::channel();
    tokio::spawn(async move {
        if let Err(Ok(_)) = sender.send(work.await) {
            undo().await;
        }
    });
    answer.await.map_err(|error| Error::State(error.to_string()))?
}

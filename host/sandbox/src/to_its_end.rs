//! Work that comes to its end even where who asked for it has gone.

use tracing::Instrument;

use crate::{Error, Result};

/// Does `work` on its own, as a part of the trace of who asks, and gives its outcome to who still waits.
pub(crate) async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let done = tokio::spawn(work.in_current_span()).await;
    done.map_err(|error| Error::Failed(error.to_string()))?
}

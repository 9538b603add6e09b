//! What the machines of all drivers answer alike.

use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::{End, Error, Result};

/// A machine's end, for any number of callers, before it comes and after.
#[derive(Debug, Clone)]
pub struct Ends(watch::Receiver<Option<End>>);

impl Ends {
    /// Over what whoever watches the machine will tell, once.
    #[must_use]
    pub fn new(end: watch::Receiver<Option<End>>) -> Self {
        Self(end)
    }

    /// Nothing, or [`Error::Ended`] with the reason.
    ///
    /// # Errors
    /// [`Error::Ended`].
    pub fn check(&self) -> Result<()> {
        match &*self.0.borrow() {
            Some(end) => Err(Error::Ended(end.reason.clone())),
            None => Ok(()),
        }
    }

    /// Waits for the end.
    #[must_use]
    pub fn wait(&self) -> BoxFuture<'static, End> {
        let mut end = self.0.clone();
        Box::pin(async move {
            let reason = end.wait_for(Option::is_some).await.map(|end| end.clone());
            reason.ok().flatten().unwrap_or_else(|| End { reason: "the machine is gone".into() })
        })
    }
}

/// The answer to a verb that a machine has not.
pub fn unsupported<T: Send + 'static>(what: &str) -> BoxFuture<'static, Result<T>> {
    let error = Error::Unsupported(what.to_owned());
    Box::pin(async move { Err(error) })
}

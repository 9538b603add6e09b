//! Wait: answers when a process has ended.

use crate::{Error, Exit, ProcessId, Result, Sandbox};

impl Sandbox {
    /// The process's end, once there is one.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Gone`] where the process was deleted meanwhile.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit> {
        let id = process.clone();
        let mut exit = self.ask(move |state| state.process(&id).map(|process| process.exit.subscribe())).await??;
        let ended = exit.wait_for(Option::is_some).await.map_err(|_| Error::Gone)?;
        (*ended).ok_or(Error::Gone)
    }
}

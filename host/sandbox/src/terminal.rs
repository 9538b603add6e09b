//! The terminal's size, and the end of a process's input.

use coracle_protocol::agent::TtyWinResizeRequest;

use crate::agent::Patience;
use crate::{Error, ProcessId, Result, Sandbox};

impl Sandbox {
    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// [`Error::State`] for a process without one.
    pub async fn resize(&self, process: &ProcessId, columns: u32, rows: u32) -> Result<()> {
        let id = process.clone();
        let pod = self
            .ask(move |state| {
                let found = state.process(&id)?;
                if !found.terminal {
                    return Err(Error::State("the process has no terminal".into()));
                }
                // An exec that is not started has no terminal yet: its size comes with its specification.
                if let Some(spec) = found.spec.as_mut() {
                    let size = spec.ConsoleSize.mut_or_insert_default();
                    (size.Width, size.Height) = (columns, rows);
                    return Ok(None);
                }
                state.up().map(Some)
            })
            .await??;
        let Some(pod) = pod else { return Ok(()) };
        let request = TtyWinResizeRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            row: rows,
            column: columns,
            ..Default::default()
        };
        pod.agent
            .call("TtyWinResize", Patience::Bounded, async |agent, ctx| agent.tty_win_resize(ctx, &request).await)
            .await
            .map(drop)
    }

    /// Lets a process's input end when its last writer closes it.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub async fn close_input(&self, process: &ProcessId) -> Result<()> {
        let id = process.clone();
        self.ask(move |state| state.process(&id).map(|process| process.keeper = None)).await?
    }
}

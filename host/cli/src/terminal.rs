//! The caller's terminal.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal in raw mode; dropping this puts it back.
pub(crate) struct Raw {
    before: Termios,
}

impl Raw {
    /// Sets the terminal behind standard input to raw mode.
    pub(crate) fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        if !isatty(&stdin) {
            bail!("the input is no terminal: leave out --tty");
        }
        let before = tcgetattr(&stdin).context("read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Drain, &raw).context("set the terminal's mode")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Columns and rows of the terminal, where there is one.
pub(crate) fn size() -> Option<(u32, u32)> {
    fn of(fd: BorrowedFd<'_>) -> Option<(u32, u32)> {
        let size = tcgetwinsize(fd).ok()?;
        Some((size.ws_col.into(), size.ws_row.into())).filter(|(columns, rows)| *columns > 0 && *rows > 0)
    }
    of(std::io::stdout().as_fd()).or_else(|| of(std::io::stdin().as_fd()))
}

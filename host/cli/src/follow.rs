//! `coracle attach`: what a detached container prints from now on, and signals to it, until it ends.

use anyhow::{Result, bail};

use crate::attach::Signals;
use crate::container::Root;
use crate::logs::Outputs;
use crate::task::Task;

/// Show what a detached container prints from now on, pass signals on to it, and exit with its code.
///
/// A detached container has no input and no terminal: `coracle exec` starts a process that has.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container: its name or id.
    container: String,
    /// Leave the container alone when a signal comes, and only stop looking.
    #[arg(long)]
    no_signals: bool,
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<u8> {
    let (folder, record) = root.find(&args.container)?;
    if !record.detached {
        bail!("{} was not detached: it is attached to the terminal that has started it", record.name);
    }
    let mut outputs = Outputs::new(&folder);
    outputs.skip()?;
    let task = Task::connect(&record).await?;
    let mut signals = if args.no_signals { None } else { Some(Signals::new()?) };
    let ended = task.wait("");
    tokio::pin!(ended);
    let code = loop {
        let signal = async {
            match &mut signals {
                Some(signals) => signals.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            code = &mut ended => break code?,
            // A process that has ended meanwhile needs no signal.
            // The size of this terminal is nothing to one without a terminal.
            number = signal => if number != libc::SIGWINCH.unsigned_abs() { let _ = task.kill("", number).await; },
            () = outputs.tick() => outputs.show()?,
        }
    };
    outputs.show()?;
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

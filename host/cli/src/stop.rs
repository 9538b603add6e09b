//! `coracle stop`.

use std::time::Duration;

use anyhow::Result;

use crate::container::{Folder, Record, Root};
use crate::kill::signal_number;
use crate::task::{self, Task};
use crate::{network, run};

/// Ask a container to end, and kill it where it does not.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The containers: names or ids.
    #[arg(required = true)]
    containers: Vec<String>,
    /// Seconds until it is killed.
    #[arg(short, long, default_value_t = 10)]
    time: u64,
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<()> {
    for name in &args.containers {
        let (folder, record) = root.find(name)?;
        if record.exit.is_none() {
            let signal = if record.stop_signal.is_empty() { "TERM" } else { &record.stop_signal };
            let signal = signal_number(signal)?;
            end(&folder, record, signal, Duration::from_secs(args.time)).await?;
        }
        println!("{name}");
    }
    Ok(())
}

/// Ends a container: by `signal`, and after `patience` by SIGKILL. Then nothing of it runs.
pub(crate) async fn end(folder: &Folder, record: Record, signal: u32, patience: Duration) -> Result<()> {
    let Ok(task) = Task::connect(&record).await else { return end_dead(folder, &record.id).await };
    let waiting = task.wait("");
    tokio::pin!(waiting);
    let mut exit = None;
    match task.kill("", signal).await {
        Ok(()) => exit = tokio::time::timeout(patience, &mut waiting).await.ok().and_then(Result::ok),
        Err(error) if task::is_not_found(&error) => {}
        Err(error) => eprintln!("coracle: {error:#}"),
    }
    if exit.is_none() {
        let _ = task.kill("", libc::SIGKILL.unsigned_abs()).await;
        exit = tokio::time::timeout(Duration::from_secs(30), &mut waiting).await.ok().and_then(Result::ok);
    }
    // Its own process does the same, unless it was killed.
    run::finish(folder, record, &task, exit).await
}

/// Cleans up after a container whose shim has died: so has all that ran. Where its shim has ended in good order meanwhile, whoever has
/// seen to that has noted its end.
async fn end_dead(folder: &Folder, id: &str) -> Result<()> {
    let Some((_lock, mut record)) = folder.lock(id).await? else { return Ok(()) };
    if record.address.is_some() {
        crate::shim::delete(folder.path(), &record)?;
        record.address = None;
        record.exit = Some(137);
        folder.write(&record)?;
    }
    network::detach(folder, &mut record).await
}

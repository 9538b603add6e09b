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
    let patience = match task.kill("", signal).await {
        Ok(()) => patience,
        Err(error) => {
            if !task::is_not_found(&error) {
                eprintln!("coracle: {error:#}");
            }
            Duration::ZERO
        }
    };
    let last = async {
        let _ = task.kill("", libc::SIGKILL.unsigned_abs()).await;
    };
    let exit = exit_of(task.wait(""), patience, last).await;
    // Its own process does the same, unless it was killed.
    run::finish(folder, record, &task, exit).await
}

/// How long a process may take to have ended after SIGKILL.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// How a process ended that was sent a signal; where its end does not come in time, `last` is done and it is waited for once more. None where
/// nobody says: an error is an answer, too, after which there is no other, for whoever sees to the container has ended its shim meanwhile.
async fn exit_of(
    waiting: impl Future<Output = Result<u32>>,
    patience: Duration,
    last: impl Future<Output = ()>,
) -> Option<u32> {
    tokio::pin!(waiting);
    let answer = match tokio::time::timeout(patience, &mut waiting).await {
        Ok(answer) => answer,
        Err(_) => {
            last.await;
            tokio::time::timeout(LAST_PATIENCE, waiting).await.ok()?
        }
    };
    answer.ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_that_nobody_tells_is_waited_for_once() {
        let never = async { panic!("it is killed once more") };
        let lost = async { anyhow::bail!("the shim has gone") };
        assert_eq!(exit_of(lost, LAST_PATIENCE, never).await, None);
        let killed = tokio::sync::Notify::new();
        let ends = async {
            killed.notified().await;
            Ok(137)
        };
        let last = async { killed.notify_one() };
        assert_eq!(exit_of(ends, Duration::ZERO, last).await, Some(137));
    }
}

//! `coracle rm`.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::container::Root;
use crate::ps::{self, State};
use crate::{network, stop};

/// Remove a container.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The containers: names or ids.
    #[arg(required = true)]
    containers: Vec<String>,
    /// Kill one that runs.
    #[arg(short, long)]
    force: bool,
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<()> {
    for name in &args.containers {
        let (folder, record) = root.find(name)?;
        let state = ps::state(&record).await;
        if matches!(state, State::Running | State::Paused) && !args.force {
            bail!("{name} is {state}: stop it first, or give --force");
        }
        let id = record.id.clone();
        if record.address.is_some() {
            stop::end(&folder, record, libc::SIGKILL.unsigned_abs(), Duration::from_secs(30)).await?;
        }
        if let Some((lock, mut record)) = folder.lock(&id).await? {
            // Of one that was given up on the way to its start, or could not be taken down then.
            network::detach(&folder, &mut record).await?;
            if record.network.is_some() && !args.force {
                bail!("{name} is not removed: with --force it is, whatever stays of its network");
            }
            folder.remove(&lock)?;
        }
        println!("{name}");
    }
    Ok(())
}

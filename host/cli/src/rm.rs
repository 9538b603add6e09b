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
        let (folder, mut record) = root.find(name)?;
        let state = ps::state(&record).await;
        if matches!(state, State::Running | State::Paused) && !args.force {
            bail!("{name} is {state}: stop it first, or give --force");
        }
        if record.address.is_some() {
            stop::end(&folder, record, libc::SIGKILL.unsigned_abs(), Duration::from_secs(30)).await?;
        } else {
            // Of one that was given up on the way to its start.
            network::detach(&folder, &mut record).await;
        }
        folder.remove()?;
        println!("{name}");
    }
    Ok(())
}

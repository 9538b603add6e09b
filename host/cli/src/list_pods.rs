//! `coracle pods`.

use anyhow::Result;

use crate::{pods, table};

/// List pods that run: containerd's, and those of `coracle run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let pods: Vec<_> = pods::described().await?.into_iter().map(|(_, about)| about).collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&pods)?);
        return Ok(());
    }
    let rows: Vec<_> = pods
        .into_iter()
        .map(|about| {
            let (name, count) = (about.kubernetes.name, about.containers.len().to_string());
            [about.id, about.namespace, name, count, about.monitor, about.accelerator, table::age(about.started)]
        })
        .collect();
    table::print(["ID", "NAMESPACE", "POD", "CONTAINERS", "MONITOR", "MACHINE", "AGE"], &rows);
    Ok(())
}

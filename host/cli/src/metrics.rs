//! `coracle metrics`.

use anyhow::{Result, bail};

use crate::pods;

/// Print figures of pods that run, as Prometheus reads them.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod, by its id, the beginning of that, or NAMESPACE/NAME of Kubernetes; all where none is named.
    pod: Option<String>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let (pods, silent) = pods::chosen(args.pod.as_deref()).await?;
    let (families, failed) = pods::figures(pods).await;
    print!("{families}");
    let failed = failed + silent;
    if failed > 0 {
        bail!("{failed} pods have not answered");
    }
    Ok(())
}

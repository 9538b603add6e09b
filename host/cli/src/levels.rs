//! `coracle levels`.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::ttrpc;
use coracle_protocol::management::{LEVELS, POD};
use serde_json::{Value, json};

use crate::pods;

/// Show or change how much a running pod's shim logs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod, by its id, the beginning of that, or NAMESPACE/NAME of Kubernetes.
    pod: String,
    /// The levels from now on, as the setting log.levels has them, such as "info,console=debug"; without it they are shown.
    levels: Option<String>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let (pod, about) = pods::find(&args.pod).await?;
    let wanted = args.levels.map_or_else(|| json!({}), |levels| json!({ "levels": levels }));
    let answer = match pod.call(POD, LEVELS, wanted.to_string().into_bytes(), Duration::from_secs(5)).await {
        Ok(answer) => answer,
        Err(ttrpc::Error::RpcStatus(status)) => bail!("{}", status.message()),
        Err(error) => return Err(error).with_context(|| format!("the pod {} does not answer", about.id)),
    };
    let answer: Value = serde_json::from_slice(&answer).context("the shim's answer")?;
    for part in answer["levels"].as_str().unwrap_or_default().split(',') {
        if let Some((component, level)) = part.split_once('=') {
            println!("{component:<10}{level}");
        }
    }
    Ok(())
}

//! `coracle levels`.

use anyhow::Result;
use coracle_protocol::management::LEVELS;
use serde_json::json;

use crate::pods;

/// Show or change how much a running pod's shim logs.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod, by its id, the beginning of that, or NAMESPACE/NAME of Kubernetes.
    pod: String,
    /// The levels from now on, as the setting log.levels has them, such as "info,console=debug"; without it they are shown.
    levels: Option<String>,
    /// Print JSON: an object of components and their levels.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let (pod, _) = pods::find(&args.pod).await?;
    let wanted = args.levels.map_or_else(|| json!({}), |levels| json!({ "levels": levels }));
    let answer = pod.ask(LEVELS, &wanted).await?;
    let levels = answer["levels"].as_str().unwrap_or_default().split(',').filter_map(|part| part.split_once('='));
    if args.json {
        let levels: serde_json::Map<_, _> = levels.map(|(name, level)| (name.to_owned(), level.into())).collect();
        println!("{}", serde_json::to_string_pretty(&levels)?);
    } else {
        levels.for_each(|(name, level)| println!("{name:<10}{level}"));
    }
    Ok(())
}

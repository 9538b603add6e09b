//! `coracle stats`.

use anyhow::{Context, Result};
use coracle_protocol::management::{Description, USAGE, Usage};
use futures::StreamExt;
use serde_json::json;

use crate::{pods, table};

/// Show what containers use: of pods, and of `coracle run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod, by its id, the beginning of that, or NAMESPACE/NAME of Kubernetes; all where none is named.
    pod: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let (pods, _) = pods::chosen(args.pod.as_deref()).await?;
    let ask = |(pod, about): (pods::Pod, Description)| async move {
        let all = pod.ask(USAGE, &json!({})).await;
        let all = all.and_then(|all| serde_json::from_value::<Vec<Usage>>(all).context("the shim's answer"));
        (about.id, all)
    };
    let mut found: Vec<(String, Usage)> = Vec::new();
    let mut asked = futures::stream::iter(pods).map(ask).buffered(pods::AT_ONCE);
    while let Some((id, all)) = asked.next().await {
        match all {
            Ok(all) => found.extend(all.into_iter().map(|usage| (id.clone(), usage))),
            // One that comes or goes just now has nothing to say; of one that was named it is said.
            Err(error) if args.pod.is_some() => return Err(error),
            Err(error) => eprintln!("coracle: the pod {id}: {error:#}"),
        }
    }
    if args.json {
        let all: Vec<_> = found.iter().map(|(pod, usage)| json!({ "pod": pod, "usage": usage })).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(());
    }
    let rows: Vec<_> = found
        .into_iter()
        .map(|(pod, usage)| {
            [
                table::short(&pod, 20),
                table::short(&usage.container, 20),
                format!("{:.2} s", std::time::Duration::from_nanos(usage.cpu_nanoseconds).as_secs_f64()),
                table::size(usage.memory_bytes),
                usage.memory_limit_bytes.map_or_else(|| "-".into(), table::size),
                usage.processes.to_string(),
                format!("{} / {}", table::size(usage.read_bytes), table::size(usage.written_bytes)),
                format!("{} / {}", table::size(usage.received_bytes), table::size(usage.sent_bytes)),
            ]
        })
        .collect();
    table::print(["POD", "CONTAINER", "CPU", "MEMORY", "LIMIT", "PIDS", "READ / WRITTEN", "RECEIVED / SENT"], &rows);
    Ok(())
}

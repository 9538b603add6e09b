//! `coracle volume`: volumes that a pod's guest has mounted, by the shims of all pods of this user's.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::ttrpc::{self, Code};
use coracle_protocol::management::VOLUMES;
use serde_json::{Value, json};

use crate::pods;

/// Volumes that a guest has mounted by itself: disks and memory.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Say how full a volume is, as its guest sees it.
    Stats {
        /// The volume's folder on the host, as it is mounted into a container.
        path: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Give a volume that is a disk more room, while it is used.
    Resize {
        /// The volume's folder on the host, as it is mounted into a container.
        path: PathBuf,
        /// Its size from then on: a number of bytes, or one with K, M, G or T behind it. It is never smaller than before.
        size: String,
    },
}

/// How long a shim may take.
const PATIENCE: Duration = Duration::from_secs(300);

pub(crate) async fn run(command: Command) -> Result<()> {
    match command {
        Command::Stats { path, json } => {
            let found = ask("Stats", &path, &json!({ "path": path })).await?;
            if json {
                println!("{found}");
                return Ok(());
            }
            println!("{:<8}{:>16}{:>16}{:>16}", "", "total", "used", "available");
            for usage in found["usage"].as_array().into_iter().flatten() {
                let unit = usage["unit"].as_str().unwrap_or_default();
                println!("{unit:<8}{:>16}{:>16}{:>16}", usage["total"], usage["used"], usage["available"]);
            }
        }
        Command::Resize { path, size } => {
            let bytes = crate::spec::parse_bytes(&size)?;
            ask("Resize", &path, &json!({ "path": path, "bytes": bytes })).await?;
        }
    }
    Ok(())
}

/// Asks the shims of all pods, one after another, until one knows the volume.
async fn ask(method: &str, path: &Path, wanted: &Value) -> Result<Value> {
    if !path.is_absolute() {
        bail!("{} is not absolute: name the volume as it is mounted into the container", path.display());
    }
    let pods = pods::all()?;
    // As it is mounted: without a slash at its end, which a shell writes.
    let wanted = &{
        let mut wanted = wanted.clone();
        wanted["path"] = json!(path.components().collect::<PathBuf>());
        wanted
    };
    let mut failed = None;
    for pod in pods {
        match pod.call(VOLUMES, method, wanted.to_string().into_bytes(), PATIENCE).await {
            Ok(found) => return serde_json::from_slice(&found).context("the shim's answer"),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => {}
            Err(ttrpc::Error::RpcStatus(status)) => bail!("{}", status.message()),
            // A pod that is ending answers nobody: another one may.
            Err(error) => {
                failed = Some(anyhow::anyhow!("the pod at {} does not answer: {error}", pod.socket().display()))
            }
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    bail!(
        "no pod below {} has the volume {} mounted in its guest: whole volumes that are disks or memory are; shared folders are the host's",
        pods::folder()?.display(),
        path.display()
    )
}

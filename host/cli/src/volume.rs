//! `coracle volume`: volumes that a pod's guest has mounted, by the shims of all pods of this user's.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::shim_async::Client;
use containerd_shim_protos::ttrpc::{self, Code, Request};
use coracle_settings::Settings;
use serde_json::{Value, json};

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
    let folder = Settings::load()?.run_folder;
    let pods = match std::fs::read_dir(&folder) {
        Ok(pods) => pods.flatten().map(|pod| pod.path().join("shim.sock")).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("list the pods in {}", folder.display())),
    };
    // As it is mounted: without a slash at its end, which a shell writes.
    let wanted = &{
        let mut wanted = wanted.clone();
        wanted["path"] = json!(path.components().collect::<PathBuf>());
        wanted
    };
    let mut failed = None;
    for socket in pods.into_iter().filter(|socket| socket.exists()) {
        match call(&socket, method, wanted).await {
            Ok(found) => return Ok(found),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == Code::NOT_FOUND => {}
            Err(ttrpc::Error::RpcStatus(status)) => bail!("{}", status.message()),
            // A pod that is ending answers nobody: another one may.
            Err(error) => failed = Some(anyhow::anyhow!("the pod at {} does not answer: {error}", socket.display())),
        }
    }
    if let Some(error) = failed {
        return Err(error);
    }
    bail!(
        "no pod below {} has the volume {} mounted in its guest: whole volumes that are disks or memory are; shared folders are the host's",
        folder.display(),
        path.display()
    )
}

async fn call(socket: &Path, method: &str, wanted: &Value) -> ttrpc::Result<Value> {
    let client = Client::connect(&format!("unix://{}", socket.display())).await?;
    let mut request = Request::new();
    (request.service, request.method) = ("coracle.Volumes".into(), method.into());
    request.payload = wanted.to_string().into_bytes();
    request.timeout_nano = i64::try_from(PATIENCE.as_nanos()).unwrap_or(i64::MAX);
    let answer = client.request(request).await?;
    serde_json::from_slice(&answer.payload).map_err(|error| ttrpc::Error::Others(error.to_string()))
}

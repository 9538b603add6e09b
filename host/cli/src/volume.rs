//! `coracle volume`: volumes that a pod's guest has mounted, by the shims of all pods of this user's.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::ttrpc::{self, Code};
use coracle_protocol::management::VOLUMES;
use coracle_settings::Settings;
use serde_json::{Value, json};

use crate::pods;

/// Volumes that a guest has mounted by itself: disks and memory.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Have a disk stand for a volume: kubelet's folder of the volume is then mounted by the guest from the disk itself (Kata's direct volumes).
    Add {
        /// The volume's folder on the host, as it will be mounted into a container.
        path: PathBuf,
        /// The description: {"volume-type": "block", "device": "/dev/…", "fstype": "ext4", "options": […], "metadata": {…}}.
        description: String,
    },
    /// Take such a description away. A pod that has the volume keeps it.
    Remove {
        /// The volume's folder on the host.
        path: PathBuf,
    },
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
        Command::Add { path, description } => add(&path, &description)?,
        Command::Remove { path } => {
            let folder = described(&path)?;
            std::fs::remove_dir_all(&folder)
                .with_context(|| format!("there is no description of {} (at {})", path.display(), folder.display()))?;
        }
        Command::Resize { path, size } => {
            let bytes = crate::spec::parse_bytes(&size)?;
            ask("Resize", &path, &json!({ "path": path, "bytes": bytes })).await?;
        }
    }
    Ok(())
}

/// Where a volume is described (Kata Containers: docs/design/direct-blk-device-assignment.md).
fn described(path: &Path) -> Result<PathBuf> {
    use base64::Engine;
    if !path.is_absolute() {
        bail!("{} is not absolute: name the volume as it is mounted into the container", path.display());
    }
    // As it is mounted: without a slash at its end, which a shell writes.
    let path: PathBuf = path.components().collect();
    let name = base64::engine::general_purpose::URL_SAFE.encode(path.to_str().context("the path is not UTF-8")?);
    Ok(Settings::load()?.storage_direct_volumes.join(name))
}

fn add(path: &Path, description: &str) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let parsed: Value = serde_json::from_str(description).context("the description is no JSON")?;
    // Kata's two runtimes have a word each for the same.
    if parsed["volume-type"] != "block" && parsed["volume-type"] != "directvol" {
        bail!(
            "the description's \"volume-type\" is neither \"block\" nor \"directvol\", which mean the same; others are not supported"
        );
    }
    if !parsed["device"].as_str().is_some_and(|device| Path::new(device).is_absolute()) {
        bail!("the description's \"device\" is no absolute path");
    }
    let folder = described(path)?;
    // Its options may hold what is nobody else's to read.
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.with_context(|| format!("make {}", folder.display()))?;
    // Whole or not there: a pod may be looking.
    let (file, beside) = (folder.join(INFO_FILE), folder.join("new"));
    let written = std::fs::write(&beside, description).and_then(|()| std::fs::rename(&beside, &file));
    written.with_context(|| format!("write {}", file.display()))
}

/// The name of a description.
const INFO_FILE: &str = "mountInfo.json";

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

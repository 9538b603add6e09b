//! `coracle support-bundle`: what somebody who looks for a fault asks for, in one archive, and no secrets.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use coracle_protocol::management::CONSOLE;
use coracle_settings::Loaded;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use crate::container::Root;
use crate::{pods, ps, version};

/// Write versions, settings, pods, their figures and the guests' consoles, and the logs of containers of `coracle run`, into an archive.
///
/// It holds no environment, no command line and no output of a container, and no annotation: those may hold secrets. Look at it before you give it away.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The archive: coracle-support-TIME.tar.gz where none is named.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// How much of a log's end is taken, in bytes, and of a guest's console, in lines.
const LOG_BYTES: u64 = 256 << 10;
const CONSOLE_LINES: usize = 200;

struct Bundle {
    archive: tar::Builder<GzEncoder<File>>,
    names: Vec<String>,
}

impl Bundle {
    fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        let path = format!("coracle-support/{name}");
        self.archive.append_data(&mut header, path, bytes).with_context(|| format!("add {name}"))?;
        self.names.push(name.to_owned());
        Ok(())
    }
}

pub(crate) async fn run(root: &Root, args: Args) -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let output = args.output.unwrap_or_else(|| format!("coracle-support-{now}.tar.gz").into());
    let file = {
        use std::os::unix::fs::OpenOptionsExt;
        let opened = File::options().write(true).create_new(true).mode(0o600).open(&output);
        opened.with_context(|| format!("make {}", output.display()))?
    };
    let archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    let mut bundle = Bundle { archive, names: Vec::new() };
    let filled = fill(&mut bundle, root).await;
    let closed = filled.and_then(|()| bundle.archive.into_inner()?.finish()?.sync_all().map_err(Into::into));
    if let Err(error) = closed {
        let _ = std::fs::remove_file(&output);
        return Err(error).with_context(|| format!("write {}", output.display()));
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json!({ "archive": output, "files": bundle.names }))?);
    } else {
        bundle.names.iter().for_each(|name| println!("{name}"));
    }
    eprintln!("coracle: {} holds these: look at them before you give it away", output.display());
    Ok(())
}

async fn fill(bundle: &mut Bundle, root: &Root) -> Result<()> {
    bundle.add("env.json", &serde_json::to_vec_pretty(&version::environment())?)?;
    let settings = match Loaded::of_host(None) {
        Ok(loaded) => loaded.settings.values().into_iter().map(|(key, value)| format!("{key} = {value}\n")).collect(),
        Err(error) => error.to_string(),
    };
    bundle.add("settings.txt", settings.as_bytes())?;
    let mut containers = Vec::new();
    // Each part may be what is broken: then it says so, and the others are there.
    let all = match root.all() {
        Ok(all) => all,
        Err(error) => {
            bundle.add("containers.error", format!("{error:#}").as_bytes())?;
            Vec::new()
        }
    };
    for (folder, record) in all {
        let state = ps::state(&record).await.to_string();
        containers.push(json!({
            "id": record.id, "name": record.name, "image": record.image, "created": record.created, "state": state,
            "machine": record.accelerator, "detached": record.detached,
        }));
        // What the shim has logged, where somebody has asked for it, and what the container's process has warned of.
        for log in ["log", "warnings.log"] {
            if let Some(end) = end_of(&folder.join(log)) {
                bundle.add(&format!("containers/{}/{log}", record.id), &end)?;
            }
        }
    }
    bundle.add("containers.json", &serde_json::to_vec_pretty(&containers)?)?;
    let (described, silent) = match pods::looked_at().await {
        Ok(found) => found,
        Err(error) => {
            bundle.add("pods.error", format!("{error:#}").as_bytes())?;
            (Vec::new(), 0)
        }
    };
    let about: Vec<_> = described.iter().map(|(_, about)| about).collect();
    bundle.add("pods.json", &serde_json::to_vec_pretty(&about)?)?;
    for (pod, about) in &described {
        if let Ok(lines) = pod.ask(CONSOLE, &json!({ "lines": CONSOLE_LINES })).await {
            let lines: Vec<_> = lines.as_array().into_iter().flatten().filter_map(|line| line.as_str()).collect();
            bundle.add(&format!("pods/{}/console.txt", about.id), (lines.join("\n") + "\n").as_bytes())?;
        }
    }
    let (families, failed) = pods::figures(described).await;
    let text = format!("# {} pods have not answered\n{families}", failed + silent);
    bundle.add("metrics.txt", text.as_bytes())
}

/// The end of a file; none where it is no file, which a pipe is that containerd reads.
fn end_of(path: &Path) -> Option<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    if !std::fs::symlink_metadata(path).ok()?.is_file() {
        return None;
    }
    let mut file = File::open(path).ok()?;
    let size = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_BYTES))).ok()?;
    let mut end = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut end).ok()?;
    Some(end)
}

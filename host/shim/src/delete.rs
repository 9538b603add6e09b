//! The action `delete`: after a daemon that has died, and as containerd's last word on any container.

use std::io::Write;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use coracle_protocol::protobuf::{Message, MessageField};
use coracle_settings::Settings;

use crate::args::Args;
use crate::{folder, metrics};

/// How long a daemon that was killed may take to be gone: its socket outlives its connections by a moment.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &Args) -> Result<()> {
    let settings = Settings::load()?;
    let pod = folder::pod(&settings, &args.namespace, &args.id);
    // A daemon that lives serves other containers of its pod, or will end by itself. Its children end with it.
    if folder::is_served(&pod, PATIENCE) {
        log::info!("{} is served: its folder stays", args.id);
    } else {
        folder::remove(&pod).with_context(|| format!("remove {}", pod.display()))?;
    }
    let response = DeleteResponse {
        pid: std::process::id(),
        // As after SIGKILL.
        exit_status: 137,
        exited_at: MessageField::some(metrics::timestamp(SystemTime::now())),
        ..Default::default()
    };
    std::io::stdout().write_all(&response.write_to_bytes()?).context("answer containerd")
}

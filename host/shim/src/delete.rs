//! The action `delete`: after a daemon that has died, and as containerd's last word on any container.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::SystemTime;

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use coracle_protocol::protobuf::{Message, MessageField};
use coracle_settings::Settings;

use crate::args::Args;
use crate::{folder, metrics};

pub(crate) fn run(args: &Args) -> Result<()> {
    let settings = Settings::load()?;
    let pod = folder::pod(&settings, &args.namespace, &args.id);
    // A daemon that lives serves other containers of its pod, or will end by itself. Its children end with it.
    if UnixStream::connect(folder::socket(&pod)).is_err() {
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

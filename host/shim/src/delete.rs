//! The action `delete`: after a daemon that has died, and as containerd's last word on any container.

use std::io::Write;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use coracle_process::Cgroup;
use coracle_protocol::protobuf::{Message, MessageField};
use coracle_settings::Settings;

use crate::args::Args;
use crate::bundle::Membership;
use crate::{bundle, folder, metrics};

/// How long a daemon that was killed may take to be gone: its socket outlives its connections by a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// Removes the control group that the daemon was in, and gives back the `links` that the pod has taken of its network. Without a
/// bundle that can be read nobody knows of either.
fn clean_up_host(args: &Args, links: &[coracle_network::Hold]) {
    let bundle = args.bundle.clone().or_else(|| std::env::current_dir().ok());
    let Some(Ok(spec)) = bundle.map(|bundle| bundle::read(&bundle)) else { return };
    if matches!(bundle::membership(&spec), Membership::Of(_)) {
        return;
    }
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(coracle_sandbox::give_back_network(&spec, links)),
        Err(error) => log::warn!("the links of {} are not given back: {error}", args.id),
    }
    if bundle::cgroup(&spec).is_empty() {
        return;
    }
    match Cgroup::at(bundle::cgroup(&spec)) {
        Ok(cgroup) => cgroup.remove(),
        Err(error) => log::warn!("the control group of {}: {error}", args.id),
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let settings = Settings::load()?;
    let pod = folder::pod(&settings, &args.namespace, &args.id);
    // A daemon that lives serves other containers of its pod, or will end by itself. Its children end with it.
    if folder::is_served(&pod, PATIENCE) {
        log::info!("{} is served: its folder stays", args.id);
    } else {
        let links = coracle_sandbox::taken_links(&folder::machine(&pod));
        folder::remove(&pod).with_context(|| format!("remove {}", pod.display()))?;
        clean_up_host(args, &links);
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

//! The action `delete`: after a daemon that has died, and as containerd's last word on any container.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use containerd_shim_protos::api::DeleteResponse;
use coracle_process::Cgroup;
use coracle_protocol::oci;
use coracle_protocol::protobuf::{Message, MessageField};
use coracle_settings::Settings;

use crate::args::Args;
use crate::bundle::Membership;
use crate::{bundle, folder, metrics};

/// How long a daemon that was killed may take to be gone: its socket outlives its connections by a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// The specification of the bundle that an action is for, unless it is a container of another pod. Without one that can be read nobody
/// knows of the pod's network and control group.
fn own_spec(args: &Args) -> Option<oci::Spec> {
    let bundle = args.bundle.clone().or_else(|| std::env::current_dir().ok())?;
    let spec = bundle::read(&bundle).ok()?;
    (!matches!(bundle::membership(&spec), Membership::Of(_))).then_some(spec)
}

/// Gives back the links that a pod whose daemon has died has taken of its network. Its note of them is left: who is ended halfway leaves
/// it to the next one.
pub(crate) fn give_links_back(args: &Args, pod: &Path) {
    let links = coracle_sandbox::taken_links(&folder::machine(pod));
    if links.is_empty() {
        return;
    }
    let spec = own_spec(args);
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(coracle_sandbox::give_back_network(spec.as_ref(), &links)),
        Err(error) => log::warn!("the links of {} are not given back: {error}", args.id),
    }
}

/// Removes the control group that the daemon was in.
fn remove_cgroup(args: &Args) {
    let Some(path) = own_spec(args).map(|spec| bundle::cgroup(&spec).to_owned()).filter(|path| !path.is_empty()) else {
        return;
    };
    match Cgroup::at(&path) {
        Ok(cgroup) => cgroup.remove(),
        Err(error) => log::warn!("the control group of {}: {error}", args.id),
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    // What is left of a pod goes whatever is wrong with the settings.
    let settings = Settings::load().unwrap_or_else(|error| {
        log::warn!("the settings: {error}: looked for pods where they are by default");
        Settings::default()
    });
    let pod = folder::pod(&settings, &args.namespace, &args.id);
    // A daemon that lives serves other containers of its pod, or will end by itself. Its children end with it.
    if folder::is_served(&pod, PATIENCE) {
        log::info!("{} is served: its folder stays", args.id);
    } else {
        give_links_back(args, &pod);
        folder::remove(&pod).with_context(|| format!("remove {}", pod.display()))?;
        remove_cgroup(args);
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

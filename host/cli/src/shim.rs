//! Starting a shim, as containerd does.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::container::{Folder, Record};
use crate::place;

/// The namespace of containers that `coracle run` starts.
const NAMESPACE: &str = "coracle";

pub(crate) const PROGRAM: &str = "containerd-shim-coracle-v2";

/// Settings that count less than the administrator's: a person at a terminal may use emulation, and is warned; and gets the
/// built-in monitor where it works.
const DEFAULTS: &str = "machine.accelerator = \"any\"\nmachine.monitor = \"auto\"";

/// The shim's program: beside this one, or in `$PATH`.
fn program() -> PathBuf {
    let beside =
        std::env::current_exe().ok().and_then(|own| own.canonicalize().ok()).map(|own| own.with_file_name(PROGRAM));
    beside.filter(|path| path.exists()).unwrap_or_else(|| PROGRAM.into())
}

fn command(overrides: &str) -> Result<Command> {
    let mut command = Command::new(program());
    let defaults = format!("{DEFAULTS}\n{}", place::settings()?);
    command.env(coracle_settings::DEFAULTS, defaults).env(coracle_settings::OVERRIDES, overrides);
    // No containerd listens for events.
    command.env_remove("TTRPC_ADDRESS").env_remove("MAX_SHIM_VERSION").stdin(Stdio::null());
    Ok(command)
}

fn output(mut command: Command) -> Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("start {PROGRAM}: install it beside coracle"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{}", text.trim().trim_start_matches("containerd-shim-coracle-v2: "));
    }
    Ok(output.stdout)
}

/// Starts the container's shim, and gives its address.
pub(crate) fn start(folder: &Folder, record: &Record) -> Result<String> {
    let mut command = command(&record.overrides)?;
    command.args(["-namespace", NAMESPACE, "-id", &record.id]);
    if std::env::var_os("CORACLE_DEBUG").is_some() {
        command.arg("-debug");
    }
    command.arg("start").current_dir(folder.path());
    String::from_utf8(output(command)?).context("the shim's address")
}

/// Cleans up after a shim that has died.
pub(crate) fn delete(folder: &Path, record: &Record) -> Result<()> {
    let mut command = command(&record.overrides)?;
    command.args(["-namespace", NAMESPACE, "-id", &record.id, "delete"]).current_dir(folder);
    output(command).map(drop)
}

/// The shim's version.
pub(crate) fn version() -> Result<String> {
    let mut command = Command::new(program());
    command.arg("-v").stdin(Stdio::null());
    let text = String::from_utf8(output(command)?).context("the shim's version")?;
    Ok(text.trim().rsplit(' ').next().unwrap_or_default().to_owned())
}

/// What this host offers.
pub(crate) fn probe(overrides: &str) -> Result<Value> {
    let mut command = command(overrides)?;
    command.arg("probe");
    serde_json::from_slice(&output(command)?).context("the shim's report")
}

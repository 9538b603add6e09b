//! `coracle version` and `coracle env`.

use anyhow::Result;
use coracle_settings::{FILE, Loaded};
use serde_json::{Value, json};

use crate::{place, pods, shim};

/// Print the versions of this program, of the shim and of the guest image.
#[derive(Debug, clap::Args)]
pub(crate) struct VersionArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Print what a report of a fault should say of this host: versions, monitor, kernel, where things are.
#[derive(Debug, clap::Args)]
pub(crate) struct EnvArgs {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The versions. What can't be asked is told as such.
fn versions() -> Value {
    let shim = shim::version().unwrap_or_else(|error| format!("unknown ({error:#})"));
    let guest = match guest() {
        Ok(manifest) => json!({ "agent": manifest.version, "kernel": manifest.kernel_release }),
        Err(error) => json!({ "problem": format!("{error:#}") }),
    };
    json!({ "coracle": coracle_protocol::VERSION, "shim": shim, "guest": guest })
}

/// The guest image that a container of this user would have.
fn guest() -> Result<coracle_guest_image::Manifest> {
    Ok(coracle_guest_image::read_manifest(&place::guest_in_use()?)?)
}

pub(crate) fn version(args: &VersionArgs) -> Result<()> {
    print(&versions(), args.json)
}

/// What `coracle env` says.
pub(crate) fn environment() -> Value {
    let text = |outcome: Result<String>| outcome.unwrap_or_else(|error| format!("unknown ({error:#})"));
    let uname = rustix::system::uname();
    let settings: Vec<String> = match Loaded::of_host(None) {
        Ok(loaded) => {
            let values = loaded.settings.values().into_iter();
            let changed = values.filter(|(key, _)| !matches!(loaded.origin(key), coracle_settings::Origin::BuiltIn));
            changed.map(|(key, value)| format!("{key} = {value}")).collect()
        }
        Err(error) => vec![error.to_string()],
    };
    let host = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let host = host
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or_default()
        .trim_matches('"')
        .to_owned();
    json!({
        "versions": versions(),
        "host": {
            "system": host,
            "kernel": uname.release().to_string_lossy(),
            "architecture": uname.machine().to_string_lossy(),
            "processors": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
            "memory_mib": (u64::from(rustix::system::sysinfo().mem_unit) * rustix::system::sysinfo().totalram) >> 20,
        },
        "shim": shim::probe("").unwrap_or_else(|error| json!({ "problem": format!("{error:#}") })),
        "places": {
            "settings": FILE,
            "root": text(place::root().map(|path| path.display().to_string())),
            "pods": text(pods::folder().map(|path| path.display().to_string())),
            "guest": text(place::guest_in_use().map(|path| path.display().to_string())),
        },
        "changed_settings": settings,
    })
}

pub(crate) fn env(args: &EnvArgs) -> Result<()> {
    print(&environment(), args.json)
}

/// JSON, or its leaves as lines for people.
fn print(value: &Value, as_json: bool) -> Result<()> {
    if as_json {
        println!("{}", serde_json::to_string_pretty(value)?);
    } else {
        leaves("", value, &mut |path, text| println!("{path:<28}{text}"));
    }
    Ok(())
}

fn leaves(path: &str, value: &Value, show: &mut impl FnMut(&str, &str)) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                leaves(&path, value, show);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| leaves(path, item, show)),
        Value::String(text) => show(path, text),
        other => show(path, &other.to_string()),
    }
}

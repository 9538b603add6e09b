//! Who may import whom: the house's walls, checked by cargo's own metadata.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::metadata;
use crate::steps::top;

/// Crates that a crate must not reach, directly or through others: (who, whom).
const FORBIDDEN: [(&str, &[&str]); 15] = [
    ("coracle-machine", &["coracle-protocol", "coracle-container", "coracle-settings", "coracle-sandbox"]),
    ("coracle-virtio", &["kvm-ioctls", "tokio", "coracle-machine", "coracle-protocol"]),
    ("coracle-vmm", &["tokio", "coracle-machine", "coracle-protocol", "coracle-settings", "coracle-sandbox"]),
    ("coracle-monitor-api", &["tokio", "coracle-machine", "coracle-protocol"]),
    ("coracle-driver-builtin", &["coracle-vmm", "coracle-virtio", "coracle-sandbox", "coracle-settings"]),
    ("coracle-driver-qemu", &["coracle-vmm", "coracle-sandbox", "coracle-settings", "coracle-protocol"]),
    ("coracle-storage", &["coracle-sandbox", "coracle-driver-qemu"]),
    ("coracle-network", &["coracle-sandbox", "coracle-driver-qemu", "coracle-storage", "ttrpc-codegen"]),
    ("coracle-sandbox", &["containerd-shim-protos", "coracle-driver-qemu", "coracle-settings"]),
    ("coracle-container", &["coracle-protocol", "ttrpc", "tokio"]),
    ("coracle-init", &["coracle-protocol", "ttrpc", "tokio"]),
    (
        "coracle-cli",
        &[
            "coracle-sandbox",
            "coracle-driver-qemu",
            "coracle-vmm",
            "coracle-storage",
            "coracle-network",
            "coracle-virtio",
        ],
    ),
    ("coracle-settings", &["coracle-sandbox", "tokio"]),
    ("coracle-cni", &["coracle-sandbox", "coracle-network", "coracle-settings", "coracle-machine"]),
    ("coracle-process", &["coracle-machine", "coracle-protocol"]),
];

/// Folder names that say nothing.
const NAMELESS: [&str; 6] = ["util", "utils", "common", "helper", "helpers", "manager"];

/// The most lines of a file, tests left out.
const LINES_MAX: usize = 800;

/// The wing that a package's folder is in.
fn wing(path: &str) -> &str {
    path.split('/').next().unwrap_or_default()
}

pub(crate) fn run() -> Result<()> {
    let metadata = metadata::read(None)?;
    let mut faults = wings(&metadata)?;
    faults.extend(forbidden(&metadata)?);
    faults.extend(files()?);
    faults.extend(crate::sleeps::faults()?);
    if faults.is_empty() {
        println!("layers: ok");
        return Ok(());
    }
    bail!("layers:\n  {}", faults.join("\n  "))
}

/// Direct dependencies between wings.
fn wings(metadata: &Value) -> Result<Vec<String>> {
    let top = top().display().to_string();
    let mut faults = Vec::new();
    for package in metadata["packages"].as_array().context("packages")? {
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        let Some(path) = manifest.strip_prefix(&format!("{top}/")) else { continue };
        let own = wing(path);
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let Some(other) = dependency["path"].as_str().and_then(|other| other.strip_prefix(&format!("{top}/")))
            else {
                continue;
            };
            let other = wing(other);
            let allowed = match own {
                "boundary" => other == "boundary",
                "host" => matches!(other, "host" | "boundary"),
                "guest" => matches!(other, "guest" | "boundary"),
                "fuzz" => true,
                "tests" => path.starts_with("tests/flow"),
                // What measures knows what a measurement shows.
                "xtask" | "dashboard" => other == "dashboard",
                _ => false,
            };
            if !allowed {
                faults.push(format!("{path} depends on {}", dependency["path"]));
            }
        }
    }
    Ok(faults)
}

fn forbidden(metadata: &Value) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for (name, forbidden) in FORBIDDEN {
        let reached = metadata::reached(metadata, name, |_| true)?;
        for other in forbidden {
            if reached.iter().any(|reached| reached["name"] == *other) {
                faults.push(format!("{name} reaches {other}"));
            }
        }
    }
    Ok(faults)
}

/// Whether a file is a program of end-to-end tests.
fn is_test_program(path: &str) -> bool {
    path.strip_prefix("tests/e2e/tests/").is_some_and(|rest| !rest.contains('/') || rest.ends_with("/main.rs"))
}

/// Names and sizes of source files.
fn files() -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for path in &crate::steps::files(&["*.rs"])? {
        let stem = |part: &str| part.trim_end_matches(".rs").to_owned();
        if path.split('/').any(|part| NAMELESS.contains(&stem(part).as_str())) {
            faults.push(format!("{path}: a name that says nothing"));
        }
        // Which lane a test is of is said at its head (CONTRIBUTING.md).
        if is_test_program(path) {
            let text = std::fs::read_to_string(top().join(path)).with_context(|| path.to_owned())?;
            if !text.lines().take_while(|line| line.starts_with("//!")).any(|line| line.starts_with("//! Lane")) {
                faults.push(format!("{path}: its head does not say of which lane it is (\"Lane: open: why\")"));
            }
        }
        let Ok(text) = std::fs::read_to_string(top().join(path)) else { continue };
        let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
        if lines > LINES_MAX {
            faults.push(format!("{path}: {lines} lines, more than {LINES_MAX}"));
        }
    }
    Ok(faults)
}

//! Building: host programs, the guest's static programs, the guest image.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::setup::privileged;
use crate::steps::{command, output, run, step};

/// The target of the guest's programs: it must be named even where it is the host's, or proc-macros would be static too.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Functions of glibc that would load libraries from a container's root into the agent (see docs/decisions).
const FORBIDDEN: [&str; 6] = ["getpwnam_r", "getgrnam_r", "getpwuid_r", "getgrgid_r", "initgroups", "getaddrinfo"];

/// What was built.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    target: PathBuf,
}

impl Built {
    pub(crate) fn coracle(&self) -> PathBuf {
        self.target.join("release/coracle")
    }

    pub(crate) fn shim(&self) -> PathBuf {
        self.target.join("release/containerd-shim-coracle-v2")
    }

    pub(crate) fn agent(&self) -> PathBuf {
        self.guest_folder().join("stripped/coracle-agent")
    }

    pub(crate) fn guest_probe(&self) -> PathBuf {
        self.guest_folder().join("stripped/guest-probe")
    }

    fn guest_folder(&self) -> PathBuf {
        self.target.join(GUEST_TARGET).join("guest")
    }

    pub(crate) fn work(&self) -> PathBuf {
        self.target.join("xtask")
    }

    /// The guest image of a kernel package, made where it is missing or older than its parts.
    pub(crate) fn guest(&self, kernel: &str) -> Result<PathBuf> {
        let folder = self.work().join(format!("guest-{kernel}"));
        let stamp = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
        let (made, agent) = (stamp(&folder.join("manifest.json")), stamp(&self.agent()));
        if made.is_some() && made >= agent && made >= stamp(&self.coracle()) {
            return Ok(folder);
        }
        let agent = self.agent();
        let make = || {
            let mut build = command(&self.coracle().display().to_string(), &["image", "build", "--kernel", kernel]);
            build.arg("--agent").arg(&agent).arg("--output").arg(&folder).stdout(std::process::Stdio::null());
            run(build)
        };
        step(&format!("making the guest image of {kernel}"), || {
            if make().is_ok() {
                return Ok(());
            }
            // apt's lists may be missing on a fresh machine.
            let words = privileged(&["apt-get", "update", "-q"]);
            run(command(words[0], &words[1..]))?;
            make()
        })?;
        Ok(folder)
    }
}

/// cargo's folder for what it builds.
pub(crate) fn target() -> Result<PathBuf> {
    let text = output(command("cargo", &["metadata", "--format-version=1", "--no-deps"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("cargo metadata")?;
    metadata["target_directory"].as_str().map(PathBuf::from).context("cargo metadata names no target directory")
}

/// Builds everything in release.
pub(crate) fn all() -> Result<Built> {
    let built = Built { target: target()? };
    step("building the host's programs", || {
        run(command("cargo", &["build", "--release", "--locked", "-p", "coracle-cli", "-p", "coracle-shim"]))
    })?;
    step("building the guest's programs", || {
        let mut build = command(
            "cargo",
            &[
                "build",
                "--profile",
                "guest",
                "--locked",
                "--target",
                GUEST_TARGET,
                "-p",
                "coracle-agent",
                "-p",
                "guest-probe",
            ],
        );
        build.env("RUSTFLAGS", "-C target-feature=+crt-static");
        run(build)
    })?;
    let agent = built.guest_folder().join("coracle-agent");
    check_agent(&agent)?;
    strip(&agent, &built.agent())?;
    strip(&built.guest_folder().join("guest-probe"), &built.guest_probe())?;
    Ok(built)
}

/// The gate for the agent: static, and none of the functions that would make it load more. The symbols are those of a
/// build that was not stripped; `nm` reads them.
fn check_agent(agent: &Path) -> Result<()> {
    let symbols = output(command("nm", &[&agent.display().to_string()]))?;
    if symbols.lines().count() < 100 {
        bail!("{} has no symbols to check", agent.display());
    }
    for line in symbols.lines() {
        let name = line.split_whitespace().last().unwrap_or_default();
        if FORBIDDEN.contains(&name) {
            bail!("the agent holds {name}, which would load code from a container's root");
        }
    }
    // A dynamic program names its loader in a header of its own.
    let headers = output(command("readelf", &["--program-headers", "--wide", &agent.display().to_string()]))?;
    if headers.contains("INTERP") {
        bail!("the agent is not static");
    }
    Ok(())
}

/// Makes the program without symbols, unless it is there and newer.
fn strip(from: &Path, to: &Path) -> Result<()> {
    let time = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    if time(to).is_some() && time(to) >= time(from) {
        return Ok(());
    }
    if let Some(folder) = to.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    run(command("strip", &["-o", &to.display().to_string(), &from.display().to_string()]))
}

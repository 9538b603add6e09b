//! Building: the command line, the static programs (the shim and the guest's), the guest image.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::setup::privileged;
use crate::steps::{command, output, run, step};

/// The target of static programs: it must be named even where it is the host's, or proc-macros would be static too.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Functions of glibc that would load libraries into a static program, the agent's from a container's root (see docs/decisions).
const FORBIDDEN: [&str; 6] = ["getpwnam_r", "getgrnam_r", "getpwuid_r", "getgrgid_r", "initgroups", NAMES_OF_HOSTS];

/// The shim has this one from ttrpc, which connects by TCP, too; the shim's addresses are sockets' paths.
const NAMES_OF_HOSTS: &str = "getaddrinfo";

const SHIM: &str = "containerd-shim-coracle-v2";

/// What was built.
#[derive(Debug, Clone)]
pub(crate) struct Built {
    target: PathBuf,
}

impl Built {
    /// What another checkout has built into its target folder.
    pub(crate) fn at(target: PathBuf) -> Self {
        Self { target }
    }

    pub(crate) fn coracle(&self) -> PathBuf {
        self.program("coracle")
    }

    pub(crate) fn shim(&self) -> PathBuf {
        self.program(SHIM)
    }

    pub(crate) fn agent(&self) -> PathBuf {
        self.program("coracle-agent")
    }

    pub(crate) fn guest_probe(&self) -> PathBuf {
        self.program("guest-probe")
    }

    /// A program as it is installed.
    fn program(&self, name: &str) -> PathBuf {
        self.target.join("programs").join(name)
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
    step("building the command line", || {
        run(command("cargo", &["build", "--release", "--locked", "-p", "coracle-cli"]))
    })?;
    // Each by itself: what one asks of a library is not the other's.
    step("building the shim", || build_static(&["coracle-shim"]))?;
    step("building the guest's programs", || build_static(&["coracle-agent", "guest-probe"]))?;
    strip(&built.target.join("release/coracle"), &built.coracle())?;
    let folder = built.target.join(STATIC_TARGET).join("static");
    for (name, program) in
        [(SHIM, built.shim()), ("coracle-agent", built.agent()), ("guest-probe", built.guest_probe())]
    {
        check_static(&folder.join(name))?;
        strip(&folder.join(name), &program)?;
    }
    for program in [built.coracle(), built.shim(), built.agent()] {
        check_faults(&program)?;
    }
    Ok(built)
}

/// What a program says that tests can make fail (boundary/faults).
const INJECTED: &[u8] = b"a fault was injected at";

/// The gate for programs that are shipped: nothing in them fails because somebody has asked for it.
fn check_faults(program: &Path) -> Result<()> {
    let bytes = std::fs::read(program).with_context(|| format!("read {}", program.display()))?;
    if bytes.windows(INJECTED.len()).any(|window| window == INJECTED) {
        bail!("{} was built with the feature `inject`: build it by itself", program.display());
    }
    Ok(())
}

/// Builds programs that need nothing of the system on which they run: the guest's find no libraries there, and a monitor that starts without a
/// loader starts in half the time.
fn build_static(packages: &[&str]) -> Result<()> {
    let mut build = command("cargo", &["build", "--profile", "static", "--locked", "--target", STATIC_TARGET]);
    build.args(packages.iter().flat_map(|package| ["-p", package])).env("RUSTFLAGS", "-C target-feature=+crt-static");
    run(build)
}

/// The gate for static programs: none of the functions that would make them load libraries all the same, in the agent's case from a container's
/// root. The symbols are those of a build that was not stripped; `nm` reads them.
fn check_static(program: &Path) -> Result<()> {
    let symbols = output(command("nm", &[&program.display().to_string()]))?;
    if symbols.lines().count() < 100 {
        bail!("{} has no symbols to check", program.display());
    }
    for line in symbols.lines() {
        let name = line.split_whitespace().last().unwrap_or_default();
        if FORBIDDEN.contains(&name) && !(name == NAMES_OF_HOSTS && program.ends_with(SHIM)) {
            bail!("{} holds {name}, which would load libraries", program.display());
        }
    }
    // A dynamic program names its loader in a header of its own.
    let headers = output(command("readelf", &["--program-headers", "--wide", &program.display().to_string()]))?;
    if headers.contains("INTERP") {
        bail!("{} is not static", program.display());
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
    // One that runs can't be written to, but another can take its place.
    let new = to.with_added_extension("new");
    run(command("strip", &["-o", &new.display().to_string(), &from.display().to_string()]))?;
    std::fs::rename(&new, to).with_context(|| format!("make {}", to.display()))
}

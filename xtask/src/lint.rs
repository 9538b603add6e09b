//! `cargo xtask lint`.

use anyhow::{Context, Result, bail};

use crate::steps::{self, command, output, step};
use crate::{layers, setup};

/// The version that the configuration is written for.
const CARGO_DENY: &str = "0.20.2";

/// Crates of which the lock file may hold one version only: their types cross crate borders.
const SINGLE: [&str; 3] = ["vm-memory", "vmm-sys-util", "kvm-bindings"];

pub(crate) fn run() -> Result<()> {
    setup::ensure(setup::Level::Run)?;
    // It knows which files are the project's.
    if command("git", &["--version"]).output().is_err() {
        setup::ensure_program("/usr/bin/git", "git")?;
    }
    step("rustfmt", || steps::run(command("cargo", &["fmt", "--all", "--check"])))?;
    step("clippy", || {
        steps::run(command(
            "cargo",
            &["clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"],
        ))
    })?;
    step("layers", layers::run)?;
    step("single versions", single_versions)?;
    step("cargo-deny", deny)?;
    println!("lint: ok");
    Ok(())
}

fn single_versions() -> Result<()> {
    let lock = std::fs::read_to_string(steps::top().join("Cargo.lock")).context("read Cargo.lock")?;
    for name in SINGLE {
        let count = lock.lines().filter(|line| *line == format!("name = \"{name}\"")).count();
        if count > 1 {
            bail!("Cargo.lock holds {count} versions of {name}");
        }
    }
    Ok(())
}

/// Bans, licences and sources; advisories need a database that is fetched from elsewhere.
fn deny() -> Result<()> {
    let present = output(command("cargo", &["deny", "--version"])).is_ok_and(|text| text.contains(CARGO_DENY));
    if !present {
        step(&format!("installing cargo-deny {CARGO_DENY}"), || {
            steps::run(command("cargo", &["install", "--quiet", "--locked", "--version", CARGO_DENY, "cargo-deny"]))
        })?;
    }
    // It looks at the crates of every platform, of which a build has fetched its own only.
    steps::run(command("cargo", &["fetch", "--locked"]))?;
    steps::run(command(
        "cargo",
        &["deny", "--offline", "check", "--hide-inclusion-graph", "bans", "licenses", "sources"],
    ))
}

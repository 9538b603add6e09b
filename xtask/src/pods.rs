//! Pods through containerd, measured and in quantity: the program `pods` of the end-to-end tests. `cargo xtask churn` is run by name,
//! for it takes a while.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::build::{self, Built};
use crate::image;
use crate::setup::{self, Level};
use crate::steps::{self, command, output, step};
use crate::tests;

/// Make pods of two containers, remove them, and look for what is left.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// How many pods.
    #[arg(long, default_value_t = 50)]
    pods: usize,
    /// How many at a time; with none both one and ten.
    #[arg(long)]
    at_once: Option<usize>,
}

/// What a pod and a host have to endure (rows 8 and 10 of Kata's acceptance table); it takes three quarters of an hour.
#[derive(Debug, clap::Args)]
pub(crate) struct Endure {
    /// The most pods that are there at once; fewer where memory runs short.
    #[arg(long, default_value_t = 110)]
    pods: usize,
    /// How often they come and go.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// All programs, for whom pods through containerd can be made.
fn built_for_root() -> Result<Built> {
    setup::ensure(Level::Test)?;
    let built = build::all()?;
    if !setup::is_root() {
        bail!("pods through containerd need root: run this by sudo");
    }
    Ok(built)
}

pub(crate) fn endure(args: &Endure) -> Result<()> {
    let built = built_for_root()?;
    if !std::path::Path::new("/usr/bin/stress-ng").exists() {
        steps::run(command("apt-get", &["install", "-q", "-y", "--no-install-recommends", "stress-ng"]))?;
    }
    step("stress-ng in a container", || steps::run(program(&built, "pods", &["stress".to_owned()])?))?;
    let words = ["crowd".to_owned(), args.pods.to_string(), args.rounds.to_string()];
    step(&format!("{} pods at once, {} times", args.pods, args.rounds), || steps::run(program(&built, "pods", &words)?))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let built = built_for_root()?;
    for at_once in args.at_once.map_or(vec![1, 10], |at_once| vec![at_once]) {
        step(&format!("{} pods, {at_once} at a time", args.pods), || churn(&built, args.pods, at_once))?;
    }
    Ok(())
}

/// Makes and removes so many pods, so many at a time, and looks for what is left.
pub(crate) fn churn(built: &Built, pods: usize, at_once: usize) -> Result<()> {
    let words = ["churn".to_owned(), pods.to_string(), at_once.to_string()];
    steps::run(program(built, "pods", &words)?)
}

/// What `pods measure` has found.
pub(crate) fn measure(built: &Built, pairs: usize) -> Result<Value> {
    let found = output(program(built, "pods", &["measure".to_owned(), pairs.to_string()])?)?;
    let line = found.lines().last().context("nothing was measured")?;
    serde_json::from_str(line).context("the figures of pods")
}

/// A program of the end-to-end tests, with what it is told by the environment.
pub(crate) fn program(built: &Built, name: &str, words: &[String]) -> Result<Command> {
    let image = built.work().join("test-image");
    image::make(&image, &[("guest-probe", built.guest_probe())])?;
    let mut run = command("cargo", &["run", "--locked", "--quiet", "-p", "coracle-e2e", "--bin", name, "--"]);
    run.args(words)
        .env("CORACLE_TEST_BINARY", built.coracle())
        .env("CORACLE_TEST_SHIM", built.shim())
        .env("CORACLE_TEST_GUEST", built.guest(tests::KERNEL)?)
        .env("CORACLE_TEST_IMAGE", image);
    Ok(run)
}

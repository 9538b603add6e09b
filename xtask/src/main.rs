//! `cargo xtask`: the only door for developers.

mod bench;
mod board;
mod budgets;
mod build;
mod builtin;
mod ci;
mod containerd;
mod coverage;
mod deb;
mod demo;
mod docs;
mod fuzz;
mod gates;
mod image;
#[cfg(test)]
mod interface;
mod lab;
mod layers;
mod lint;
mod metadata;
mod notes;
#[cfg(test)]
mod parity;
mod pods;
mod release;
mod sbom;
mod setup;
mod sleeps;
mod steps;
mod suite;
mod tests;
#[cfg(test)]
mod threats;
mod unsafe_code;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Tasks of this project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing, build, and run a container in a machine of its own.
    Demo(demo::Args),
    /// Run every test lane that this machine can run.
    Test(tests::Args),
    /// Format, clippy, layers, dependencies.
    Lint,
    /// Check who may import whom.
    Layers,
    /// Write the reference in docs/reference from the declarations.
    Docs,
    /// Build, and make the guest image.
    Image,
    Fuzz(fuzz::Args),
    Notes(notes::Args),
    /// Build, and make a Debian package.
    Deb,
    /// Try the shim on another Debian release's containerd.
    Suite(suite::Args),
    /// Make pods in quantity through containerd, and look for what is left.
    Churn(pods::Args),
    /// Have as many pods at once as there is memory for, several times, and stress-ng in one.
    Endure(pods::Endure),
    /// Measure sizes, memory, calls, instructions and times.
    Bench(bench::Args),
    Ci(ci::Args),
    Board(board::Args),
    /// Count which lines the unit tests reach, crate by crate.
    Coverage,
    /// What a release and its users want to know: parts, reproducibility, unsafe code.
    Gates,
    Release(release::Args),
    Lab(lab::Args),
    /// In the lab's clone: hold a machine.
    #[command(hide = true)]
    LabMachine,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    let done = match task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => tests::run(&args),
        Task::Lint => lint::run(),
        Task::Layers => layers::run(),
        Task::Docs => docs::run(),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Notes(args) => notes::run(&args),
        Task::Deb => deb::run().map(drop),
        Task::Image => build::all().and_then(|built| built.guest(tests::KERNEL).map(drop)),
        Task::Suite(args) => suite::run(&args),
        Task::Churn(args) => pods::run(&args),
        Task::Endure(args) => pods::endure(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Ci(args) => ci::run(&args),
        Task::Board(args) => board::vendor(&args),
        Task::Coverage => coverage::run(),
        Task::Gates => gates::run(),
        Task::Release(args) => release::run(&args),
        Task::Lab(args) => return Ok(lab::run(&args)),
        Task::LabMachine => lab::hold_machine().map(|never| match never {}),
    };
    done.map(|()| ExitCode::SUCCESS)
}

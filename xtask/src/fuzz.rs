//! `cargo xtask fuzz`: the targets of the package `fuzz`, without coverage (docs/fuzzing.md has the way with it).

use anyhow::Result;

use crate::steps::{self, command, step};

/// Give the parsers and devices rubbish, and look for what they do that they must not.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Every target for a few seconds, in the build of the tests: at most five minutes.
    #[arg(long)]
    smoke: bool,
    /// The target; all of them where none is named.
    target: Option<String>,
    /// How many executions of each, or with an `s` behind it how many seconds.
    #[arg(long, default_value = "20000", value_name = "NUMBER")]
    executions: String,
    /// Another number makes other inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// How long each target runs in the smoke.
const SMOKE: &str = "4s";

pub(crate) fn run(args: &Args) -> Result<()> {
    let target = args.target.as_deref().unwrap_or("all");
    let (mut fuzz, limit) = if args.smoke {
        (command("cargo", &["run", "--locked", "--quiet", "-p", "coracle-fuzz", "--bin", "fuzz-run"]), SMOKE)
    } else {
        let words = [
            "run",
            "--locked",
            "--config",
            "fuzz/profile.toml",
            "--profile",
            "fuzz",
            "-p",
            "coracle-fuzz",
            "--bin",
            "fuzz-run",
        ];
        (command("cargo", &words), args.executions.as_str())
    };
    fuzz.args(["--", target, limit]).arg(args.seed.to_string());
    step("fuzzing", || steps::run(fuzz))
}

//! System calls of the command line, by strace: what it asks of the kernel does not depend on how fast that is.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Bench;
use crate::setup;
use crate::steps::{command, run};

/// How often `coracle run` is counted: it waits for several things at once, in whichever order they come.
const ROUNDS: usize = 5;

/// Counts those of `coracle settings check`, with all its threads, and of `coracle run … true` itself, without the shim.
pub(super) fn measure(bench: &Bench) -> Result<Value> {
    setup::ensure_program("/usr/bin/strace", "strace")?;
    let image = bench.image();
    let container = ["run", "--rm", "--network", "none", &image, "true"];
    // Once before, so that the image is there.
    bench.run_true()?;
    let series = (0..ROUNDS).map(|_| count(bench, &container)).collect::<Result<Vec<_>>>()?;
    Ok(
        json!({ "settings_check": count(bench, &["settings", "check"])?, "run_true": { "least": series.iter().min(), "series": series } }),
    )
}

fn count(bench: &Bench, arguments: &[&str]) -> Result<u64> {
    let file = bench.built.work().join("syscalls");
    let words = bench.coracle(arguments);
    let mut trace = command("strace", &["-c", "-o"]);
    trace.arg(&file).arg(words.get_program()).args(words.get_args());
    // Of the environment nothing but this: cargo's has folders in which the loader would look for libraries.
    trace.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    trace.envs(words.get_envs().filter_map(|(name, value)| Some((name, value?))));
    trace.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    run(trace)?;
    let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
    total(&text).context("strace counted nothing")
}

/// The line `100.00  0.010697  13  794  34 total`: percent, seconds, microseconds a call, calls, and failures where there are some.
fn total(text: &str) -> Option<u64> {
    let line = text.lines().rev().find(|line| line.trim_end().ends_with(" total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

#[test]
fn the_sum_is_read_with_failures_and_without() {
    assert_eq!(total("% time\n------\n100.00    0.010697          13       794        34 total\n"), Some(794));
    assert_eq!(total("100.00    0.000000           0        87           total\n"), Some(87));
    assert_eq!(total(""), None);
}

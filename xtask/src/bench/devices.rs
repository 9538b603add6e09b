//! Instructions that a device of the built-in monitor takes for a request, in process, by callgrind.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::builtin::bench_program;
use crate::setup;
use crate::steps::command;

/// The cases of `host/virtio/benches/instructions.rs`. `driver` is the share of the program's own driver in the others.
const CASES: [&str; 6] = ["driver", "block-read", "vsock-out", "vsock-in", "net-out", "net-in"];

/// Requests of the shorter run; the longer one has twice as many.
const REQUESTS: u64 = 1000;

/// Instructions for a request, by case. What a run takes once is left out: they are the difference of two runs.
pub(super) fn measure() -> Result<Value> {
    setup::ensure_program("/usr/bin/valgrind", "valgrind")?;
    let program = bench_program("coracle-virtio", "instructions", &[])?;
    let mut report = Map::new();
    for case in CASES {
        let once = count(&program, case, REQUESTS)?;
        let twice = count(&program, case, 2 * REQUESTS)?;
        report.insert(case.into(), (twice.saturating_sub(once) / REQUESTS).into());
    }
    Ok(report.into())
}

fn count(program: &Path, case: &str, requests: u64) -> Result<u64> {
    let mut run = command("valgrind", &["--tool=callgrind", "--callgrind-out-file=/dev/null"]);
    let output = run.arg(program).arg(case).arg(requests.to_string()).output().context("start valgrind")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{case}: valgrind ended with {}: {text}", output.status);
    }
    collected(&text).with_context(|| format!("valgrind has counted nothing: {text}"))
}

/// What valgrind says at its end: `==123== Collected : 4567`.
fn collected(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_read() {
        assert_eq!(collected("==1== Events    : Ir\n==1== Collected : 6762\n"), Some(6762));
        assert_eq!(collected("==1== Events    : Ir\n"), None);
    }
}

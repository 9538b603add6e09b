//! `ctr run … true` by our shim and by another runtime that containerd knows, in turn, through one containerd.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use coracle_ci_statistics::compare_pairs;
use serde_json::{Value, json};

use super::{Bench, SEED};
use crate::containerd::Containerd;
use crate::steps::run;

/// Our own.
const OWN: &str = "io.containerd.coracle.v2";

/// Times pairs of runs. `reference` is a runtime's name, such as io.containerd.runc.v2 or io.containerd.kata.v2, whose shim is in `$PATH`.
pub(super) fn measure(bench: &Bench, reference: &str, pairs: usize) -> Result<Value> {
    let containerd = Containerd::start(&bench.built, Path::new(&bench.settings))?;
    let image = containerd.import(&bench.image, &bench.built.work())?;
    let mut number = 0;
    let mut time = |runtime: &str| -> Result<f64> {
        number += 1;
        let id = format!("bench-{number}");
        let begin = Instant::now();
        let mut command = containerd.ctr(&["run", "--rm", "--runtime", runtime, &image, &id, "true"]);
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        run(command).with_context(|| format!("a container by {runtime}"))?;
        Ok(begin.elapsed().as_secs_f64())
    };
    // Once each, to warm caches; a runtime that is not there is told of here.
    let (_, _) = (time(OWN)?, time(reference)?);
    let mut series = Vec::new();
    for pair in 0..pairs {
        series.push(if pair % 2 == 0 {
            let own = time(OWN)?;
            (time(reference)?, own)
        } else {
            let other = time(reference)?;
            (other, time(OWN)?)
        });
    }
    let difference = compare_pairs(&series, SEED);
    Ok(json!({
        "runtime": reference,
        "ctr_run_true": {
            "factor": difference.map(|found| found.factor), "probability_that_ours_is_no_slower": difference.map(|found| found.probability),
            "seconds_reference_and_own": series,
        },
    }))
}

/// For people.
pub(super) fn print(report: &Value) {
    let times = &report["ctr_run_true"];
    println!(
        "ctr run of true beside {}: {:.2} times as long (p {})",
        report["runtime"].as_str().unwrap_or_default(),
        times["factor"].as_f64().unwrap_or(f64::NAN),
        times["probability_that_ours_is_no_slower"]
    );
}

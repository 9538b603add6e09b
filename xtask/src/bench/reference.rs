//! `ctr run … true` by our shim and by another runtime that containerd knows, in turn, through one containerd.

use std::path::Path;

use anyhow::{Context, Result};
use coracle_ci_statistics::compare_pairs;
use serde_json::{Value, json};

use super::{Bench, SEED, in_turn, timed};
use crate::containerd::Containerd;

/// Our own.
const OWN: &str = "io.containerd.coracle.v2";

/// Times pairs of runs. `reference` is a runtime's name, such as io.containerd.runc.v2 or io.containerd.kata.v2, whose shim is in `$PATH`.
pub(super) fn measure(bench: &Bench, reference: &str, pairs: usize) -> Result<Value> {
    let containerd = Containerd::start(&bench.built, Path::new(&bench.settings))?;
    let image = containerd.import(&bench.image, &bench.built.work())?;
    let number = std::cell::Cell::new(0);
    let time = |runtime: &str| {
        number.set(number.get() + 1);
        let id = format!("bench-{}", number.get());
        timed(containerd.ctr(&["run", "--rm", "--runtime", runtime, &image, &id, "true"]))
            .with_context(|| format!("a container by {runtime}"))
    };
    // A runtime that is not there is told of by the first of all.
    let series = in_turn(pairs, || time(reference), || time(OWN))?;
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

//! What steps take: a container prints a number when it is through with each, and the clock of the machine's processors is read then.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::Command;

use coracle_e2e::Running;
use serde_json::{Value, json};

/// The kind that all others are held against.
pub(crate) const REFERENCE: &str = "runc";

/// A step's time in microseconds, and the milliseconds of the machine's processors, whoever used them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    us: u64,
    cpu_ms: u64,
}

/// All that was taken, by kind and step.
#[derive(Debug, Default)]
pub(crate) struct Series(BTreeMap<String, BTreeMap<String, Vec<Taken>>>);

impl Series {
    /// Runs a container whose script says a line for each of the steps, and adds what they take.
    ///
    /// # Panics
    /// Where it says something else.
    pub(crate) fn take(&mut self, kind: &str, steps: &[&str], container: Command) {
        let mut running = Running::start(container);
        let output = BufReader::new(running.child.stdout.take().expect("a pipe"));
        let mut before = busy_ms();
        let mut steps_left = steps.iter();
        let mut said = Vec::new();
        for line in output.lines() {
            let (line, now) = (line.expect("a line"), busy_ms());
            let Ok(us) = line.trim().parse() else {
                said.push(line);
                continue;
            };
            // The first is the start's, and has no time.
            if us > 0 {
                let step = *steps_left.next().expect("more times than steps");
                let taken = Taken { us, cpu_ms: now.saturating_sub(before) };
                self.0.entry(kind.to_owned()).or_default().entry(step.to_owned()).or_default().push(taken);
            }
            before = busy_ms();
        }
        let outcome = running.finish();
        assert!(outcome.code == 0 && steps_left.next().is_none(), "{kind}: {outcome:?} {said:?}");
    }

    /// Adds what `work` takes from its begin to its end.
    pub(crate) fn time(&mut self, kind: &str, step: &str, work: impl FnOnce()) {
        let (start, before) = (std::time::Instant::now(), busy_ms());
        work();
        let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let taken = Taken { us, cpu_ms: busy_ms().saturating_sub(before) };
        self.0.entry(kind.to_owned()).or_default().entry(step.to_owned()).or_default().push(taken);
    }

    fn least(&self, kind: &str, step: &str) -> Option<u64> {
        self.0.get(kind)?.get(step)?.iter().map(|taken| taken.us).min()
    }

    /// Each kind's steps, with their least to the reference's: that of the same name, or of the one that `reference` names.
    pub(crate) fn report(&self, bytes: impl Fn(&str) -> Option<u64>, reference: impl Fn(&str) -> String) -> Value {
        let mut kinds = serde_json::Map::new();
        for (kind, steps) in &self.0 {
            let mut all = serde_json::Map::new();
            for (step, taken) in steps {
                let theirs = self.least(&reference(kind), step);
                #[expect(clippy::cast_precision_loss, reason = "a ratio")]
                let ratio = theirs.zip(self.least(kind, step)).map(|(theirs, ours)| ours as f64 / theirs.max(1) as f64);
                let cpu_ms = taken.iter().map(|taken| taken.cpu_ms).min().unwrap_or(0);
                #[expect(clippy::cast_precision_loss, reason = "a share")]
                let per_gb = bytes(step).map(|bytes| cpu_ms as f64 / 1e3 / (bytes as f64 / 1e9));
                all.insert(
                    step.clone(),
                    json!({
                        "us": taken.iter().map(|taken| taken.us).collect::<Vec<_>>(),
                        "host_cpu_ms": taken.iter().map(|taken| taken.cpu_ms).collect::<Vec<_>>(),
                        "least_to_runc": ratio,
                        "host_cpu_seconds_per_gb": per_gb,
                    }),
                );
            }
            kinds.insert(kind.clone(), all.into());
        }
        kinds.into()
    }
}

/// Time that the machine's processors were at work, in milliseconds, whoever they worked for (proc(5), `/proc/stat`, in ticks of 10 ms):
/// what a network costs is no process's alone.
fn busy_ms() -> u64 {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let line = text.lines().next().unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // All but idle and iowait, of the first eight; the rest is counted among them.
    ticks.iter().take(8).enumerate().filter(|(at, _)| !matches!(at, 3 | 4)).map(|(_, ticks)| ticks * 10).sum()
}

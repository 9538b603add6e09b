//! What has gone wrong, or should not have been asked for, counted.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use coracle_protocol::metrics::{Families, Kind, count_of};

#[derive(Debug, Default)]
struct Found {
    requests: u64,
    failures: BTreeMap<(String, String), u64>,
    deprecated: BTreeMap<(&'static str, &'static str), u64>,
    starts: BTreeMap<String, u64>,
    kills_for_memory: u64,
    machine_ends: u64,
}

/// How many containers are told apart: a pod that has had more has further ones not counted.
const CONTAINERS_MAX: usize = 4096;

/// The counts of a shim.
#[derive(Debug, Default)]
pub(crate) struct Counts(
    // Requests run side by side.
    Mutex<Found>,
);

impl Counts {
    fn lock(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request that has come; its number.
    pub(crate) fn request(&self) -> u64 {
        let mut found = self.lock();
        found.requests += 1;
        found.requests
    }

    /// A request that was refused, or failed.
    pub(crate) fn failed(&self, method: &str, code: &str) {
        *self.lock().failures.entry((method.to_owned(), code.to_owned())).or_default() += 1;
    }

    /// A container that was started.
    pub(crate) fn started(&self, container: &str) {
        let mut found = self.lock();
        if found.starts.len() < CONTAINERS_MAX || found.starts.contains_key(container) {
            *found.starts.entry(container.to_owned()).or_default() += 1;
        }
    }

    /// Something deprecated that was used: of this kind and name.
    pub(crate) fn deprecated(&self, kind: &'static str, name: &'static str) {
        *self.lock().deprecated.entry((kind, name)).or_default() += 1;
    }

    /// The guest's kernel has killed in a container for want of memory.
    pub(crate) fn killed_for_memory(&self) {
        self.lock().kills_for_memory += 1;
    }

    /// The machine has ended.
    pub(crate) fn machine_ended(&self) {
        self.lock().machine_ends += 1;
    }

    /// Adds them as figures.
    pub(crate) fn figures(&self, families: &mut Families) {
        let found = self.lock();
        let failures =
            families.family("coracle_request_failures_total", Kind::Counter, "Requests that were refused or failed.");
        for ((action, code), count) in &found.failures {
            failures.sample(&[("action", action), ("code", code)], count_of(*count));
        }
        let uses = families.family("coracle_deprecated_use_total", Kind::Counter, "Uses of what is deprecated.");
        for ((kind, name), count) in &found.deprecated {
            uses.sample(&[("kind", kind), ("name", name)], count_of(*count));
        }
        let starts: u64 = found.starts.values().sum();
        for (name, help, count) in [
            ("coracle_container_starts_total", "Starts of containers.", starts),
            (
                "coracle_container_restarts_total",
                "Starts of containers that had been started before by the same name.",
                starts - found.starts.len() as u64,
            ),
            ("coracle_oom_events_total", "Kills in containers for want of memory.", found.kills_for_memory),
            ("coracle_machine_ends_total", "Ends of the pod's machine.", found.machine_ends),
        ] {
            families.figure(name, Kind::Counter, help, count_of(count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_told_apart() {
        let counts = Counts::default();
        counts.failed("Create", "INTERNAL");
        counts.failed("Create", "INTERNAL");
        counts.failed("Create", "NOT_FOUND");
        counts.deprecated("setting", "machine.old");
        counts.killed_for_memory();
        ["a", "b", "a"].into_iter().for_each(|name| counts.started(name));
        let mut families = Families::default();
        counts.figures(&mut families);
        let value = |name, labels| families.value(name, labels);
        assert_eq!(value("coracle_request_failures_total", "action=\"Create\",code=\"INTERNAL\""), Some(2.0));
        assert_eq!(value("coracle_deprecated_use_total", "kind=\"setting\",name=\"machine.old\""), Some(1.0));
        assert_eq!(value("coracle_container_starts_total", ""), Some(3.0));
        assert_eq!(value("coracle_container_restarts_total", ""), Some(1.0));
        assert_eq!(
            (value("coracle_oom_events_total", ""), value("coracle_machine_ends_total", "")),
            (Some(1.0), Some(0.0))
        );
    }
}

//! What CI holds the project to: one file, `xtask/budgets.toml`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Budgets {
    minutes: BTreeMap<String, u64>,
    counts: BTreeMap<String, u64>,
    /// Read by tests (tests/e2e/tests/startup.rs).
    #[serde(rename = "instructions")]
    _instructions: BTreeMap<String, u64>,
}

impl Budgets {
    pub(crate) fn read() -> Result<Self> {
        toml::from_str(include_str!("../budgets.toml")).context("xtask/budgets.toml")
    }

    /// A job's minutes.
    pub(crate) fn minutes(&self, job: &str) -> Result<u64> {
        self.minutes.get(job).copied().with_context(|| format!("xtask/budgets.toml has no minutes of {job}"))
    }

    /// The parts of a bench report that have counts held to a budget.
    pub(crate) fn parts(&self) -> Vec<&str> {
        let mut parts: Vec<&str> = self.counts.keys().filter_map(|name| name.split('.').next()).collect();
        parts.dedup();
        parts
    }

    /// Holds a report's counts to the budgets: each is there, and is no more than it may be.
    pub(crate) fn hold(&self, report: &Value) -> Result<()> {
        let mut faults = Vec::new();
        for (name, most) in &self.counts {
            let pointer = format!("/{}", name.replace('.', "/"));
            match report.pointer(&pointer).and_then(Value::as_u64) {
                None => faults.push(format!("{name}: it was not counted")),
                Some(count) => {
                    println!("  {name}: {count} of {most}");
                    if count > *most {
                        faults.push(format!("{name}: {count}, which is more than its {most}"));
                    }
                }
            }
        }
        if faults.is_empty() {
            return Ok(());
        }
        bail!("counts beyond xtask/budgets.toml:\n  {}", faults.join("\n  "))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_count_that_grows_or_is_missing_is_told() {
        let budgets: Budgets =
            toml::from_str("[minutes]\na = 1\n[counts]\n\"size.shim\" = 10\n\"size.agent\" = 5\n[instructions]")
                .unwrap();
        assert!(budgets.hold(&json!({ "size": { "shim": 10, "agent": 5 } })).is_ok());
        let error = budgets.hold(&json!({ "size": { "shim": 11 } })).unwrap_err().to_string();
        assert!(error.contains("size.shim: 11") && error.contains("size.agent: it was not counted"), "{error}");
        assert_eq!(budgets.parts(), ["size"]);
        assert!(Budgets::read().unwrap().minutes("nothing").is_err());
    }
}

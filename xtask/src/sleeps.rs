//! What waits for the clock: every place in the source, each with its reason. A place that is not listed counts as one on the
//! way from create to first output, or back, where only events may be waited for.

use anyhow::Result;
use serde_json::{Value, json};

use crate::steps::{files, top};

/// File, number of places, and what they are for.
const KNOWN: [(&str, usize, &str); 14] = [
    ("boundary/faults/src/inject.rs", 1, "the delay that a test asked for; only with the feature `inject`"),
    (
        "dashboard/ci/src/collect/api.rs",
        1,
        "before a request is tried again, or until the API gives more: it says when",
    ),
    ("dashboard/ci/src/serve.rs", 1, "after an accept that failed: nothing tells when descriptors are there again"),
    ("guest/agent/src/guest.rs", 1, "after an accept that failed: nothing tells when descriptors are there again"),
    ("host/cli/src/logs.rs", 1, "logs --follow: how soon new text shows"),
    ("host/cli/src/monitor.rs", 1, "after an accept that failed: nothing tells when descriptors are there again"),
    ("host/process/src/cgroup.rs", 1, "a control group that is busy without a member: nothing tells when it is free"),
    ("host/sandbox/src/boot.rs", 2, "deadlines, beside the events that end them"),
    ("host/sandbox/src/create.rs", 2, "until the guest, too, has given up a create that took too long"),
    ("host/sandbox/src/forward.rs", 1, "after an accept that failed: nothing tells when descriptors are there again"),
    ("host/sandbox/src/oom.rs", 1, "the least time between two reports that a guest may invent"),
    ("host/shim/src/stdio.rs", 1, "an output at its end whose reader lags: nothing tells when its pipe is empty"),
    ("host/shim/src/daemon.rs", 1, "after an accept that failed: nothing tells when descriptors are there again"),
    ("host/shim/src/events.rs", 1, "between attempts to reach a containerd that is not there"),
];

/// What makes a task or a thread wait for the clock.
const CALLS: [&str; 4] = ["sleep(", "sleep_until(", "interval(", "interval_at("];

/// File and number of places, of what runs on the host and in the guest, and of the dashboard; tests left out.
fn find() -> Result<Vec<(String, usize)>> {
    let sources = files(&["host/*.rs", "guest/*.rs", "boundary/*.rs", "dashboard/*.rs"])?.into_iter();
    let sources = sources.filter(|path| path.contains("/src/") && !path.ends_with("tests.rs"));
    let counted = sources.filter_map(|path| std::fs::read_to_string(top().join(&path)).ok().map(|text| (path, text)));
    Ok(counted.map(|(path, text)| (path, places(&text))).filter(|(_, count)| *count > 0).collect())
}

fn places(text: &str) -> usize {
    let code = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"));
    let code = code.filter(|line| !line.trim_start().starts_with("//"));
    code.filter(|line| CALLS.iter().any(|call| calls(line, call))).count()
}

/// Whether `line` calls a function of that whole name.
fn calls(line: &str, call: &str) -> bool {
    line.match_indices(call).any(|(at, _)| {
        !line[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_') && !line[..at].ends_with("fn ")
    })
}

/// Where `found` and `known` differ.
fn differences(found: &[(String, usize)], known: &[(&str, usize, &str)]) -> Vec<String> {
    let mut faults = Vec::new();
    for (path, count) in found {
        let listed = known.iter().find(|(known, ..)| known == path).map_or(0, |(_, listed, _)| *listed);
        if *count != listed {
            faults.push(format!(
                "{path}: waits for the clock at {count} places; {listed} are known (xtask/src/sleeps.rs)"
            ));
        }
    }
    let gone = known.iter().filter(|(path, ..)| !found.iter().any(|(found, _)| found == path));
    faults.extend(
        gone.map(|(path, ..)| format!("{path}: waits for the clock no more; take it from xtask/src/sleeps.rs")),
    );
    faults
}

/// What a reviewer has to look at.
pub(crate) fn faults() -> Result<Vec<String>> {
    Ok(differences(&find()?, &KNOWN))
}

/// For the report: the places that nobody has given a reason for, and those that are known.
pub(crate) fn report() -> Result<Value> {
    let places: Vec<Value> =
        KNOWN.iter().map(|(path, count, why)| json!({ "file": path, "places": count, "why": why })).collect();
    let unknown = faults()?;
    Ok(json!({ "on_the_way": unknown.len(), "at": unknown, "elsewhere": places }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_the_clock_is_seen() {
        let text = "// sleep(1)\nfn f() {\n    tokio::time::sleep(PAUSE).await;\n    no_sleep();\n    let t = interval(X);\n}\n\
            fn sleep(x: u8) {}\n#[cfg(test)]\nmod tests {\n    sleep(1);\n}\n";
        assert_eq!(places(text), 2);
    }

    #[test]
    fn one_more_and_one_less_are_told() {
        let found = [("a.rs".to_owned(), 2), ("b.rs".to_owned(), 1)];
        assert!(differences(&found, &[("a.rs", 2, ""), ("b.rs", 1, "")]).is_empty());
        let faults = differences(&found, &[("a.rs", 1, ""), ("c.rs", 1, "")]);
        assert_eq!(faults.len(), 3, "{faults:?}");
    }
}

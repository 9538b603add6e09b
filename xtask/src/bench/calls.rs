//! The agent calls of one start, from the shim's log.

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// One call: where in the log it begins and where it is answered.
struct Call {
    name: String,
    begin: usize,
    end: usize,
}

/// Counts the calls up to the one that starts the process, whose output needs no more of them, and the longest chain of calls of
/// which each began after the one before was answered.
pub(crate) fn count(log: &str) -> Result<Value> {
    let mut calls: Vec<(String, Call)> = Vec::new();
    for (line_number, line) in log.lines().enumerate() {
        if let Some((number, name)) = part(line, "agent call ").and_then(|rest| rest.split_once(": ")) {
            calls.push((number.to_owned(), Call { name: name.to_owned(), begin: line_number, end: usize::MAX }));
        } else if let Some(number) = part(line, "agent answer ")
            && let Some((_, call)) = calls.iter_mut().find(|(found, _)| found == number)
        {
            call.end = line_number;
        }
    }
    let last = calls.iter().position(|(_, call)| call.name == STARTS).context("nothing was started")?;
    let until = &calls[..=last];
    let names: Vec<&str> = until.iter().map(|(_, call)| call.name.as_str()).collect();
    let mut depth = vec![1; until.len()];
    for later in 0..until.len() {
        for earlier in 0..later {
            if until[earlier].1.end < until[later].1.begin {
                depth[later] = depth[later].max(depth[earlier] + 1);
            }
        }
    }
    Ok(json!({ "calls": names.len(), "depth": depth[last], "names": names }))
}

/// The call that starts a container's first process.
const STARTS: &str = "StartContainer";

/// What stands behind a key in a line's message, whose quotation mark ends it; other fields follow.
fn part<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_once(key)?.1.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_calls_one_after_another() {
        let log = "msg=\"agent call 1: A\" component=sandbox pod=x\nmsg=\"agent answer 1\"\nmsg=\"agent call 2: Poll\"\nmsg=\"agent call 3: B\"\n\
            msg=\"agent answer 3\"\nmsg=\"agent call 4: StartContainer\" request=1\nmsg=\"agent call 5: C\"\n";
        let counted = count(log).unwrap();
        assert_eq!((counted["calls"].as_u64(), counted["depth"].as_u64()), (Some(4), Some(3)));
        assert!(count("").is_err());
    }
}

//! `cargo xtask coverage`: which lines the unit tests reach, crate by crate.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::setup;
use crate::steps::{self, command, output, step, top};

/// The version that the report is read by.
const CARGO_LLVM_COV: &str = "0.9.1";

/// rustc's own LLVM, by its number: profiles are read by one of the same age.
fn llvm() -> Result<String> {
    let text = output(command("rustc", &["-vV"]))?;
    let line = text.lines().find_map(|line| line.strip_prefix("LLVM version: ")).context("rustc names no LLVM")?;
    Ok(line.split('.').next().unwrap_or_default().to_owned())
}

pub(crate) fn run() -> Result<()> {
    let number = llvm()?;
    let tool = |name: &str| format!("/usr/bin/{name}-{number}");
    // The toolchain's own tools are a part of it that is not always there; Debian has them.
    setup::ensure_program(&tool("llvm-cov"), &format!("llvm-{number}"))?;
    let present = output(command("cargo", &["llvm-cov", "--version"])).is_ok_and(|text| text.contains(CARGO_LLVM_COV));
    if !present {
        step(&format!("installing cargo-llvm-cov {CARGO_LLVM_COV}"), || {
            steps::run(command(
                "cargo",
                &["install", "--quiet", "--locked", "--version", CARGO_LLVM_COV, "cargo-llvm-cov"],
            ))
        })?;
    }
    let report = step("the unit tests, counted", || {
        let mut test =
            command("cargo", &["llvm-cov", "test", "--workspace", "--locked", "--quiet", "--json", "--summary-only"]);
        test.args(["--exclude", "coracle-e2e", "--exclude", "coracle-flow", "--exclude", "coracle-fuzz"]);
        test.env("LLVM_COV", tool("llvm-cov")).env("LLVM_PROFDATA", tool("llvm-profdata"));
        output(test)
    })?;
    // The tests' own output comes first; the report is the last line.
    let line = report.lines().rev().find(|line| line.starts_with('{')).context("there is no report")?;
    let crates = by_crate(&serde_json::from_str(line).context("the report")?)?;
    println!("{:32} {:>8} {:>8} {:>7}", "lines of", "reached", "of", "share");
    let mut series = Vec::new();
    for (name, (reached, all)) in &crates {
        let percent = 100.0 * *reached as f64 / (*all).max(1) as f64;
        println!("{name:32} {reached:8} {all:8} {percent:6.1} %");
        series.push(json!({ "suite": "coverage", "name": name, "unit": "%", "raw": [percent] }));
    }
    crate::board::figures(&json!({ "tests": "unit" }), &series)
}

/// Lines reached and lines in all, by the crate's folder.
fn by_crate(report: &Value) -> Result<BTreeMap<String, (u64, u64)>> {
    let files = report["data"][0]["files"].as_array().context("the report has no files")?;
    let top = format!("{}/", top().display());
    let mut crates: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for file in files {
        let Some(path) = file["filename"].as_str().and_then(|path| path.strip_prefix(&top)) else { continue };
        let name = path.split("/src/").next().unwrap_or(path).to_owned();
        let lines = &file["summary"]["lines"];
        let (reached, all) = crates.entry(name).or_default();
        *reached += lines["covered"].as_u64().unwrap_or(0);
        *all += lines["count"].as_u64().unwrap_or(0);
    }
    if crates.is_empty() {
        bail!("the report has no file of this checkout");
    }
    Ok(crates)
}

#[test]
fn lines_are_counted_by_crate() {
    let file = |name: &str, covered: u64, count: u64| json!({ "filename": format!("{}/{name}", top().display()), "summary": { "lines": { "covered": covered, "count": count } } });
    let report = json!({ "data": [{ "files": [file("host/a/src/x.rs", 1, 2), file("host/a/src/y/z.rs", 3, 4), { "filename": "/elsewhere/src/q.rs" }] }] });
    assert_eq!(by_crate(&report).unwrap(), BTreeMap::from([("host/a".to_owned(), (4, 6))]));
    assert!(by_crate(&json!({ "data": [{ "files": [] }] })).is_err());
}

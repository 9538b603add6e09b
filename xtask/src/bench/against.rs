//! This tree against another commit, on this host: counts beside counts, and times in pairs, in turn.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use coracle_ci_statistics::{Difference, compare_pairs};
use serde_json::{Value, json};

use super::{Bench, SEED, calls, in_turn, instructions};
use crate::build::{self, Built};
use crate::steps::{command, output, run, step};
use crate::tests;

/// How improbable a slowdown must be where there is none, to be called one.
const ALARM: f64 = 0.01;

/// Builds a commit in a checkout of its own; its programs and guest image.
fn built(revision: &str) -> Result<(String, Built)> {
    let sha = output(command("git", &["rev-parse", "--verify", "--end-of-options", &format!("{revision}^{{commit}}")]))
        .with_context(|| format!("there is no commit {revision}"))?;
    let sha = sha.trim().to_owned();
    let folder = build::target()?.join("xtask/against");
    let (tree, target) = (folder.join("tree"), folder.join("target"));
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    step(&format!("building {sha}"), || {
        let path = tree.display().to_string();
        if tree.exists() {
            let mut checkout = command("git", &["checkout", "--quiet", "--force", "--detach", &sha]);
            run({
                checkout.current_dir(&tree);
                checkout
            })?;
        } else {
            // What was there and is gone is no work tree of git's any more.
            run(command("git", &["worktree", "prune"]))?;
            run(command("git", &["worktree", "add", "--quiet", "--detach", &path, &sha]))?;
        }
        let mut image = command("cargo", &["xtask", "image"]);
        image.current_dir(&tree).env("CARGO_TARGET_DIR", &target).stdout(Stdio::null());
        run(image)
    })?;
    Ok((sha, Built::at(target)))
}

/// Both, measured.
pub(super) fn measure(own: &Bench, revision: &str, pairs: usize, run_folder: &std::path::Path) -> Result<Value> {
    let (sha, built) = built(revision)?;
    let work = built.work();
    std::fs::create_dir_all(&work).with_context(|| format!("make {}", work.display()))?;
    let other =
        Bench { image: own.image.clone(), root: work.join("bench-root"), settings: work.join("bench.toml"), built };
    let other_folder = PathBuf::from(format!("{}-other", run_folder.display()));
    let done = both(own, &other, run_folder, &other_folder, pairs);
    other.clear();
    let _ = std::fs::remove_dir_all(&other_folder);
    let (counts, difference, seconds) = done?;
    let verdict = match difference {
        Some(found) if found.probability <= ALARM => format!("slower, by {:+.1} %", 100.0 * (found.factor - 1.0)),
        Some(found) if found.probability >= 1.0 - ALARM => format!("faster, by {:+.1} %", 100.0 * (found.factor - 1.0)),
        Some(_) => "no difference can be told".to_owned(),
        None => "too few pairs".to_owned(),
    };
    Ok(json!({
        "commit": sha, "counts": counts,
        "run_true": { "verdict": verdict, "factor": difference.map(|found| found.factor),
            "probability": difference.map(|found| found.probability), "seconds_other_and_own": seconds },
    }))
}

type Measured = (Value, Option<Difference>, Vec<(f64, f64)>);

fn both(
    own: &Bench,
    other: &Bench,
    own_folder: &std::path::Path,
    other_folder: &std::path::Path,
    pairs: usize,
) -> Result<Measured> {
    let mut counts = serde_json::Map::new();
    let (ours, theirs) = (counted(own, own_folder)?, counted(other, other_folder)?);
    for ((name, after), (_, before)) in ours.into_iter().zip(theirs) {
        let percent = if before == 0 { 0.0 } else { 100.0 * (after as f64 - before as f64) / before as f64 };
        counts.insert(name.to_owned(), json!({ "other": before, "own": after, "percent": percent }));
    }
    let series = in_turn(pairs, || other.run_true(), || own.run_true())?;
    Ok((counts.into(), compare_pairs(&series, SEED), series))
}

/// What does not depend on who else is on the machine.
fn counted(bench: &Bench, run_folder: &std::path::Path) -> Result<Vec<(&'static str, u64)>> {
    let guest = bench.built.guest(tests::KERNEL)?;
    bench.write_settings(&guest, run_folder, "")?;
    let size = |path: PathBuf| {
        Ok::<_, anyhow::Error>(std::fs::metadata(&path).with_context(|| path.display().to_string())?.len())
    };
    let mut found = vec![
        ("shim, bytes", size(bench.built.shim())?),
        ("agent, bytes", size(bench.built.agent())?),
        ("coracle, bytes", size(bench.built.coracle())?),
    ];
    bench.detached("calls")?;
    let log = std::fs::read_to_string(bench.root.join("containers/calls/log")).context("the shim's log")?;
    bench.remove("calls")?;
    let called = calls::count(&log)?;
    for (name, key) in [("agent calls to first output", "calls"), ("depth of their chain", "depth")] {
        found.push((name, called[key].as_u64().context("a count")?));
    }
    let booted = instructions(bench, &guest, run_folder)?;
    let mut boots: Vec<u64> = booted["series"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
    boots.sort_unstable();
    found.push(("guest instructions to ready", *boots.get(boots.len() / 2).context("no boot was counted")?));
    Ok(found)
}

/// For people.
pub(super) fn print(report: &Value) -> Result<()> {
    println!("beside {}:", report["commit"].as_str().unwrap_or_default());
    for (name, count) in report["counts"].as_object().context("counts")? {
        let percent = count["percent"].as_f64().unwrap_or_default();
        println!("  {name:32} {} -> {} ({percent:+.2} %)", count["other"], count["own"]);
    }
    let times = &report["run_true"];
    if times["verdict"].is_null() {
        bail!("nothing was timed");
    }
    println!("  {:32} {} (p {})", "run of true", times["verdict"].as_str().unwrap_or_default(), times["probability"]);
    Ok(())
}

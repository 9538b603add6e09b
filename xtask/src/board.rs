//! The project's own board: its results collected by its own dashboard.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::build;
use crate::ci;
use crate::setup;
use crate::steps::{command, output, run, step, top};

/// What the project is called on its board.
pub(crate) const PROJECT: &str = "coracle/coracle";

/// What is drawn with, and what accessibility is looked at with: npm's packages.
const UPLOT: &str = "uplot@1.6.32";
const AXE: &str = "axe-core@4.14.1";

/// The packages that the lane unit builds: with others cargo would build libraries anew, for other features.
const AS_UNIT: [&str; 5] = ["--workspace", "--exclude", "coracle-e2e", "--exclude", "coracle-flow"];

/// Look after the dashboard's own parts.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Fetch what lies in dashboard/ci/vendor anew, and say whether it is the same.
    #[arg(long, required = true)]
    vendor: bool,
}

pub(crate) fn vendor(args: &Args) -> Result<()> {
    debug_assert!(args.vendor);
    let _ = std::fs::remove_dir_all(build::target()?.join("xtask/npm").join(UPLOT));
    let folder = unpacked(UPLOT)?;
    let own = top().join("dashboard/ci/vendor/uplot");
    let pairs = [
        ("dist/uPlot.iife.min.js", "uPlot.iife.min.js"),
        ("dist/uPlot.min.css", "uPlot.min.css"),
        ("LICENSE", "LICENSE"),
    ];
    for (theirs, ours) in pairs {
        let read = |path: PathBuf| std::fs::read(&path).with_context(|| format!("read {}", path.display()));
        if read(folder.join(theirs))? != read(own.join(ours))? {
            bail!("dashboard/ci/vendor/uplot/{ours} is not {theirs} of {UPLOT}");
        }
    }
    println!("dashboard/ci/vendor/uplot is {UPLOT}");
    Ok(())
}

/// A package of npm's, unpacked.
fn unpacked(package: &str) -> Result<PathBuf> {
    let folder = build::target()?.join("xtask/npm").join(package);
    if folder.join("package/package.json").exists() {
        return Ok(folder.join("package"));
    }
    setup::ensure_program("/usr/bin/npm", "npm")?;
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let text = |path: &Path| path.display().to_string();
    step(&format!("fetching {package}"), || {
        let destination = text(&folder);
        let packed = output(command("npm", &["pack", "--silent", package, "--pack-destination", &destination]))?;
        let file = folder.join(packed.lines().last().context("npm names no file")?);
        run(command("tar", &["xzf", &text(&file), "-C", &text(&folder)]))
    })?;
    Ok(folder.join("package"))
}

/// The lane: the pages in a real browser.
pub(crate) fn lane(filter: &[&str]) -> Result<()> {
    setup::ensure_program("/usr/bin/chromium", "chromium")?;
    setup::ensure_program("/usr/bin/chromedriver", "chromium-driver")?;
    let axe = unpacked(AXE)?.join("axe.min.js");
    step("lane board", || {
        let mut test = command("cargo", &["test", "--locked"]);
        test.args(AS_UNIT).args(["--test", "browser", "--"]);
        test.args(["--ignored", "--test-threads=1"]).args(filter);
        test.env("CORACLE_TEST_AXE", axe).env("CORACLE_TEST_CHROMEDRIVER", "/usr/bin/chromedriver");
        test.env("CORACLE_TEST_SCREENSHOTS", build::target()?.join("ci/screenshots"));
        run(test)
    })
}

/// Puts figures where the board finds them, where CI runs this: a list of `{"suite", "name", "unit", "raw"}`, and where they were taken.
pub(crate) fn figures(environment: &Value, series: &[Value]) -> Result<()> {
    let Some(folder) = ci::results() else { return Ok(()) };
    let at = output(command("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]))?;
    let commit = output(command("git", &["rev-parse", "HEAD"])).unwrap_or_default();
    let document = json!({ "at": at.trim(), "commit": commit.trim(), "environment": environment, "series": series });
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    std::fs::write(folder.join("figures.json"), document.to_string()).context("write the figures")
}

/// Collects the results of all runs below a folder, and writes the pages.
pub(crate) fn collect(record: &Path) -> Result<()> {
    let target = build::target()?;
    let (database, site) = (target.join("ci/ci.db"), target.join("ci/site"));
    step("collecting the results", || {
        let mut build = command("cargo", &["build", "--quiet", "--locked"]);
        build.args(AS_UNIT).args(["--bin", "coracle-ci"]);
        run(build)?;
        let program = target.join("debug/coracle-ci").display().to_string();
        let of = |arguments: &[&str]| {
            let mut command = command(&program, &["--settings", "dashboard/board.toml", "--database"]);
            command.arg(&database).args(arguments);
            command
        };
        // All records that are there: what one collection could not read the next one does.
        let collected = run(of(&["collect", "--from", &record.display().to_string()]));
        run(of(&["export", &site.display().to_string()]))?;
        collected
    })
}

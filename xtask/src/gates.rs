//! `cargo xtask gates`: what users of a release want to know of it beside its tests. Each gate's finding is on the board's page on security.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::build::{self, Built};
use crate::steps::{command, run as run_command, step, top};
use crate::{metadata, sbom, tests, unsafe_code};

/// One gate's finding.
struct Finding {
    gate: &'static str,
    /// passed, failed, not run.
    state: &'static str,
    summary: String,
}

pub(crate) fn run() -> Result<()> {
    // What an earlier run found is not this one's.
    let _ = std::fs::remove_file(file()?);
    let built = build::all()?;
    let findings = [
        look("parts", || parts(&built)),
        look("reproducible guest image", || reproducible(&built)),
        look("unsafe code", || Ok(format!("{} places, each with its reason (docs/unsafe.md)", unsafe_code::places()?))),
        advisories(),
        not_run("coverage", "by name: cargo xtask ci --job coverage"),
    ];
    let list: Vec<Value> = findings
        .iter()
        .map(|found| {
            println!("{}: {}: {}", found.gate, found.state, found.summary);
            json!({ "gate": found.gate, "state": found.state, "summary": found.summary })
        })
        .collect();
    let file = file()?;
    std::fs::create_dir_all(file.parent().context("its folder")?).context("make its folder")?;
    std::fs::write(&file, Value::from(list).to_string()).with_context(|| format!("write {}", file.display()))?;
    match findings.iter().find(|found| found.state == "failed") {
        Some(failed) => bail!("{}: {}", failed.gate, failed.summary),
        None => Ok(()),
    }
}

fn look(gate: &'static str, work: impl FnOnce() -> Result<String>) -> Finding {
    match step(gate, work) {
        Ok(summary) => Finding { gate, state: "passed", summary },
        Err(error) => Finding { gate, state: "failed", summary: format!("{error:#}") },
    }
}

fn not_run(gate: &'static str, why: &str) -> Finding {
    Finding { gate, state: "not run", summary: why.to_owned() }
}

/// Where a copy of RustSec's database lies (its git repository, checked out).
const ADVISORIES: &str = "CORACLE_ADVISORIES";

/// Crates of Cargo.lock that RustSec has an advisory of. CI has no network to fetch the database by: it is given, or this is not run.
fn advisories() -> Finding {
    match std::env::var_os(ADVISORIES) {
        None => not_run("advisories", "no database is given (CORACLE_ADVISORIES: a checkout of RustSec's)"),
        Some(folder) => look("advisories", || known_of(Path::new(&folder), &top().join("Cargo.lock"))),
    }
}

fn known_of(folder: &Path, lock: &Path) -> Result<String> {
    let database = rustsec::Database::open(folder).with_context(|| format!("{}: no database", folder.display()))?;
    let lock = rustsec::Lockfile::load(lock).with_context(|| format!("read {}", lock.display()))?;
    let count = database.iter().count();
    if count == 0 {
        bail!("{}: there are no advisories in it", folder.display());
    }
    let found: Vec<String> = database
        .vulnerabilities(&lock)
        .iter()
        .map(|one| {
            format!("{} {}: {} ({})", one.package.name, one.package.version, one.advisory.id, one.advisory.title)
        })
        .collect();
    if !found.is_empty() {
        bail!("{}", found.join("; "));
    }
    Ok(format!("none of {count} advisories is of one of {} crates", lock.packages.len()))
}

/// Where the findings lie.
fn file() -> Result<PathBuf> {
    Ok(build::target()?.join("ci/gates.json"))
}

/// Bills of what is shipped, written into the folder; how many parts they name.
pub(crate) fn bills(built: &Built, folder: &Path) -> Result<usize> {
    std::fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    let guest = built.guest(tests::KERNEL)?;
    let metadata = metadata::read(Some(sbom::PLATFORM))?;
    let bills = [
        ("coracle", sbom::of_program(&metadata, "coracle-cli", &built.coracle())?),
        ("containerd-shim-coracle-v2", sbom::of_program(&metadata, "coracle-shim", &built.shim())?),
        ("coracle-agent", sbom::of_program(&metadata, "coracle-agent", &built.agent())?),
        ("guest-image", sbom::of_image(&guest, &built.agent())?),
    ];
    let mut count = 0;
    for (name, bill) in bills {
        count += bill["components"].as_array().map_or(0, Vec::len);
        let file = folder.join(format!("{name}.cdx.json"));
        std::fs::write(&file, format!("{bill:#}")).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(count)
}

fn parts(built: &Built) -> Result<String> {
    let folder = build::target()?.join("ci/sbom");
    let count = bills(built, &folder)?;
    Ok(format!("{count} parts of three programs and the guest image, as CycloneDX"))
}

/// Makes the guest image a second time, elsewhere: byte for byte the same.
fn reproducible(built: &Built) -> Result<String> {
    let first = built.guest(tests::KERNEL)?;
    let again = built.work().join("guest-again");
    let _ = std::fs::remove_dir_all(&again);
    let mut make = command(&built.coracle().display().to_string(), &["image", "build", "--kernel", tests::KERNEL]);
    make.arg("--agent").arg(built.agent()).arg("--output").arg(&again).stdout(std::process::Stdio::null());
    run_command(make)?;
    let mut names: Vec<_> =
        std::fs::read_dir(&first).context("the image")?.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    for name in &names {
        let read = |folder: &Path| std::fs::read(folder.join(name)).with_context(|| format!("read {}", name.display()));
        if read(&first)? != read(&again)? {
            bail!("{} is another one each time it is made", name.display());
        }
    }
    std::fs::remove_dir_all(&again).context("remove the second one")?;
    let manifest = sbom::manifest(&first)?;
    let digest = manifest["initrd_sha256"].as_str().unwrap_or_default().chars().take(16).collect::<String>();
    Ok(format!(
        "{} files are the same made twice (initrd {digest}…, kernel {})",
        names.len(),
        manifest["kernel_release"].as_str().unwrap_or_default()
    ))
}

/// What the board is told: the gates' findings, and those that are jobs of CI.
pub(crate) fn found(jobs: &[(&str, bool)], at: &str, commit: &str) -> Result<Vec<Value>> {
    let mut list = Vec::new();
    let mut add = |gate: &str, state: &str, summary: &str| {
        list.push(json!({ "gate": gate, "at": at, "commit": commit, "state": state, "summary": summary }));
    };
    let told = [
        ("lint", "lint", "format, clippy, layers, licences, bans and sources (cargo-deny)"),
        ("fuzz", "fuzzing", "each target's smoke (docs/fuzzing.md)"),
        ("faults", "faults", "all pairs of points and faults (docs/faults.md)"),
        ("counts", "budgets of counts", "xtask/budgets.toml"),
    ];
    for (job, gate, summary) in told {
        if let Some((_, passed)) = jobs.iter().find(|(name, _)| *name == job) {
            add(gate, if *passed { "passed" } else { "failed" }, summary);
        }
    }
    if jobs.iter().any(|(name, _)| *name == "gates") {
        let Ok(text) = std::fs::read_to_string(file()?) else {
            add("gates", "failed", "the job ended before it found anything");
            return Ok(list);
        };
        for one in serde_json::from_str::<Vec<Value>>(&text).context("the gates' findings")? {
            let text = |name: &str| one[name].as_str().unwrap_or_default().to_owned();
            add(&text("gate"), &text("state"), &text("summary"));
        }
    }
    Ok(list)
}

#[test]
fn an_advisory_of_a_crate_that_is_locked_is_found_and_one_that_is_mended_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let advisory = |id: &str, name: &str| {
        format!(
            "```toml\n[advisory]\nid = \"{id}\"\npackage = \"{name}\"\ndate = \"2026-01-01\"\n\n[versions]\npatched = [\">= 1.2.0\"]\n```\n\n# Something is wrong\n\nIt is.\n"
        )
    };
    write("db/crates/one/RUSTSEC-2026-0001.md", &advisory("RUSTSEC-2026-0001", "one"));
    let lock = |version: &str| {
        write(
            "Cargo.lock",
            &format!(
                "version = 4\n\n[[package]]\nname = \"one\"\nversion = \"{version}\"\nsource = \"registry+https://github.com/rust-lang/crates.io-index\"\n"
            ),
        );
        known_of(&folder.path().join("db"), &folder.path().join("Cargo.lock"))
    };
    let error = lock("1.1.9").unwrap_err().to_string();
    assert!(error.contains("one 1.1.9: RUSTSEC-2026-0001 (Something is wrong)"), "{error}");
    assert_eq!(lock("1.2.0").unwrap(), "none of 1 advisories is of one of 1 crates");
    assert!(known_of(&folder.path().join("nothing"), &folder.path().join("Cargo.lock")).is_err());
}

//! `cargo xtask release --dry-run`: all that a release has, made and checked, without giving it to anybody.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::steps::{command, output, step, top};
use crate::{build, deb, gates, notes};

/// Make what a release has: the package, its notes with what is deprecated, bills of its parts, checksums.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Make and check, and publish nothing. There is no other way: who publishes is a person, by the checklist in docs/release.md.
    #[arg(long, required = true)]
    dry_run: bool,
    /// Make it of a tree with changes that are not committed, too.
    #[arg(long)]
    dirty: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    debug_assert!(args.dry_run);
    let changed = output(command("git", &["status", "--porcelain"]))?;
    if !changed.is_empty() && !args.dirty {
        bail!("there are changes that are not committed:\n{changed}commit them, or give --dirty");
    }
    let version = env!("CARGO_PKG_VERSION");
    let log = std::fs::read_to_string(top().join("CHANGELOG.md")).context("read CHANGELOG.md")?;
    let heading = heading(&log, version)?;
    let text = notes::notes(&top(), &heading)?;
    let built = build::all()?;
    let folder = build::target()?.join(format!("release-{version}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let package = deb::run()?;
    let file = folder.join(package.file_name().context("the package's name")?);
    std::fs::copy(&package, &file).context("copy the package")?;
    gates::bills(&built, &folder)?;
    std::fs::write(folder.join("NOTES.md"), text).context("write the notes")?;
    step("checksums", || sums(&folder))?;
    println!("Coracle {version}, by its changelog's section {heading:?}, in {}:", folder.display());
    for name in names(&folder)? {
        println!("  {}", name.display());
    }
    println!("published: nothing");
    Ok(())
}

/// The changelog's section of a version: its own, or the one of what is not released yet.
fn heading(log: &str, version: &str) -> Result<String> {
    let mut found = log.lines().filter_map(|line| line.strip_prefix("## "));
    let newest = found.next().context("CHANGELOG.md has no section")?;
    match newest.split(' ').next() {
        Some("Unreleased") => Ok("Unreleased".to_owned()),
        Some(number) if number == version => Ok(number.to_owned()),
        _ => bail!(
            "CHANGELOG.md begins with {newest:?}, and Cargo.toml says version {version}: one of them is to be changed"
        ),
    }
}

fn names(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names: Vec<PathBuf> = entries.flatten().map(|entry| PathBuf::from(entry.file_name())).collect();
    names.sort();
    Ok(names)
}

/// SHA256SUMS, as sha256sum(1) writes and checks it.
fn sums(folder: &Path) -> Result<()> {
    let mut sum = command("sha256sum", &["--"]);
    let text = output({
        sum.args(names(folder)?).current_dir(folder);
        sum
    })?;
    std::fs::write(folder.join("SHA256SUMS"), text).context("write the checksums")
}

#[test]
fn a_version_and_the_changelog_are_of_one_mind() {
    assert_eq!(heading("# C\n\n## Unreleased\n", "0.1.0").unwrap(), "Unreleased");
    assert_eq!(heading("# C\n\n## 0.1.0 (2026-12-01)\n", "0.1.0").unwrap(), "0.1.0");
    assert!(heading("## 0.2.0\n", "0.1.0").unwrap_err().to_string().contains("to be changed"));
    assert!(heading("# C\n", "0.1.0").is_err());
}

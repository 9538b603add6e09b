//! `cargo xtask notes`: the notes of a release, from the changelog and the register of what is deprecated as the reference shows it.

use std::path::Path;

use anyhow::{Context, Result};

use crate::steps::top;

/// Print the notes of a release: what the changelog says of it, and what is deprecated and has gone.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The release, by its heading in CHANGELOG.md.
    #[arg(default_value = "Unreleased")]
    release: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    print!("{}", notes(&top(), &args.release)?);
    Ok(())
}

pub(crate) fn notes(top: &Path, release: &str) -> Result<String> {
    let read = |name: &str| std::fs::read_to_string(top.join(name)).with_context(|| format!("read {name}"));
    let changes = section(&read("CHANGELOG.md")?, release)
        .with_context(|| format!("CHANGELOG.md has no section \"## {release}\": it names the releases there are"))?;
    let deprecated = section(&read("docs/reference/settings.md")?, "What is deprecated")
        .context("docs/reference/settings.md has no section on it: `cargo xtask docs` writes it")?;
    Ok(format!("# Coracle, {release}\n\n{changes}\n\n## What is deprecated\n\n{deprecated}\n"))
}

/// What stands below a heading of the second rank, up to the next one. Release 1.2.3's may have its day behind it.
fn section(text: &str, heading: &str) -> Option<String> {
    let is_it = |line: &str| {
        line.strip_prefix("## ").is_some_and(|found| found == heading || found.split(' ').next() == Some(heading))
    };
    let mut lines = text.lines().skip_while(|line| !is_it(line));
    lines.next()?;
    let below: Vec<_> = lines.take_while(|line| !line.starts_with("## ")).collect();
    Some(below.join("\n").trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notes_say_what_changed_and_what_goes() {
        let notes = notes(&top(), "Unreleased").unwrap();
        assert!(notes.contains("## What is deprecated\n\n") && notes.contains("coracle run"), "{notes}");
        assert!(super::notes(&top(), "0.0.0").unwrap_err().to_string().contains("no section"));
        let log = "# C\n\n## 1.2.0 (2027-01-01)\n\n- a\n\n## 1.1.0\n\n- b\n";
        assert_eq!(section(log, "1.2.0").as_deref(), Some("- a"));
        assert_eq!(section(log, "1.1.0").as_deref(), Some("- b"));
        assert_eq!(section(log, "1.1"), None);
    }
}

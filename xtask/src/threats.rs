//! docs/threat-model.md, held against the tests that there are: what is said to be shown by a test is shown by one.

use std::collections::BTreeSet;

use crate::steps::{files, top};

/// The names of all tests of the source.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in files(&["*.rs"]).unwrap() {
        let text = std::fs::read_to_string(top().join(path)).unwrap_or_default();
        let mut is_next = false;
        for line in text.lines().map(str::trim) {
            is_next |= line == "#[test]" || line.starts_with("#[tokio::test");
            if let Some((_, after)) = line.split_once("fn ").filter(|_| is_next) {
                names.insert(after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect());
                is_next = false;
            }
        }
    }
    names
}

/// The cells of a table's row; none of another line, or of a table's head.
fn cells(line: &str) -> Option<Vec<&str>> {
    let inner = line.strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(str::trim).collect())
}

/// The words between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn each_claim_of_the_threat_model_has_its_test_or_says_none() {
    let read = |name: &str| std::fs::read_to_string(top().join(name)).unwrap();
    let page = read("docs/threat-model.md");
    let tests = tests();
    let folder = std::fs::read_dir(top().join("tests/e2e/tests/pod_checks")).unwrap();
    let checks: String = folder.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    let targets = read("fuzz/src/lib.rs");
    let (mut rows, mut claims) = (0, BTreeSet::new());
    for line in page.lines().filter(|line| line.starts_with("| ")) {
        let cells = cells(line).unwrap_or_else(|| panic!("{line}"));
        let [_, _, shown, _] = cells[..] else { continue };
        if shown == "test" {
            continue;
        }
        rows += 1;
        assert!(shown.contains('`') || shown.contains("**none**"), "{line}: no test is named, and it does not say so");
        let (mut is_check, mut is_fuzz) = (false, false);
        for part in shown.split(", ").flat_map(|part| part.split("; ")) {
            (is_check, is_fuzz) = match part {
                _ if part.starts_with("checks: ") => (true, false),
                _ if part.starts_with("fuzz: ") => (false, true),
                _ => (is_check, is_fuzz),
            };
            for name in quoted(part) {
                claims.insert(name.to_owned());
                let is_there = match name {
                    _ if name.starts_with("cargo xtask ") => true,
                    _ if is_fuzz => targets.contains(&format!("(\"{name}\", ")),
                    _ if is_check => checks.contains(&format!("\"{name}\"")),
                    _ => tests.contains(name),
                };
                assert!(is_there, "{name}: there is no such test ({line})");
            }
        }
    }
    assert!(rows > 50 && claims.len() > 80, "{rows} rows, {} tests: is the page still read rightly?", claims.len());
}

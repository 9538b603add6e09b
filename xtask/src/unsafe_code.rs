//! docs/unsafe.md: where the shipped source is `unsafe`, and why, out of the reasons that stand there.

use std::collections::BTreeMap;
#[cfg(test)]
use std::fmt::Write;

use anyhow::Result;

use crate::steps::{files, top};

/// Each reason that a file gives, and how often; tests left out, and the tests' own packages.
type Reasons = BTreeMap<String, BTreeMap<String, usize>>;

fn find() -> Result<Reasons> {
    let mut found = Reasons::new();
    for path in files(&["boundary/*.rs", "guest/*.rs", "host/*.rs"])? {
        if !path.contains("/src/") || path.ends_with("tests.rs") || path.contains("/tests/") {
            continue;
        }
        let text = std::fs::read_to_string(top().join(&path)).unwrap_or_default();
        for reason in reasons(&text) {
            *found.entry(path.clone()).or_default().entry(reason).or_default() += 1;
        }
    }
    Ok(found)
}

/// How many places there are, in all.
pub(crate) fn places() -> Result<usize> {
    Ok(find()?.values().flat_map(BTreeMap::values).sum())
}

/// The reasons in a file, as `#[expect(unsafe_code, reason = "...")]` gives them: clippy forbids a block without.
fn reasons(text: &str) -> Vec<String> {
    // However rustfmt has broken the lines.
    let code = text.lines().take_while(|line| *line != "#[cfg(test)]").flat_map(str::split_whitespace);
    let code = code.collect::<Vec<_>>().join(" ").replace("expect( ", "expect(");
    let after = |part: &str| {
        let (_, rest) = part.split_once("reason")?;
        let (_, rest) = rest.split_once('"')?;
        Some(rest.split_once('"')?.0.to_owned())
    };
    code.split("expect(unsafe_code").skip(1).map(|part| after(part).unwrap_or_else(|| "no reason".into())).collect()
}

#[cfg(test)]
fn page(found: &Reasons) -> String {
    let package = |path: &str| path.split("/src/").next().unwrap_or_default().to_owned();
    let mut packages: BTreeMap<String, usize> = BTreeMap::new();
    for (path, reasons) in found {
        *packages.entry(package(path)).or_default() += reasons.values().sum::<usize>();
    }
    let total: usize = packages.values().sum();
    let mut text = format!(
        "# Unsafe code\n\nMade by `cargo xtask docs` from the source; not written by hand. Each block has its reason, and beside it a SAFETY note (clippy refuses one \
         without). Tests are left out.\n\n{total} places in {} packages:\n\n| package | places |\n|---|---|\n",
        packages.len()
    );
    for (package, count) in &packages {
        let _ = writeln!(text, "| {package} | {count} |");
    }
    text.push_str("\n| file | why |\n|---|---|\n");
    for (path, reasons) in found {
        let each = reasons
            .iter()
            .map(|(reason, count)| if *count > 1 { format!("{reason} ({count})") } else { reason.clone() });
        let _ = writeln!(text, "| {path} | {} |", each.collect::<Vec<_>>().join("; ").replace('|', "\\|"));
    }
    text
}

#[test]
fn the_inventory_of_unsafe_code_is_what_the_source_has() {
    let found = find().unwrap();
    let page = page(&found);
    assert!(found.len() > 10 && !page.contains("no reason"), "{page}");
    let file = top().join("docs/unsafe.md");
    if std::env::var_os("CORACLE_DOCS").is_some_and(|wish| wish == "write") {
        std::fs::write(&file, &page).unwrap();
    }
    let known = std::fs::read_to_string(&file).unwrap_or_default();
    let differs = page.lines().zip(known.lines()).find(|(now, then)| now != then);
    assert!(page == known, "docs/unsafe.md is out of date ({differs:?}): `cargo xtask docs` makes it");
}

#[test]
fn reasons_are_read_whole_and_tests_are_not() {
    let text = "#[expect(unsafe_code, reason = \"ioctl\")]\n#[expect(\n  unsafe_code,\n  reason = \"x y\"\n)]\n\
                #[expect(unsafe_code)]\n#[cfg(test)]\n#[expect(unsafe_code, reason = \"test\")]\n";
    assert_eq!(reasons(text), ["ioctl", "x y", "no reason"]);
}

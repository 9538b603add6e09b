//! docs/parity.md: each feature of Kata's with the test that shows it here, made from docs/parity.tsv and held against the tests that there are.

/// The states, as the table says them, and whether a test is named.
const STATES: [(&str, &str, bool); 4] = [
    ("tested", "the same, and tested", true),
    ("differs", "another way to the same end, and tested", true),
    ("refused", "refused, or not done", false),
    ("planned", "planned", false),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::steps::{files, top};

    /// The names of all functions of the source.
    fn functions() -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        for path in files(&["*.rs"]).unwrap() {
            let text = std::fs::read_to_string(top().join(path)).unwrap_or_default();
            let after = text.lines().filter_map(|line| line.trim_start().split_once("fn ").map(|(_, after)| after));
            names.extend(after.map(|after| after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()));
        }
        names
    }

    fn page(rows: &[Vec<&str>]) -> String {
        let count = |state: &str| rows.iter().filter(|row| row[2] == state).count();
        let counts: Vec<_> = STATES.iter().map(|(state, text, _)| format!("{}: {}", text, count(state))).collect();
        let mut page = format!(
            "# Beside Kata Containers 4.1\n\nMade by `cargo xtask docs` from docs/parity.tsv; not written by hand. Each row is a feature of Kata's, by the sections \
             of an inventory of its source; what shows it here is the name of a test, of which there is one by that name.\n\n{} features. {}.\n",
            rows.len(),
            counts.join("; ")
        );
        let mut section = "";
        for row in rows {
            if row[0] != section {
                section = row[0];
                page.push_str(&format!("\n## {section}\n\n| feature | here | shown by, or why |\n|---|---|---|\n"));
            }
            let cell = |text: &str| text.replace('|', "\\|");
            let (name, more) = row[3].split_once(" - ").unwrap_or((row[3], ""));
            let evidence = match (row[2], more) {
                ("tested" | "differs", "") => format!("`{name}`"),
                ("tested" | "differs", more) => format!("`{name}`: {}", cell(more)),
                _ => cell(row[3]),
            };
            page.push_str(&format!("| {} | {} | {evidence} |\n", cell(row[1]), row[2]));
        }
        page
    }

    #[test]
    fn parity_is_what_the_tests_show() {
        let table = std::fs::read_to_string(top().join("docs/parity.tsv")).unwrap();
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split('\t').collect()).collect();
        let functions = functions();
        for row in &rows {
            assert_eq!(row.len(), 4, "{row:?}");
            let (_, _, has_test) =
                STATES.iter().find(|(state, ..)| *state == row[2]).unwrap_or_else(|| panic!("{row:?}"));
            let name = row[3].split(" - ").next().unwrap();
            assert!(!has_test || functions.contains(name), "{row:?}: there is no test of that name");
            assert!(!row[3].is_empty(), "{row:?}");
        }
        let (path, page) = (top().join("docs/parity.md"), page(&rows));
        if std::env::var_os("CORACLE_DOCS").is_some_and(|wish| wish == "write") {
            std::fs::write(&path, &page).unwrap();
        }
        assert!(std::fs::read_to_string(&path).unwrap_or_default() == page, "docs/parity.md: run `cargo xtask docs`");
    }
}

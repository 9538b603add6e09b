//! What commands print, held against what is written down: words and layout as they are, in the place of what differs each time a mark.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use crate::{Host, Outcome};

/// What several commands have printed, as it is compared with a file of `tests/e2e/snapshots`.
#[derive(Debug, Default)]
pub struct Snapshot(String);

impl Snapshot {
    /// Adds what a command prints for people.
    ///
    /// # Panics
    /// Where it fails.
    pub fn text(&mut self, host: &Host, arguments: &[&str]) {
        let outcome = self.begin(host, arguments);
        for line in outcome.stdout.lines() {
            let _ = writeln!(self.0, "{}", marked(&line.replace(&host.image(), "IMAGE")));
        }
    }

    /// Adds what a command prints for programs: names, and the kinds of their values.
    ///
    /// # Panics
    /// Where it fails, or that is no JSON.
    pub fn json(&mut self, host: &Host, arguments: &[&str]) {
        let outcome = self.begin(host, arguments);
        let value = serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:?}"));
        let shape = serde_json::to_string_pretty(&shape(&value)).expect("JSON");
        let _ = writeln!(self.0, "{shape}");
    }

    fn begin(&mut self, host: &Host, arguments: &[&str]) -> Outcome {
        let folder = host.folder.display().to_string();
        let words: Vec<String> = arguments.iter().map(|word| marked(&word.replace(&folder, "FOLDER"))).collect();
        let _ = writeln!(self.0, "$ coracle {}", words.join(" "));
        let outcome = host.coracle_outcome(arguments);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        outcome
    }

    /// Compares all of it with the file of that name. `CORACLE_SNAPSHOTS=write` writes the file.
    ///
    /// # Panics
    /// Where they differ.
    pub fn is(self, name: &str) {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots").join(name);
        if std::env::var_os("CORACLE_SNAPSHOTS").is_some_and(|value| value == "write") {
            std::fs::create_dir_all(file.parent().expect("a folder")).expect("the folder of snapshots");
            std::fs::write(&file, &self.0).expect("the snapshot");
        }
        let known = std::fs::read_to_string(&file).unwrap_or_default();
        let differs = self.0.lines().zip(known.lines()).find(|(now, then)| now != then);
        assert!(self.0 == known, "{name}: {differs:?}; CORACLE_SNAPSHOTS=write makes it anew. Now:\n{}", self.0);
    }
}

/// A line with `0` for each number, `ID` for what is hexadecimal and long, and two spaces for more.
fn marked(line: &str) -> String {
    let mut text = String::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let length = |is: fn(char) -> bool| rest.find(|c| !is(c)).unwrap_or(rest.len());
        let (word, spaces) = (length(|c| c.is_ascii_alphanumeric() || c == '.'), length(|c| c == ' '));
        let end = word.max(spaces).max(first.len_utf8());
        let (token, behind) = rest.split_at(end);
        rest = behind;
        text += match token {
            _ if spaces > 2 => "  ",
            _ if token.len() >= 12 && token.bytes().all(|byte| byte.is_ascii_hexdigit()) => "ID",
            _ if first.is_ascii_digit() => "0",
            "emulation" | "kvm" => "ACCELERATOR",
            "qemu" | "builtin" => "MONITOR",
            "B" | "KiB" | "MiB" | "GiB" => "BYTES",
            _ => token,
        };
    }
    text
}

/// The same with the kind of each value in its place, and the first of each list.
fn shape(value: &Value) -> Value {
    match value {
        Value::Null => Value::Null,
        Value::Bool(_) => "true or false".into(),
        Value::Number(_) => "number".into(),
        Value::String(_) => "text".into(),
        Value::Array(all) => all.iter().take(1).map(shape).collect(),
        Value::Object(all) => all.iter().map(|(name, value)| (name.clone(), shape(value))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_each_time_is_marked() {
        assert_eq!(marked("488aa03386aa    12 MiB  2.5 %  up — kvm"), "ID  0 BYTES  0 %  up — ACCELERATOR");
        assert_eq!(marked("decade a1 b"), "decade a1 b");
    }
}

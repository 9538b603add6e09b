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
        self.parts(host, arguments, |line| Some(line.to_owned()));
    }

    /// Adds that part of each line which is the same everywhere; lines that have none are left out.
    ///
    /// # Panics
    /// Where the command fails.
    pub fn parts(&mut self, host: &Host, arguments: &[&str], part: impl Fn(&str) -> Option<String>) {
        let outcome = self.outcome(host, arguments);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        self.lines(host, &outcome.stdout, part);
    }

    /// Adds what a command says that can't do what it was asked for.
    ///
    /// # Panics
    /// Where it does not fail.
    pub fn refused(&mut self, host: &Host, arguments: &[&str]) {
        let outcome = self.outcome(host, arguments);
        assert_ne!(outcome.code, 0, "{outcome:?}");
        self.lines(host, &outcome.stderr, |line| Some(line.to_owned()));
        let _ = writeln!(self.0, "(exit status {})", outcome.code);
    }

    /// Adds what a command prints for programs: names, and the kinds of their values.
    ///
    /// # Panics
    /// Where it fails, or that is no JSON.
    pub fn json(&mut self, host: &Host, arguments: &[&str]) {
        self.json_without(host, arguments, "");
    }

    /// The same without one of its fields, whose own differ from host to host.
    ///
    /// # Panics
    /// As [`Self::json`], and where there is no such field.
    pub fn json_without(&mut self, host: &Host, arguments: &[&str], field: &str) {
        let outcome = self.outcome(host, arguments);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        let mut value: Value =
            serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:?}"));
        if !field.is_empty() {
            let gone = value.as_object_mut().and_then(|all| all.remove(field));
            assert!(gone.is_some(), "{field}: {outcome:?}");
        }
        let shape = serde_json::to_string_pretty(&shape(&value)).expect("JSON");
        let _ = writeln!(self.0, "{shape}");
    }

    fn lines(&mut self, host: &Host, text: &str, part: impl Fn(&str) -> Option<String>) {
        for line in text.lines().filter_map(part) {
            let _ = writeln!(self.0, "{}", marked(&placed(host, &line)));
        }
    }

    fn outcome(&mut self, host: &Host, arguments: &[&str]) -> Outcome {
        let words: Vec<String> = arguments.iter().map(|word| marked(&placed(host, word))).collect();
        let _ = writeln!(self.0, "$ coracle {}", words.join(" "));
        host.coracle_outcome(arguments)
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

/// A line with names in the place of paths that are this test's.
fn placed(host: &Host, line: &str) -> String {
    let folder = |path: &Path| path.display().to_string();
    line.replace(&host.image(), "IMAGE")
        .replace(&folder(&host.folder), "FOLDER")
        .replace(&folder(&host.run), "RUN")
        .replace(&folder(&crate::path("CORACLE_TEST_GUEST")), "GUEST")
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

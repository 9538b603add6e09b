//! What is made of the declarations: a settings file with all of them, a page, a schema.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use crate::declare::LEVELS;
use crate::deprecation::{self, Kind};
use crate::{Entry, Support, reference};

/// The tables, each with its settings, in the order of their declaration.
fn tables() -> Vec<(&'static str, Vec<Entry>)> {
    let mut tables: Vec<(&'static str, Vec<Entry>)> = Vec::new();
    for entry in reference() {
        let name = entry.key.split_once('.').map_or("", |(table, _)| table);
        match tables.iter_mut().find(|(table, _)| *table == name) {
            Some((_, entries)) => entries.push(entry),
            None => tables.push((name, vec![entry])),
        }
    }
    tables
}

fn own_name(entry: &Entry) -> &'static str {
    entry.key.split_once('.').map_or(entry.key, |(_, name)| name)
}

/// What is said of a setting beside its text.
fn notes(entry: &Entry) -> String {
    let mut notes = String::new();
    if let Some(annotation) = entry.annotation() {
        let _ = write!(notes, " A pod may set it by `{annotation}`, where `annotations.allow` has it.");
    }
    if let Some(deprecation) = deprecation::of(Kind::Setting, entry.key) {
        let _ = write!(notes, " **Deprecated**: {deprecation}.");
    }
    notes
}

/// A settings file with all settings, their texts and their defaults, of which none counts until its `#` is taken away.
#[must_use]
pub fn default_file() -> String {
    let mut text = String::new();
    for (name, entries) in tables() {
        let _ = writeln!(text, "{}[{name}]", if text.is_empty() { "" } else { "\n" });
        for entry in entries {
            let _ = writeln!(text, "# {}{}\n# Expected: {}.", entry.text, notes(&entry), entry.expected);
            let _ = writeln!(text, "#{} = {}", own_name(&entry), entry.default);
        }
    }
    text
}

/// The reference as a page of Markdown.
#[must_use]
pub fn page() -> String {
    let mut text = String::from(
        "# Settings\n\nMade by `cargo xtask docs` from the declarations in host/settings; not written by hand.\n\nThey are read from \
         `/usr/share/coracle/config.toml`, then `/etc/coracle/config.toml`, then the files `*.toml` in `/etc/coracle/config.d` in the order of \
         their names, then the file that containerd's configuration names (`ConfigPath`), then annotations of the pod, as far as \
         `annotations.allow` lets them: each changes what it names. `coracle settings show` says what counts, and where it stands; `coracle settings \
         check` what is wrong; `coracle settings schema` gives a JSON schema. A file that others than root and its reader can write to is refused.\n",
    );
    for (name, entries) in tables() {
        let _ = write!(text, "\n## [{name}]\n\n| setting | default | expected | since | |\n|---|---|---|---|---|\n");
        for entry in entries {
            let _ = writeln!(
                text,
                "| `{}` | `{}` | {} | {}, {} | {}{} |",
                entry.key,
                entry.default,
                entry.expected,
                entry.since,
                entry.support.name(),
                entry.text,
                notes(&entry)
            );
        }
    }
    text.push_str(
        "\n## How far the rest can be relied upon\n\nCommands, drivers and methods are supported, as settings are where nothing else stands beside \
         them; an annotation is as its setting. But:\n\n| | | level | why |\n|---|---|---|---|\n",
    );
    for (kind, name, _, why) in LEVELS {
        let level = Support::of(*kind, name).name();
        let _ = writeln!(text, "| {} | `{name}` | {level} | {why} |", kind.name());
    }
    text.push_str("\n## What is deprecated\n\n");
    if deprecation::ALL.is_empty() {
        text.push_str("Nothing.\n");
    }
    for entry in deprecation::ALL {
        let _ = writeln!(text, "- {entry}.");
    }
    text
}

/// A JSON schema (2020-12) of a settings file, for editors.
#[must_use]
pub fn schema() -> Value {
    let mut properties = Map::new();
    for (name, entries) in tables() {
        let mut own = Map::new();
        for entry in entries {
            let mut schema = (entry.schema)();
            if let Some(schema) = schema.as_object_mut() {
                schema.insert("description".into(), entry.text.into());
                if deprecation::of(Kind::Setting, entry.key).is_some() {
                    schema.insert("deprecated".into(), true.into());
                }
            }
            own.insert(own_name(&entry).into(), schema);
        }
        properties.insert(name.into(), json!({ "type": "object", "additionalProperties": false, "properties": own }));
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Coracle's settings",
        "type": "object",
        "additionalProperties": false,
        "properties": properties,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Loaded;

    #[test]
    fn the_default_file_with_every_line_taken_in_is_the_defaults() {
        let is_setting = |line: &&str| line.starts_with('#') && !line.starts_with("# ");
        let taken: String = default_file()
            .lines()
            .map(|line| if is_setting(&line) { format!("{}\n", &line[1..]) } else { format!("{line}\n") })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f.toml");
        for text in [taken, default_file()] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(Loaded::from_file(&path).unwrap().settings, crate::Settings::default());
        }
    }

    #[test]
    fn each_setting_is_on_the_page_and_in_the_schema() {
        let (page, schema) = (page(), schema());
        for entry in reference() {
            assert!(page.contains(&format!("| `{}` |", entry.key)), "{}", entry.key);
            let (table, name) = entry.key.split_once('.').unwrap();
            let own = &schema["properties"][table]["properties"][name];
            assert!(own["description"].is_string(), "{}", entry.key);
            assert!(own["type"].is_string() || own["enum"].is_array(), "{}", entry.key);
        }
        assert!(page.contains("io.coracle.config.machine.memory_mib"));
    }
}

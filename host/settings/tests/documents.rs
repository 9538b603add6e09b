//! The documents that are made of the declarations are as these are now. `cargo xtask docs` writes them.

use std::path::PathBuf;

use coracle_settings::deprecation::{GONE, Kind, unannounced};

/// Compares a document with what it should be, or writes it where `CORACLE_DOCS` says `write`.
fn keep(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference").join(name);
    if std::env::var_os("CORACLE_DOCS").is_some_and(|wish| wish == "write") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == text, "docs/reference/{name} is not what the declarations say: run `cargo xtask docs`");
}

#[test]
fn the_reference_of_settings() {
    keep("settings.md", &coracle_settings::page());
}

#[test]
fn the_schema_of_settings() {
    keep("settings.schema.json", &format!("{}\n", serde_json::to_string_pretty(&coracle_settings::schema()).unwrap()));
}

#[test]
fn what_katas_keys_become() {
    keep("kata.md", &coracle_settings::kata_page());
}

/// Names that there are or once were, one a line behind their kind: the register of what users can rely on. It only grows, by `cargo xtask docs`; what
/// is taken out of it by hand was in the register of deprecations first.
#[test]
fn no_setting_goes_unannounced() {
    let there: Vec<String> = coracle_settings::reference().into_iter().map(|entry| entry.key.to_owned()).collect();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/inventory/settings.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let mut known: Vec<&str> = text.lines().collect();
    if std::env::var_os("CORACLE_DOCS").is_some_and(|wish| wish == "write") {
        known.extend(there.iter().map(String::as_str));
        known.sort_unstable();
        known.dedup();
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, known.join("\n") + "\n").unwrap();
    }
    assert_eq!(
        unannounced(Kind::Setting, &known, &there, GONE),
        [""; 0],
        "deprecate it first: docs/guide/deprecation.md"
    );
    assert!(
        there.iter().all(|key| known.contains(&key.as_str())),
        "a setting is not in the inventory: run `cargo xtask docs`"
    );
}

//! The documents that are made of the declarations are as these are now. `cargo xtask docs` writes them.

use std::path::PathBuf;

use coracle_settings::deprecation::{GONE, Kind, inventory};

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

#[test]
fn no_setting_goes_unannounced() {
    let there: Vec<String> = coracle_settings::reference().into_iter().map(|entry| entry.key.to_owned()).collect();
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/inventory/settings.txt");
    let inventory = inventory(Kind::Setting, &std::fs::read_to_string(path).unwrap_or_default(), &there, GONE);
    keep("inventory/settings.txt", &inventory.text);
    assert_eq!(inventory.unannounced, [""; 0], "deprecate it first: docs/guide/deprecation.md");
}

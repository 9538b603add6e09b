//! A file of settings, and one of Kata's.

use std::io::Write;

use coracle_settings::{Loaded, migrate};

/// Runs one input: its text.
///
/// # Panics
/// Where settings that were taken are not taken again as they are shown, or Kata's that were checked are none.
pub fn one(data: &[u8]) {
    let mut file = tempfile::NamedTempFile::new().expect("a file");
    file.write_all(data).expect("a file");
    if let Ok(loaded) = Loaded::from_file(file.path()) {
        let text: String =
            loaded.settings.values().into_iter().map(|(key, value)| format!("{key} = {value}\n")).collect();
        let mut shown = tempfile::NamedTempFile::new().expect("a file");
        shown.write_all(text.as_bytes()).expect("a file");
        let again = Loaded::from_file(shown.path()).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_eq!(again.settings.values(), loaded.settings.values());
    }
    // A value of another kind than Kata takes is found by the check.
    if let Ok(migration) = migrate(&[file.path()])
        && migration.refused().is_none()
        && migration.check().is_ok()
    {
        let mut made = tempfile::NamedTempFile::new().expect("a file");
        made.write_all(migration.text().as_bytes()).expect("a file");
        Loaded::from_file(made.path()).unwrap_or_else(|error| panic!("{error}: {}", migration.text()));
    }
}

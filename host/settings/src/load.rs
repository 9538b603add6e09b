//! Reading the settings.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::Settings;
use crate::declare::reference;

/// The administrator's file.
pub const FILE: &str = "/etc/coracle/config.toml";

/// The variable that names another file.
pub const ENVIRONMENT: &str = "CORACLE_CONFIG";

/// Settings as TOML that count less than the file, and such that count more: how `coracle run` starts its shims. Whoever
/// can set a shim's environment can replace the shim.
pub const DEFAULTS: &str = "CORACLE_DEFAULTS";
/// See [`DEFAULTS`].
pub const OVERRIDES: &str = "CORACLE_OVERRIDES";

/// Why settings can't be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file can't be read.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{path}: {text}")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// The parser's words, with line and column.
        text: String,
    },
    /// There is no such setting.
    #[error("{path}: there is no setting {key}; did you mean {nearest}?")]
    Unknown {
        /// The file.
        path: PathBuf,
        /// The key as it stands there.
        key: String,
        /// The nearest that there is.
        nearest: &'static str,
    },
    /// A setting has a value of the wrong type.
    #[error("{path}: {key} must be {expected}")]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it must be.
        expected: &'static str,
    },
}

impl Settings {
    /// The settings of this host: those of the file that `$CORACLE_CONFIG` names, else of [`FILE`] where it is there.
    ///
    /// # Errors
    /// [`Error`]; a file that is named must be there.
    pub fn load() -> Result<Self, Error> {
        let mut settings = Self::default();
        settings.read_variable(DEFAULTS)?;
        match std::env::var_os(ENVIRONMENT) {
            Some(path) => settings.read_file(Path::new(&path))?,
            None if Path::new(FILE).exists() => settings.read_file(Path::new(FILE))?,
            None => {}
        }
        settings.read_variable(OVERRIDES)?;
        Ok(settings)
    }

    fn read_variable(&mut self, name: &str) -> Result<(), Error> {
        match std::env::var(name) {
            Ok(text) => self.read_text(&text, Path::new(&format!("${name}"))),
            Err(_) => Ok(()),
        }
    }

    fn read_file(&mut self, path: &Path) -> Result<(), Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
        self.read_text(&text, path)
    }

    /// The defaults, changed by the file at `path`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let mut settings = Self::default();
        settings.read_file(path)?;
        Ok(settings)
    }

    fn read_text(&mut self, text: &str, path: &Path) -> Result<(), Error> {
        let table: Table = text
            .parse()
            .map_err(|error: toml::de::Error| Error::Syntax { path: path.to_owned(), text: error.to_string() })?;
        for (name, value) in &table {
            match value {
                Value::Table(inner) => {
                    for (key, value) in inner {
                        self.apply(&format!("{name}.{key}"), value, path)?;
                    }
                }
                other => self.apply(name, other, path)?,
            }
        }
        Ok(())
    }

    fn apply(&mut self, key: &str, value: &Value, path: &Path) -> Result<(), Error> {
        match self.set(key, value) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::Unknown { path: path.to_owned(), key: key.to_owned(), nearest: nearest(key) }),
            Err(expected) => Err(Error::Value { path: path.to_owned(), key: key.to_owned(), expected }),
        }
    }
}

/// The declared key with the fewest edits to `key`.
fn nearest(key: &str) -> &'static str {
    reference().into_iter().map(|entry| entry.key).min_by_key(|known| distance(key, known)).unwrap_or_default()
}

/// Levenshtein's distance.
fn distance(left: &str, right: &str) -> usize {
    let mut row: Vec<usize> = (0..=right.chars().count()).collect();
    for (i, a) in left.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, b) in right.chars().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Accelerator, MachineType};

    fn parse(text: &str) -> Result<Settings, Error> {
        let mut settings = Settings::default();
        settings.read_text(text, Path::new("f.toml"))?;
        Ok(settings)
    }

    #[test]
    fn a_file_changes_what_it_names() {
        let text =
            "[machine]\naccelerator = \"any\"\ntype = \"microvm\"\nmemory_mib = 128\n[qemu]\narguments = [\"-a\"]\n";
        let settings = parse(text).unwrap();
        assert_eq!(settings.accelerator, Accelerator::Any);
        assert_eq!(settings.machine_type, MachineType::Microvm);
        assert_eq!((settings.machine_memory_mib, settings.machine_vcpus), (128, 1));
        assert_eq!(settings.qemu_arguments, ["-a"]);
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    #[test]
    fn errors_name_the_place_and_the_mend() {
        assert!(
            parse("[machine]\nmemory_mb = 1\n").unwrap_err().to_string().contains("did you mean machine.memory_mib?")
        );
        let error = parse("[machine]\naccelerator = \"tcg\"\n").unwrap_err().to_string();
        assert_eq!(error, "f.toml: machine.accelerator must be one of \"kvm\", \"any\", \"emulation\"");
        assert!(parse("[machine]\nmemory_mib = -1\n").is_err());
        assert!(parse("[qemu]\npath = \"qemu\"\n").unwrap_err().to_string().contains("an absolute path"));
        assert!(parse("= x").unwrap_err().to_string().contains("line 1"));
        assert!(Settings::from_file(Path::new("/nowhere.toml")).unwrap_err().to_string().contains("/nowhere.toml"));
    }

    #[test]
    fn every_default_can_be_written_and_read_back() {
        for entry in reference() {
            let (table, key) = entry.key.split_once('.').unwrap();
            assert_eq!(
                parse(&format!("[{table}]\n{key} = {}\n", entry.default)).unwrap(),
                Settings::default(),
                "{}",
                entry.key
            );
        }
    }
}

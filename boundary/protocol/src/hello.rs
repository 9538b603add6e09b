//! The guest's first words.
//!
//! When the agent serves, it dials the host and sends one line of JSON: its version. The connection then stays open and
//! silent for as long as the agent lives, so its end is the event that the agent is gone. Both sides bound what they read.

use serde_json::{Value, json};

/// The longest line that the host reads, in bytes, with its line feed.
pub const LINE_BYTES: usize = 512;

/// Why a line is no greeting.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HelloError {
    /// The line is not a JSON object with a `version`.
    #[error("the guest's greeting is malformed")]
    Malformed,
    /// The guest carries another version than this program.
    #[error(
        "the guest image is version {guest}, this shim is version {host}: run `coracle image build` to make them the same"
    )]
    Version {
        /// What the guest said, shortened to 64 printable characters.
        guest: String,
        /// What was expected.
        host: String,
    },
}

/// The line that the agent sends, with its line feed.
#[must_use]
pub fn line() -> String {
    format!("{}\n", json!({ "version": crate::VERSION }))
}

/// Checks the guest's line against the version `expected`. The line may end in a line feed.
///
/// # Errors
/// [`HelloError::Malformed`] or [`HelloError::Version`].
pub fn check(line: &[u8], expected: &str) -> Result<(), HelloError> {
    let value: Value = serde_json::from_slice(line).map_err(|_| HelloError::Malformed)?;
    let version = value.get("version").and_then(Value::as_str).ok_or(HelloError::Malformed)?;
    if version == expected {
        return Ok(());
    }
    let guest = version.chars().filter(|c| c.is_ascii_graphic()).take(64).collect();
    Err(HelloError::Version { guest, host: expected.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_line_passes() {
        assert_eq!(check(line().as_bytes(), crate::VERSION), Ok(()));
    }

    #[test]
    fn another_version_names_both() {
        let error = check(b"{\"version\":\"9.9\\u0007\"}\n", "1.0").unwrap_err();
        assert_eq!(error, HelloError::Version { guest: "9.9".into(), host: "1.0".into() });
        assert!(error.to_string().contains("coracle image build"));
    }

    #[test]
    fn rubbish_is_malformed() {
        for line in [&b""[..], b"\n", b"{}", b"[1]", b"\xff\xfe", b"{\"version\":1}"] {
            assert_eq!(check(line, "1"), Err(HelloError::Malformed));
        }
    }
}

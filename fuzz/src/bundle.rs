//! A bundle's configuration, from JSON to the message that goes to the guest, and back.

use coracle_protocol::{from_json, oci, to_json};

/// Runs one input: its text.
///
/// # Panics
/// Where what was read is another thing after a way to the wire and back.
pub fn one(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(spec) = from_json::<oci::Spec>(text) else { return };
    let json = to_json(&spec).to_string();
    let again: oci::Spec = from_json(&json).expect("what was written is read");
    assert_eq!(again, spec, "{json}");
}

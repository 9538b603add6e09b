//! Names of containers and processes: they become parts of paths on both sides, so each side checks those of the other.

/// The longest one, in bytes.
pub const BYTES_MAX: usize = 128;

/// Whether `name` is one: letters, digits, `-`, `_` and `.`, of which the first is a letter or a digit (ASCII).
#[must_use]
pub fn is_name(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= BYTES_MAX && name.chars().all(letter)
}

//! What a guest says of itself in figures, and what a shim says to who collects them.

use coracle_protocol::metrics::{Bounds, GUEST, SHIM, read};

/// Runs one input: its text.
///
/// # Panics
/// Where what was taken is not of the format, is not in its bounds, or is another thing when it is read again.
pub fn one(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    // So few figures that an input can have more.
    for bounds in [GUEST, Bounds { samples: 8, ..SHIM }] {
        let found = read(&text, &bounds);
        let said = found.families.to_string();
        let first = |line: &str| line.split_once('{').is_some_and(|(_, labels)| labels.starts_with("sandbox_id="));
        let is_reserved = bounds.reserved.contains(&"sandbox_id");
        assert!(!is_reserved || !said.lines().any(|line| !line.starts_with('#') && first(line)), "{said}");
        let figures = said.lines().filter(|line| !line.starts_with('#')).count();
        assert!(figures <= bounds.samples, "{figures} figures");
        let again = read(&said, &bounds);
        assert_eq!(again.refused, 0, "{said}");
        assert_eq!(again.families.to_string(), said);
    }
}

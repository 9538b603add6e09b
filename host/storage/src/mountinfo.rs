//! The table of mounts (proc(5), `/proc/PID/mountinfo`).

use std::path::PathBuf;

/// A mount, as far as anybody asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// The device of its file system (the third field): `MAJOR:MINOR`.
    pub device: String,
    /// What of its file system it shows (the fourth field).
    pub root: String,
    /// Where it is (the fifth).
    pub point: PathBuf,
}

/// The mounts of a table, in the order in which they were made.
#[must_use]
pub fn mounts(table: &str) -> Vec<Mounted> {
    let one = |line: &str| {
        let mut fields = line.split(' ').skip(2);
        Some(Mounted {
            device: fields.next()?.to_owned(),
            root: unescape(fields.next()?),
            point: unescape(fields.next()?).into(),
        })
    };
    table.lines().filter_map(one).collect()
}

/// Blanks and backslashes stand as three octal digits in it.
fn unescape(field: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(field.to_owned(), |text, (code, c)| text.replace(code, c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_are_read_as_such() {
        assert_eq!(unescape("/a\\040b"), "/a b");
    }
}

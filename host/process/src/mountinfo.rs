//! The table of mounts (proc(5), `/proc/PID/mountinfo`).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
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

/// The table of this thread's namespace. It is no text: a place may be called anything.
///
/// # Errors
/// The system's.
pub fn table() -> std::io::Result<Vec<u8>> {
    std::fs::read("/proc/thread-self/mountinfo")
}

/// The mounts of a table, in the order in which they were made.
#[must_use]
pub fn mounts(table: &[u8]) -> Vec<Mounted> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    let one = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ').skip(2);
        Some(Mounted {
            device: text(fields.next()?),
            root: text(&unescaped(fields.next()?)),
            point: OsString::from_vec(unescaped(fields.next()?)).into(),
        })
    };
    table.split(|byte| *byte == b'\n').filter_map(one).collect()
}

/// A path with its blanks and backslashes, which are octal numbers behind backslashes in it.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut path = Vec::new();
    let mut rest = text;
    while let Some((&first, behind)) = rest.split_first() {
        let number = behind.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match number.filter(|_| first == b'\\') {
            Some(byte) => {
                path.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                path.push(first);
                rest = behind;
            }
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_are_read_as_such() {
        assert_eq!(unescaped(b"/a\\040b"), b"/a b");
    }
}

//! The file of a machine's state.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

use super::State;
use crate::Error;

/// The file's first bytes.
const MAGIC: [u8; 16] = *b"coracle machine\n";
/// The version of what follows. A state of another one is refused: nothing is guessed.
const VERSION: u32 = 1;
/// Bytes before the state: first bytes, version, length, checksum.
const HEAD_BYTES: usize = 16 + 4 + 4 + 32;
/// The longest state that is read. A machine with 254 processors has less than a tenth of it.
const STATE_BYTES_MAX: usize = 128 << 20;

fn unusable(why: &str) -> Error {
    Error::Invalid(format!("the saved machine's state is not usable: {why}"))
}

/// Writes a state into an empty file.
pub(super) fn write(file: &File, state: &State) -> Result<(), Error> {
    let body = serde_json::to_vec(state).map_err(|error| Error::Invalid(error.to_string()))?;
    let length = u32::try_from(body.len()).ok().filter(|_| body.len() <= STATE_BYTES_MAX);
    let length = length.ok_or_else(|| Error::Invalid("the machine's state is too large to be saved".into()))?;
    let checksum = Sha256::digest(&body);
    let head = [&MAGIC[..], &VERSION.to_le_bytes(), &length.to_le_bytes(), &checksum].concat();
    let written = file.write_all_at(&head, 0).and_then(|()| file.write_all_at(&body, HEAD_BYTES as u64));
    written.map_err(Error::system("write the machine's state"))
}

/// Reads a state. The file may hold anything.
pub(super) fn read(file: &File) -> Result<State, Error> {
    let mut head = [0; HEAD_BYTES];
    read_at(file, &mut head, 0)?;
    let (length, checksum) = take_head(&head)?;
    // Before there is room for it.
    let size = file.metadata().map_err(Error::system("read the machine's state"))?.len();
    match size.cmp(&((HEAD_BYTES + length) as u64)) {
        std::cmp::Ordering::Less => return Err(unusable("it is cut off")),
        std::cmp::Ordering::Greater => return Err(unusable("something follows it")),
        std::cmp::Ordering::Equal => {}
    }
    let mut body = vec![0; length];
    read_at(file, &mut body, HEAD_BYTES as u64)?;
    if Sha256::digest(&body).as_slice() != checksum {
        return Err(unusable("it has been changed since it was written"));
    }
    take_body(&body)
}

/// The state's length and its checksum.
fn take_head(head: &[u8; HEAD_BYTES]) -> Result<(usize, &[u8]), Error> {
    let parts = head.split_first_chunk::<16>().and_then(|(magic, rest)| {
        let (version, rest) = rest.split_first_chunk::<4>()?;
        let (length, checksum) = rest.split_first_chunk::<4>()?;
        Some((magic, u32::from_le_bytes(*version), u32::from_le_bytes(*length), checksum))
    });
    let (magic, version, length, checksum) = parts.ok_or_else(|| unusable("it has no head"))?;
    if *magic != MAGIC {
        return Err(unusable("the file is something else"));
    }
    if version != VERSION {
        return Err(unusable(&format!("it has version {version}, and this monitor reads version {VERSION}")));
    }
    let length = usize::try_from(length).ok().filter(|length| *length <= STATE_BYTES_MAX);
    length.map(|length| (length, checksum)).ok_or_else(|| unusable("it says that it is longer than any"))
}

/// What the checksum is of.
pub(super) fn take_body(body: &[u8]) -> Result<State, Error> {
    serde_json::from_slice(body).map_err(|error| unusable(&error.to_string()))
}

fn read_at(file: &File, bytes: &mut [u8], at: u64) -> Result<(), Error> {
    file.read_exact_at(bytes, at).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => unusable("it is cut off"),
        _ => Error::system("read the machine's state")(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let body = br#"{"number":[1]}"#;
        let mut bytes =
            [&MAGIC[..], &VERSION.to_le_bytes(), &14_u32.to_le_bytes(), &Sha256::digest(body), body].concat();
        change(&mut bytes);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        let error = read(&file).map(drop).unwrap_err();
        assert!(error.is_invalid(), "{error}");
        error.to_string()
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        for (change, text) in [
            ((|bytes| bytes.truncate(20)) as fn(&mut Vec<u8>), "it is cut off"),
            (Vec::clear, "it is cut off"),
            (|bytes| bytes[0] = b'C', "the file is something else"),
            (|bytes| bytes[16] = 2, "it has version 2, and this monitor reads version 1"),
            (|bytes| bytes[23] = 0xff, "longer than any"),
            (|bytes| bytes[20] = 15, "it is cut off"),
            (|bytes| bytes.push(0), "something follows it"),
            (|bytes| bytes[60] ^= 1, "it has been changed since it was written"),
            (|bytes| bytes[30] ^= 1, "it has been changed since it was written"),
            (|_| {}, "invalid length 1"),
        ] {
            let found = refused(change);
            assert!(found.contains(text), "{found}, not {text}");
        }
    }
}

//! A layer's archive: verified by both of its digests, read once from its first byte to its last.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::layout::{Layer, hex_of};
use crate::{Error, Result};

/// Gives the layer's unpacked archive to `apply`, and verifies both digests to the last byte. What `apply` has made of it counts
/// only where this succeeds.
pub(crate) fn read(layer: &Layer, apply: impl FnOnce(&mut dyn Read) -> Result<()>) -> Result<()> {
    if let Some(digest) = &layer.digest {
        // Read once before anything is written: a wrong blob is refused whole.
        hex_of(digest)?;
        let file = File::open(&layer.file).map_err(Error::file(&layer.file))?;
        let mut reader = Hashing::new(file);
        std::io::copy(&mut reader, &mut std::io::sink()).map_err(Error::file(&layer.file))?;
        reader.expect("a layer", digest)?;
    }
    let file = File::open(&layer.file).map_err(Error::file(&layer.file))?;
    let mut reader = Hashing::new(decompress(file, &layer.file)?);
    apply(&mut reader)?;
    // What follows the archive's end belongs to the digest, too.
    std::io::copy(&mut reader, &mut std::io::sink()).map_err(broken)?;
    reader.expect("a layer's contents", &layer.diff_id)
}

/// What a layer is refused for that can't be read as an archive.
pub(crate) fn broken(error: std::io::Error) -> Error {
    Error::Refused(format!("a layer can't be read: {error}"))
}

fn decompress(file: File, path: &Path) -> Result<Box<dyn Read>> {
    let mut magic = [0; 4];
    let mut start = BufReader::new(file);
    let buffer = std::io::BufRead::fill_buf(&mut start).map_err(Error::file(path))?;
    for (place, byte) in magic.iter_mut().zip(buffer) {
        *place = *byte;
    }
    Ok(match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(start)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::with_buffer(start).map_err(broken)?),
        _ => Box::new(start),
    })
}

/// Reads and hashes.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new() }
    }

    fn expect(self, what: &str, expected: &str) -> Result<()> {
        let found = format!("sha256:{}", hex::encode(self.hash.finalize()));
        if found == expected {
            return Ok(());
        }
        Err(Error::Digest { what: what.to_owned(), expected: expected.to_owned(), found })
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

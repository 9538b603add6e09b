//! Trees of hashes as dm-verity reads them (Linux: Documentation/admin-guide/device-mapper/verity.rst): format 1, SHA-256, no
//! salt, blocks of 4096 bytes.

use std::fs::File;
use std::io::{Read, Result, Seek, SeekFrom, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::Verity;
use crate::erofs::BLOCK;

/// Writes superblock and tree over the `blocks` blocks of the file at `path` behind them. Of the tree the level of one block comes
/// first, that over the data last. There are two blocks at least: over one there would be no tree, and its own hash the root.
pub(crate) fn append(path: &Path, blocks: u32) -> Result<Verity> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut reader = std::io::BufReader::with_capacity(1 << 18, &file).take(u64::from(blocks) * BLOCK as u64);
    let mut level = hashes(&mut reader)?;
    let mut levels = Vec::new();
    loop {
        level.resize(level.len().next_multiple_of(BLOCK), 0);
        let above = hashes(&mut level.as_slice())?;
        let is_top = level.len() == BLOCK;
        levels.push(level);
        if is_top {
            file.seek(SeekFrom::Start(u64::from(blocks) * BLOCK as u64))?;
            file.write_all(&superblock(blocks, &above))?;
            for level in levels.iter().rev() {
                file.write_all(level)?;
            }
            file.sync_all()?;
            return Ok(Verity { blocks, root_hash: hex::encode(above) });
        }
        level = above;
    }
}

/// The superblock in a block of its own, as cryptsetup writes it; its UUID is of the root hash, so that the same data make the same
/// bytes.
fn superblock(blocks: u32, root_hash: &[u8]) -> Vec<u8> {
    let mut out = vec![0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    let block = u32::try_from(BLOCK).unwrap_or(0).to_le_bytes();
    put(0, b"verity\0\0");
    put(8, &1_u32.to_le_bytes());
    put(12, &1_u32.to_le_bytes());
    put(16, &root_hash[..16]);
    put(32, b"sha256");
    put(64, &block);
    put(68, &block);
    put(72, &u64::from(blocks).to_le_bytes());
    out
}

/// The hashes of all blocks, one behind the other.
fn hashes(reader: &mut impl Read) -> Result<Vec<u8>> {
    let (mut all, mut block) = (Vec::new(), vec![0; BLOCK]);
    loop {
        match reader.read_exact(&mut block) {
            Ok(()) => all.extend(Sha256::digest(&block)),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(all),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The root hashes are those that `veritysetup format --salt=- --no-superblock` of cryptsetup 2.6.1 has found.
    #[test]
    fn roots_are_those_of_veritysetup() {
        for (blocks, levels, root) in [(2_u32, 1, ROOT_OF_2), (128, 1, ROOT_OF_128), (129, 3, ROOT_OF_129)] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let data: Vec<u8> =
                (0..blocks).flat_map(|block| std::iter::repeat_n(u8::try_from(block % 251).unwrap(), BLOCK)).collect();
            std::fs::write(file.path(), &data).unwrap();
            let verity = append(file.path(), blocks).unwrap();
            assert_eq!((verity.blocks, verity.root_hash.as_str()), (blocks, root));
            let after = std::fs::read(file.path()).unwrap();
            assert!(after.starts_with(&data));
            assert_eq!(after.len(), data.len() + (1 + levels) * BLOCK, "{blocks}");
        }
    }

    const ROOT_OF_2: &str = "dd9c4d99ab2332f88ff3bd4cb99e3db16fea710ecbc8cef4b7e237fc5765401b";
    const ROOT_OF_128: &str = "eade1212c3a6dd9dd817bf456bf067c41cdb483af154c5d0890d32744b7e4f6b";
    const ROOT_OF_129: &str = "f0dbc433d6188c4e8e30ee2de31ee90ab1edf2fd7438d97feab12f75375886ad";
}

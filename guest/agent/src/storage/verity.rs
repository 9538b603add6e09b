//! Disks whose blocks are verified while they are read: dm-verity, as cryptsetup's `veritysetup` and mount(8) describe it.

use std::fmt::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};

use super::block::Disk;
use super::device_mapper::{self, Device};
use crate::{Error, Result};

/// Options by mount(8)'s names: the root hash in hexadecimal digits, and where on the disk superblock and tree begin, in bytes.
const ROOT_HASH: &str = "verity.roothash";
const HASH_OFFSET: &str = "verity.hashoffset";

/// The superblock's size in bytes, and what it begins with.
const SUPERBLOCK: usize = 512;
const SIGNATURE: [u8; 8] = *b"verity\0\0";
/// The size of a sector in bytes, in which device mapper counts.
const SECTOR: u64 = 512;

/// The verified disk over `disk`, where `options` ask for it.
pub(super) fn open(disk: &Disk, options: &[String]) -> Result<Option<Device>> {
    let option = |name: &str| options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    let (root_hash, offset) = match (option(ROOT_HASH), option(HASH_OFFSET)) {
        (None, None) => return Ok(None),
        (Some(root_hash), Some(offset)) => (root_hash, offset),
        // A half of it must not be taken for none.
        _ => return Err(Error::Invalid(format!("{ROOT_HASH} and {HASH_OFFSET} go together"))),
    };
    let offset: u64 = offset.parse().map_err(|_| Error::Invalid(format!("{HASH_OFFSET} is no number")))?;
    let mut superblock = [0; SUPERBLOCK];
    let step = format!("read the verity superblock of {}", disk.name);
    let file = std::fs::File::open(disk.path()).map_err(Error::system(step.clone()))?;
    file.read_exact_at(&mut superblock, offset).map_err(Error::system(step))?;
    let (sectors, table) = table(&superblock, offset, root_hash, &disk.number)?;
    // One of an earlier container, which something still has open, has another name.
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("verity-{}-{}", disk.name, COUNT.fetch_add(1, Ordering::Relaxed));
    device_mapper::create(&name, sectors, "verity", &table).map(Some)
}

/// Device mapper's table (Linux: Documentation/admin-guide/device-mapper/verity.rst), and the verified part in sectors. Nothing of
/// the superblock is to be trusted: what it says wrongly fails by the root hash.
fn table(superblock: &[u8; SUPERBLOCK], offset: u64, root_hash: &str, number: &str) -> Result<(u64, String)> {
    let invalid = |what: &str| Error::Invalid(format!("the disk can't be verified: {what}"));
    let bytes = |at: usize, count: usize| superblock.get(at..at + count).unwrap_or_default();
    let u32_at = |at: usize| bytes(at, 4).iter().rev().fold(0_u32, |all, byte| all << 8 | u32::from(*byte));
    if bytes(0, 8) != SIGNATURE || u32_at(8) != 1 || u32_at(12) != 1 {
        return Err(invalid("there is no superblock of format 1 at that place"));
    }
    let algorithm: Vec<u8> = bytes(32, 32).iter().copied().take_while(|byte| *byte != 0).collect();
    if algorithm != b"sha256" {
        return Err(invalid("its hashes are not SHA-256"));
    }
    let (data_size, hash_size) = (u64::from(u32_at(64)), u64::from(u32_at(68)));
    let blocks = bytes(72, 8).iter().rev().fold(0_u64, |all, byte| all << 8 | u64::from(*byte));
    let salt_size = usize::from(superblock[80]) | usize::from(superblock[81]) << 8;
    if data_size != 4096 || hash_size != 4096 {
        return Err(invalid("its blocks are not of 4096 bytes"));
    }
    if blocks == 0 || !offset.is_multiple_of(hash_size) || blocks.checked_mul(data_size).is_none_or(|end| end > offset)
    {
        return Err(invalid("its hashes are not behind its data"));
    }
    if root_hash.len() != 64 || !root_hash.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(invalid("the root hash is none of SHA-256"));
    }
    if salt_size > 256 {
        return Err(invalid("its salt is too long"));
    }
    let salt = bytes(88, salt_size).iter().fold(String::new(), |mut all, byte| {
        let _ = write!(all, "{byte:02x}");
        all
    });
    let salt = if salt.is_empty() { "-" } else { &salt };
    let tree = offset / hash_size + 1;
    let table = format!("1 {number} {number} {data_size} {hash_size} {blocks} {tree} sha256 {root_hash} {salt}");
    Ok((blocks * (data_size / SECTOR), table))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "dd9c4d99ab2332f88ff3bd4cb99e3db16fea710ecbc8cef4b7e237fc5765401b";

    fn superblock(change: impl FnOnce(&mut [u8; SUPERBLOCK])) -> [u8; SUPERBLOCK] {
        let mut block = [0; SUPERBLOCK];
        block[..8].copy_from_slice(&SIGNATURE);
        block[8] = 1;
        block[12] = 1;
        block[32..38].copy_from_slice(b"sha256");
        block[64..72].copy_from_slice(&[0, 16, 0, 0, 0, 16, 0, 0]);
        block[72] = 2;
        change(&mut block);
        block
    }

    #[test]
    fn the_table_is_what_the_kernel_reads() {
        let plain = table(&superblock(|_| {}), 8192, ROOT, "254:0").unwrap();
        assert_eq!(plain, (16, format!("1 254:0 254:0 4096 4096 2 3 sha256 {ROOT} -")));
        let salted = superblock(|block| {
            block[80] = 2;
            block[88..90].copy_from_slice(&[0xab, 1]);
        });
        assert!(table(&salted, 8192, ROOT, "254:0").unwrap().1.ends_with(" ab01"));
    }

    #[test]
    fn what_the_host_makes_up_is_refused() {
        let refused = |block: [u8; SUPERBLOCK], offset: u64, root: &str| {
            let error = table(&block, offset, root, "254:0").unwrap_err().to_string();
            assert!(error.contains("can't be verified"), "{error}");
        };
        refused([0; SUPERBLOCK], 8192, ROOT);
        refused(superblock(|block| block[8] = 2), 8192, ROOT);
        refused(superblock(|block| block[32] = b'x'), 8192, ROOT);
        refused(superblock(|block| block[65] = 32), 8192, ROOT);
        refused(superblock(|block| block[72] = 0), 8192, ROOT);
        refused(superblock(|block| block[79] = 0xff), 8192, ROOT);
        refused(superblock(|block| block[81] = 2), 8192, ROOT);
        refused(superblock(|_| {}), 8000, ROOT);
        refused(superblock(|_| {}), 4096, ROOT);
        refused(superblock(|_| {}), 8192, "dd 4096");
        let disk = Disk { name: "none".into(), number: "0:0".into() };
        assert!(open(&disk, &["verity.roothash=00".into()]).is_err(), "half of it is not none of it");
        assert!(open(&disk, &[]).unwrap().is_none());
    }
}

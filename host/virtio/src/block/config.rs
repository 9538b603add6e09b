//! The configuration space (virtio 1.3, section 5.2.4).

use super::disk::Disk;
use super::{
    DISCARD_RANGES_MAX, DISCARD_SECTORS_MAX, PIECE_BYTES_MAX, PIECES_MAX, SECTOR_BYTES, ZERO_RANGES_MAX,
    ZERO_SECTORS_MAX,
};

/// Up to and with `write_zeroes_may_unmap` and what pads it.
const BYTES: usize = 60;

/// The space of a device over `disk`, with so many queues.
pub(super) fn space(disk: &Disk, queues: u16) -> [u8; BYTES] {
    let mut space = [0; BYTES];
    let mut put = |offset: usize, bytes: &[u8]| {
        if let Some(place) = space.get_mut(offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    let block = disk.block_bytes();
    // How many blocks the host's disk really reads and writes at once. Both are powers of two.
    let physical = (disk.physical_bytes() / block).max(1);
    put(0, &disk.sectors().to_le_bytes());
    put(8, &PIECE_BYTES_MAX.to_le_bytes());
    put(12, &PIECES_MAX.to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[physical.ilog2().to_le_bytes()[0], 0]);
    put(26, &u16::try_from(physical).unwrap_or(u16::MAX).to_le_bytes());
    put(34, &queues.to_le_bytes());
    put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
    put(40, &DISCARD_RANGES_MAX.to_le_bytes());
    put(44, &u32::try_from(u64::from(disk.physical_bytes().max(block)) / SECTOR_BYTES).unwrap_or(1).to_le_bytes());
    put(48, &ZERO_SECTORS_MAX.to_le_bytes());
    put(52, &ZERO_RANGES_MAX.to_le_bytes());
    put(56, &[u8::from(disk.discards())]);
    space
}

//! The block device (virtio 1.3, section 5.2) over a raw file or a block device of the host.
//!
//! Requests are served in order, each to its end: the device waits for its file. Whoever runs it gives it a thread of its own.

mod config;
mod disk;
#[cfg(test)]
mod host_tests;
mod request;
#[cfg(test)]
mod tests;
mod virtio;

pub use virtio::{Block, BlockConfig, QUEUES_MAX};

/// Bytes of a sector, in which the device counts whatever its blocks are (section 5.2.4).
const SECTOR_BYTES: u64 = 512;
/// The most pieces of data in a request: what a queue of 256 entries has room for, beside the header and the status.
const PIECES_MAX: u32 = 254;
/// The most bytes of such a piece.
const PIECE_BYTES_MAX: u32 = 256 << 10;
/// The most bytes of data in a request.
const DATA_BYTES_MAX: usize = PIECES_MAX as usize * PIECE_BYTES_MAX as usize;
/// The most ranges that one request discards, and the sectors of each: the kernel takes holes off its lists.
const DISCARD_RANGES_MAX: u32 = 16;
const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// The most ranges that one request fills with zeros, and the sectors of each: they may have to be written.
const ZERO_RANGES_MAX: u32 = 1;
const ZERO_SECTORS_MAX: u32 = 1 << 17;

//! One request: what the guest wants, whether it may, and what came of it (virtio 1.3, section 5.2.6).

use std::io;

use super::disk::Disk;
use super::{DATA_BYTES_MAX, DISCARD_RANGES_MAX, DISCARD_SECTORS_MAX, SECTOR_BYTES, ZERO_RANGES_MAX, ZERO_SECTORS_MAX};
use crate::chain::{Buffers, Slices};

/// Bytes of the header before the data.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of the identifier.
pub(super) const ID_BYTES: usize = 20;
/// Bytes of a range to discard or to fill with zeros.
const RANGE_BYTES: usize = 16;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// The only flag of a range: its sectors may be given back.
const UNMAP: u32 = 1;

/// What the status byte says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    /// The device's or the driver's fault.
    Error = 1,
    Unsupported = 2,
}

/// What holds for all requests.
#[derive(Debug)]
pub(super) struct Rules {
    pub(super) read_only: bool,
    pub(super) id: [u8; ID_BYTES],
    /// The driver knows nothing of flushes, so that each write is safe when it is done.
    pub(super) durable: bool,
}

/// Why a request came to nothing.
#[derive(Debug)]
pub(super) enum Refused {
    /// It makes no sense, or may not be. Nothing was touched.
    Invalid,
    /// The device does no such thing.
    Unsupported,
    /// The host's disk did not do it.
    Failed(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

impl Refused {
    pub(super) fn status(&self) -> Status {
        match self {
            Self::Unsupported => Status::Unsupported,
            Self::Failed(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Self::Invalid | Self::Failed(_) => Status::Error,
        }
    }
}

/// Serves a request, whose status byte has been taken off already. The bytes that are moved are off the front of `buffers`
/// afterwards. Returns how many bytes may have been written beside them.
///
/// # Errors
/// [`Refused`].
pub(super) fn serve(disk: &mut Disk, rules: &Rules, buffers: &mut Buffers<'_>) -> Result<u64, Refused> {
    let mut header = [0; HEADER_BYTES];
    if !buffers.readable.take(&mut header) {
        return Err(Refused::Invalid);
    }
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(sector));
    let (from, into) = (&mut buffers.readable, &mut buffers.writable);
    let mut written = 0;
    match kind {
        IN => {
            let offset = data(disk, sector, into, from)?;
            disk.read(into, offset)?;
        }
        OUT => {
            let offset = data(disk, sector, from, into)?;
            writable(rules)?;
            disk.write(from, offset)?;
            commit(disk, rules)?;
        }
        FLUSH => disk.flush()?,
        GET_ID if into.len() >= ID_BYTES => {
            into.put(&rules.id);
        }
        GET_ID => return Err(Refused::Invalid),
        DISCARD => {
            let ranges = ranges(disk, from, DISCARD_RANGES_MAX, DISCARD_SECTORS_MAX)?;
            writable(rules)?;
            // A discard leaves nothing to allow.
            if !disk.discards() || ranges.iter().any(|range| range.flags != 0) {
                return Err(Refused::Unsupported);
            }
            for range in ranges {
                disk.discard(range.offset, range.bytes)?;
            }
        }
        WRITE_ZEROES => {
            let ranges = ranges(disk, from, ZERO_RANGES_MAX, ZERO_SECTORS_MAX)?;
            writable(rules)?;
            if ranges.iter().any(|range| range.flags & !UNMAP != 0) {
                return Err(Refused::Unsupported);
            }
            for range in ranges {
                disk.zero(range.offset, range.bytes, range.flags & UNMAP != 0)?;
                written += range.bytes;
            }
            commit(disk, rules)?;
        }
        _ => return Err(Refused::Unsupported),
    }
    Ok(written)
}

/// Whether it may be written.
fn writable(rules: &Rules) -> Result<(), Refused> {
    if rules.read_only { Err(Refused::Invalid) } else { Ok(()) }
}

fn commit(disk: &Disk, rules: &Rules) -> Result<(), Refused> {
    if rules.durable {
        disk.flush()?;
    }
    Ok(())
}

/// Where on the disk the data of a read or a write is. `other` is the direction that such a request has no data in.
fn data(disk: &Disk, sector: u64, data: &Slices<'_>, other: &Slices<'_>) -> Result<u64, Refused> {
    let bytes = data.len() as u64;
    let sound = other.is_empty()
        && !data.is_empty()
        && data.len() <= DATA_BYTES_MAX
        && bytes.is_multiple_of(SECTOR_BYTES)
        && inside(disk, sector, bytes / SECTOR_BYTES);
    if sound { Ok(sector * SECTOR_BYTES) } else { Err(Refused::Invalid) }
}

/// Whether these sectors are of the disk, so that their bytes can be counted in 64 bits too.
fn inside(disk: &Disk, sector: u64, sectors: u64) -> bool {
    sector.checked_add(sectors).is_some_and(|end| end <= disk.sectors())
}

struct Range {
    offset: u64,
    bytes: u64,
    flags: u32,
}

/// The ranges that a request names, all of them within the disk.
fn ranges(disk: &Disk, from: &mut Slices<'_>, ranges_max: u32, sectors_max: u32) -> Result<Vec<Range>, Refused> {
    let bytes_max = ranges_max as usize * RANGE_BYTES;
    if from.is_empty() || from.len() > bytes_max || !from.len().is_multiple_of(RANGE_BYTES) {
        return Err(Refused::Invalid);
    }
    let mut ranges = Vec::new();
    let mut bytes = [0; RANGE_BYTES];
    while from.take(&mut bytes) && ranges.len() < ranges_max as usize {
        let value = u128::from_le_bytes(bytes);
        let half = |shift: u32| (value >> shift & 0xffff_ffff) as u32;
        let (sector, sectors, flags) = (u64::from(half(32)) << 32 | u64::from(half(0)), half(64), half(96));
        if sectors == 0 || sectors > sectors_max || !inside(disk, sector, u64::from(sectors)) {
            return Err(Refused::Invalid);
        }
        ranges.push(Range { offset: sector * SECTOR_BYTES, bytes: u64::from(sectors) * SECTOR_BYTES, flags });
    }
    Ok(ranges)
}

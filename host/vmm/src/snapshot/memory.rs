//! The file of a machine's memory: each part of the guest's memory behind the other, and then the number that is in the state, too.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Number;
use crate::Error;

/// What is written or left out, in bytes.
const PAGE_BYTES: usize = 4096;
/// What is looked at in one go.
const PIECE_BYTES: usize = 256 * PAGE_BYTES;

/// Writes the memory into an empty file: of `parts`, which the guest has (address and bytes), what is not zero. Nobody may write to the
/// memory meanwhile.
pub(super) fn write(file: &File, memory: &GuestMemoryMmap, parts: &[(u64, u64)], number: &Number) -> Result<(), Error> {
    let failed = Error::system("write the machine's memory");
    let mut buffer = vec![0; PIECE_BYTES];
    // Where each region is in the file.
    let mut offset = 0;
    for region in memory.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        for (part, bytes) in parts.iter().filter(|(part, _)| (start..end).contains(part)) {
            let part_end = (part + bytes).min(end);
            let mut at = *part;
            while at < part_end {
                let length = usize::try_from(part_end - at).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
                let piece = buffer.get_mut(..length).unwrap_or_default();
                memory.read_slice(piece, GuestAddress(at)).map_err(|error| Error::Invalid(error.to_string()))?;
                write_pages(file, piece, offset + (at - start)).map_err(&failed)?;
                at += length as u64;
            }
        }
        offset += region.len();
    }
    file.write_all_at(number, offset).map_err(&failed)
}

/// Writes runs of pages that are not zero.
fn write_pages(file: &File, piece: &[u8], at: u64) -> io::Result<()> {
    let pages = piece.len().div_ceil(PAGE_BYTES);
    let is_zero = |page: usize| {
        let page = piece.get(page * PAGE_BYTES..).unwrap_or_default();
        page.iter().take(PAGE_BYTES).all(|byte| *byte == 0)
    };
    let mut first = 0;
    while first < pages {
        if is_zero(first) {
            first += 1;
            continue;
        }
        let end = (first + 1..pages).find(|page| is_zero(*page)).unwrap_or(pages);
        let (from, to) = (first * PAGE_BYTES, (end * PAGE_BYTES).min(piece.len()));
        file.write_all_at(piece.get(from..to).unwrap_or_default(), at + from as u64)?;
        first = end;
    }
    Ok(())
}

/// Whether a file is that of a memory with so many bytes, with this number.
pub(super) fn check(file: &File, bytes: u64, number: &Number) -> Result<(), Error> {
    let unusable = |why: &str| Error::Invalid(format!("the saved machine's memory is not usable: {why}"));
    let size = file.metadata().map_err(Error::system("read the machine's memory"))?.len();
    if size != bytes + number.len() as u64 {
        return Err(unusable(&format!("its file has {size} bytes, and {bytes} are the machine's")));
    }
    let mut found = Number::default();
    file.read_exact_at(&mut found, bytes).map_err(Error::system("read the machine's memory"))?;
    if found == *number { Ok(()) } else { Err(unusable("it is not the one that belongs to the state")) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn memory_is_written_without_its_zeros_and_known_again() {
        let page = PAGE_BYTES as u64;
        let regions = [(GuestAddress(0), 16 << 20), (GuestAddress(1 << 32), 16 << 20)];
        let memory = GuestMemoryMmap::<()>::from_ranges(&regions).unwrap();
        let high = 1 << 32;
        let places = [0, 5 * page, 6 * page + 4095, (16 << 20) - 1, high + 9 * page, high + (4 << 20)];
        for (index, place) in (1_u8..).zip(places) {
            memory.write_obj(index, GuestAddress(place)).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        // The guest has no more than a part of what it can gain.
        let parts = [(0, 16 << 20), (high, 2 << 20)];
        write(&file, &memory, &parts, &[9; 16]).unwrap();
        let byte = |at: u64| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            byte[0]
        };
        let found: Vec<u8> =
            places.iter().map(|place| byte(if *place < high { *place } else { place - high + (16 << 20) })).collect();
        assert_eq!(found, [1, 2, 3, 4, 5, 0], "the last one is not the guest's");
        assert!(file.metadata().unwrap().blocks() * 512 <= 16 * page, "holes");
        check(&file, 32 << 20, &[9; 16]).unwrap();
        for (bytes, number) in [(16 << 20, [9; 16]), (32 << 20, [8; 16]), (33 << 20, [9; 16])] {
            assert!(check(&file, bytes, &number).unwrap_err().is_invalid(), "{bytes} {number:?}");
        }
        file.set_len(20 << 20).unwrap();
        assert!(check(&file, 32 << 20, &[9; 16]).unwrap_err().to_string().contains("20971520 bytes"));
    }
}

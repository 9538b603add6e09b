//! What the guest needs no more goes back to the host.

use std::io;

use rustix::mm::Advice;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// The host's pages, in bytes.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Gives the host's pages behind a part of the guest's memory back, whole ones only. It reads as zeros after that; in a machine that goes on where
/// another was saved, as what was saved: the guest's own words of then.
///
/// Memory of a file (a memfd) loses the file's pages, so that every process that maps it does; memory of this process alone loses its own.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] where the part is not the guest's memory, all of it; else the kernel's.
pub(crate) fn discard(memory: &GuestMemoryMmap, start: u64, bytes: u64) -> io::Result<()> {
    let end = start.checked_add(bytes).ok_or(io::ErrorKind::InvalidInput)?;
    let mut at = start.next_multiple_of(PAGE_BYTES);
    let end = end & !(PAGE_BYTES - 1);
    while at < end {
        let region = memory.find_region(GuestAddress(at)).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = at - region.start_addr().0;
        let length = (end - at).min(region.len() - offset);
        let size = usize::try_from(length).map_err(io::Error::other)?;
        let place = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
        let advice = if region.file_offset().is_some() { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        // SAFETY: `size` bytes from `place` are in one mapping of the guest's memory, which lives as long as `memory`. This process looks at
        // that memory by volatile accesses only and expects nothing of what it finds: zeros are as good as what the guest wrote.
        #[expect(unsafe_code, reason = "the advice changes memory that is not borrowed")]
        unsafe { rustix::mm::madvise(place.cast(), size, advice) }?;
        at += length;
    }
    Ok(())
}

/// The guest's address of a place in its memory; none where it is no place there.
pub(crate) fn address_of(memory: &GuestMemoryMmap, place: *const u8) -> Option<u64> {
    memory.iter().find_map(|region| {
        let offset = place.addr().checked_sub(region.as_ptr().addr())? as u64;
        (offset < region.len()).then(|| region.start_addr().0 + offset)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vm_memory::{Bytes, FileOffset};

    use super::*;

    #[test]
    fn whole_pages_go_and_nothing_beside_them() {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(1 << 20).unwrap();
        let regions = [
            (GuestAddress(0), 1 << 20, None),
            (GuestAddress(1 << 20), 1 << 20, Some(FileOffset::new(file.try_clone().unwrap(), 0))),
        ];
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(&regions).unwrap();
        for base in [0, 1 << 20] {
            memory.write_slice(&[7; 4 << 12], GuestAddress(base)).unwrap();
            discard(&memory, base + 100, (3 << 12) - 50).unwrap();
            let mut found = vec![0; 4 << 12];
            memory.read_slice(&mut found, GuestAddress(base)).unwrap();
            let pages: Vec<bool> = found.chunks(4096).map(|page| page.iter().all(|byte| *byte == 7)).collect();
            assert_eq!(pages, [true, false, false, true], "at {base:#x}");
        }
        // Of the file, too.
        use std::os::unix::fs::MetadataExt;
        assert_ne!(file.metadata().unwrap().blocks(), 0);
        // Over the border between both, and beyond the end.
        discard(&memory, 0, 2 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 0);
        assert!(discard(&memory, 1 << 20, 2 << 20).is_err());
        assert!(discard(&memory, u64::MAX - 10, 100).is_err());
        discard(&memory, 5 << 20, 100).unwrap();
    }
}

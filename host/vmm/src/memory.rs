//! The guest's memory: one memfd, mapped in one piece for each range of guest addresses.
//!
//! It is reserved lazily: a page of the host's is taken when it is first touched. The mapping is shared also where no other
//! process may have the file: a private mapping of a memfd would take a page of the file and a copy of it for each page
//! that is read before it is written.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::MemfdFlags;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::Error;

/// The guest's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    /// The mapping.
    pub(crate) map: GuestMemoryMmap,
    file: File,
    /// Its size in bytes.
    pub(crate) bytes: u64,
}

impl Memory {
    /// Makes memory at `ranges`, each with its first address and its bytes.
    pub(crate) fn new(ranges: &[(u64, u64)], huge_pages: bool) -> Result<Self, Error> {
        let bytes = ranges.iter().map(|(_, bytes)| bytes).sum();
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if huge_pages {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let step = if huge_pages { "make the guest's memory of huge pages" } else { "make the guest's memory" };
        let file = rustix::fs::memfd_create("coracle-guest", flags).map_err(Error::system(step))?;
        rustix::fs::ftruncate(&file, bytes).map_err(Error::system(step))?;
        // Whoever is given the file can't make it shorter under the guest's feet.
        let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW | rustix::fs::SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(Error::system("seal the guest's memory"))?;
        let file = File::from(file);
        let mut offset = 0;
        let mut regions = Vec::with_capacity(ranges.len());
        for (start, length) in ranges {
            let size = usize::try_from(*length).map_err(|_| Error::Invalid("too much memory".into()))?;
            let part = FileOffset::new(file.try_clone().map_err(Error::system(step))?, offset);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let region = MmapRegion::build(Some(part), size, protection, libc::MAP_NORESERVE | libc::MAP_SHARED)
                .map_err(|error| Error::system(step)(io::Error::other(error)))?;
            let region = GuestRegionMmap::new(region, GuestAddress(*start))
                .ok_or_else(|| Error::Invalid("memory beyond the end of the address space".into()))?;
            regions.push(region);
            offset += length;
        }
        let map = GuestMemoryMmap::from_regions(regions).map_err(|error| Error::Invalid(error.to_string()))?;
        Ok(Self { map, file, bytes })
    }

    /// What the host has given of it so far, in bytes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.file.metadata().map(|data| data.blocks() * 512).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn pages_are_taken_when_they_are_touched() {
        let memory = Memory::new(&[(0, 64 << 20), (1 << 32, 64 << 20)], false).unwrap();
        assert_eq!((memory.bytes, memory.resident_bytes()), (128 << 20, 0));
        memory.map.write_obj(7_u64, GuestAddress(1 << 32)).unwrap();
        assert_eq!(memory.map.read_obj::<u64>(GuestAddress(1 << 32)).unwrap(), 7);
        assert!((4096..=4 << 20).contains(&memory.resident_bytes()), "{}", memory.resident_bytes());
        assert!(memory.map.read_obj::<u64>(GuestAddress(64 << 20)).is_err());
    }
}

//! The guest's memory, mapped in one piece for each range of guest addresses.
//!
//! It is reserved lazily: the host gives a page when it is first touched. Memory that another process has to map, as the server of
//! a shared file system does, and memory of the host's huge pages is a memfd. What nobody else maps is the monitor's own: the host
//! gives it 2 MiB at a time where it can (transparent huge pages), which is one fault of the second stage instead of 512. A private
//! mapping of a memfd would be neither: it takes a page of the file and a copy of it for each page that is read before it is written.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::Error;

/// What the host gives at a time where it can, in bytes.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// The guest's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    /// The mapping, with what the guest gains later.
    pub(crate) map: GuestMemoryMmap,
    /// What the guest has from its start.
    pub(crate) ram: GuestMemoryMmap,
    backing: Backing,
    /// The size in bytes from the start.
    pub(crate) bytes: u64,
}

/// What stands behind it.
#[derive(Debug)]
enum Backing {
    /// Nothing: it is this process's.
    Own,
    /// A memfd.
    File(File),
    /// A saved machine's memory.
    Saved,
}

/// What memory is made of.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Kind<'a> {
    /// Whether another process has to map it.
    pub(crate) shared: bool,
    /// Whether it is made of the host's huge pages.
    pub(crate) huge_pages: bool,
    /// Nodes of the host (NUMA) that it comes from; none is any.
    pub(crate) nodes: &'a [u32],
}

impl Memory {
    /// Makes memory at the ranges of `ram`, and at that of what is gained later, each with its first address and its bytes.
    pub(crate) fn new(ram: &[(u64, u64)], growth: Option<(u64, u64)>, kind: Kind<'_>) -> Result<Self, Error> {
        let Kind { shared, huge_pages, nodes } = kind;
        let ranges = || ram.iter().copied().chain(growth);
        let bytes = ranges().map(|(_, bytes)| bytes).sum();
        let step = if huge_pages { "make the guest's memory of huge pages" } else { "make the guest's memory" };
        let file = if shared || huge_pages { Some(memory_file(bytes, huge_pages, step)?) } else { None };
        let mut offset = 0;
        let mut regions = Vec::with_capacity(ram.len() + 1);
        for (start, length) in ranges() {
            let size = usize::try_from(length).map_err(|_| Error::Invalid("too much memory".into()))?;
            let region = match &file {
                Some(file) => {
                    let part = FileOffset::new(file.try_clone().map_err(Error::system(step))?, offset);
                    let protection = libc::PROT_READ | libc::PROT_WRITE;
                    MmapRegion::build(Some(part), size, protection, libc::MAP_NORESERVE | libc::MAP_SHARED)
                        .map_err(|error| Error::system(step)(io::Error::other(error)))?
                }
                None => own_region(size).map_err(Error::system(step))?,
            };
            if !nodes.is_empty() {
                bind(&region, nodes)?;
            }
            if !huge_pages {
                ask_for_large_pages(&region);
            }
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| Error::Invalid("memory beyond the end of the address space".into()))?;
            regions.push(Arc::new(region));
            offset += length;
        }
        Self::of(regions, ram, file.map_or(Backing::Own, Backing::File))
    }

    /// The memory of a machine that was saved, as it is in `file`, each part behind the other. Nothing of it is read before the guest touches it,
    /// and what the guest writes stays this machine's: the file is left as it is, and serves any number of machines at once. It must not
    /// become shorter meanwhile.
    /// The copies come from these nodes of the host; none is any.
    pub(crate) fn saved(
        ram: &[(u64, u64)],
        growth: Option<(u64, u64)>,
        file: &File,
        nodes: &[u32],
    ) -> Result<Self, Error> {
        let mut offset = 0;
        let mut regions = Vec::with_capacity(ram.len() + 1);
        for (start, length) in ram.iter().copied().chain(growth) {
            let size = usize::try_from(length).map_err(|_| Error::Invalid("too much memory".into()))?;
            let region = private_region(file, offset, size).map_err(Error::system("map a saved machine's memory"))?;
            if !nodes.is_empty() {
                bind(&region, nodes)?;
            }
            let region = GuestRegionMmap::new(region, GuestAddress(start))
                .ok_or_else(|| Error::Invalid("memory beyond the end of the address space".into()))?;
            regions.push(Arc::new(region));
            offset += length;
        }
        Self::of(regions, ram, Backing::Saved)
    }

    fn of(regions: Vec<Arc<GuestRegionMmap>>, ram: &[(u64, u64)], backing: Backing) -> Result<Self, Error> {
        let of =
            |regions| GuestMemoryMmap::from_arc_regions(regions).map_err(|error| Error::Invalid(error.to_string()));
        let from_start = regions.iter().take(ram.len()).cloned().collect();
        let bytes = ram.iter().map(|(_, bytes)| bytes).sum();
        Ok(Self { map: of(regions)?, ram: of(from_start)?, backing, bytes })
    }

    /// What the host has given of it so far, in bytes. Of a saved machine's nobody can tell from in here: what is not this one's own is
    /// all of theirs who started from it.
    pub(crate) fn resident_bytes(&self) -> Option<u64> {
        match &self.backing {
            Backing::File(file) => Some(file.metadata().map(|data| data.blocks() * 512).unwrap_or(0)),
            Backing::Own => Some(self.map.iter().map(resident_bytes_of).sum()),
            Backing::Saved => None,
        }
    }
}

/// Gives a part of the machine's memory to its guest, under a number of KVM's that nothing else has, with KVM's flags.
///
/// # Errors
/// KVM's.
pub(crate) fn give(vm: &VmFd, region: &GuestRegionMmap, slot: u32, flags: u32) -> Result<(), Error> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
    };
    // SAFETY: the region is a mapping of ours of that size, which lives until this process ends: the machine and its devices hold it, and are
    // dropped by the process's end only. Regions do not overlap: they are of one `GuestMemoryMmap`, which holds that.
    #[expect(unsafe_code, reason = "KVM reaches this process's memory from now on")]
    unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("give the guest its memory"))
}

/// A memfd of `bytes` that nobody makes shorter or longer.
fn memory_file(bytes: u64, huge_pages: bool, step: &'static str) -> Result<File, Error> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge_pages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = rustix::fs::memfd_create("coracle-guest", flags).map_err(Error::system(step))?;
    rustix::fs::ftruncate(&file, bytes).map_err(Error::system(step))?;
    // Whoever is given the file can't make it shorter under the guest's feet.
    let seals = rustix::fs::SealFlags::SHRINK | rustix::fs::SealFlags::GROW | rustix::fs::SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(Error::system("seal the guest's memory"))?;
    Ok(File::from(file))
}

/// Memory that no other process maps. It starts at a multiple of 2 MiB, as the guest's addresses do, so that one large page of the
/// host's is one of the guest's. It is there until the monitor's process ends, which is the machine's end.
fn own_region(size: usize) -> io::Result<MmapRegion> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    let room = size.checked_add(LARGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: a new mapping at a place that the kernel chooses; nothing is there that it could replace.
    #[expect(unsafe_code, reason = "mappings are unsafe by declaration")]
    let start =
        unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::READ | ProtFlags::WRITE, flags)? };
    let start = start.cast::<u8>().map_addr(|address| address.next_multiple_of(LARGE_PAGE_BYTES));
    // SAFETY: `size` bytes from `start` are in the mapping above, which is readable and writable and never unmapped.
    #[expect(unsafe_code, reason = "vm-memory takes a mapping made elsewhere by its pointer")]
    let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(start) };
    let builder = builder
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    builder.build().map_err(io::Error::other)
}

/// A part of a file, of which this process has its own copy where it writes. It is there until the monitor's process ends.
fn private_region(file: &File, offset: u64, size: usize) -> io::Result<MmapRegion> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at a place that the kernel chooses; nothing is there that it could replace.
    #[expect(unsafe_code, reason = "mappings are unsafe by declaration")]
    let start = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, flags, file, offset)?
    };
    // SAFETY: the mapping above has `size` bytes, is readable and writable and never unmapped.
    #[expect(unsafe_code, reason = "vm-memory takes a mapping made elsewhere by its pointer")]
    let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(start.cast()) };
    // Without the file, for whoever asks the region: what is given back of it is this process's copies, and nothing of the file's.
    let builder = builder
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    builder.build().map_err(io::Error::other)
}

/// Has the host give pages of these nodes only (mbind(2)).
fn bind(region: &MmapRegion, nodes: &[u32]) -> Result<(), Error> {
    /// `MPOL_BIND`, and the nodes that a mask of ours has room for.
    const BIND: libc::c_long = 2;
    const NODES: usize = 1024;
    let wrong = || {
        Error::Invalid(format!(
            "the host has no such nodes for the guest's memory, or this process may not have theirs (`machine.host_nodes`): {nodes:?}"
        ))
    };
    let mut mask = [0_u64; NODES / 64 + 1];
    for node in nodes {
        let index = usize::try_from(*node).ok().filter(|node| *node < NODES).ok_or_else(wrong)?;
        let word = mask.get_mut(index / 64).ok_or_else(wrong)?;
        *word |= 1 << (node % 64);
    }
    // SAFETY: the region is mapped, and the policy changes no contents; the mask has more bits than are said (the kernel takes one off).
    #[expect(unsafe_code, reason = "there is no safe wrapper of mbind")]
    let bound = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            region.as_ptr(),
            region.size(),
            BIND,
            mask.as_ptr(),
            (NODES + 1) as libc::c_ulong,
            0,
        )
    };
    match io::Error::last_os_error() {
        _ if bound == 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::EINVAL) => Err(wrong()),
        error => Err(Error::system("bind the guest's memory to nodes of the host (`machine.host_nodes`)")(error)),
    }
}

/// A wish: where the host has no large pages to give, the memory works all the same.
fn ask_for_large_pages(region: &MmapRegion) {
    // SAFETY: the region is mapped, and nobody uses it yet; the advice changes no contents.
    #[expect(unsafe_code, reason = "the advice is unsafe by declaration")]
    let asked = unsafe { rustix::mm::madvise(region.as_ptr().cast(), region.size(), Advice::LinuxHugepage) };
    if let Err(error) = asked {
        log::debug!("no large pages for the guest's memory: {error}");
    }
}

/// What is there of a region that no file stands behind (mincore(2)).
fn resident_bytes_of(region: &GuestRegionMmap) -> u64 {
    /// How many pages are asked for at a time.
    const PAGES: usize = 64 * 1024;
    const PAGE_BYTES: usize = 4096;
    let mut present = vec![0_u8; PAGES];
    let (start, size) = (region.as_ptr(), region.size());
    let mut resident = 0;
    for offset in (0..size).step_by(PAGES * PAGE_BYTES) {
        let length = (size - offset).min(PAGES * PAGE_BYTES);
        // SAFETY: the region is mapped; the vector has a byte for each page of `length`.
        #[expect(unsafe_code, reason = "there is no safe wrapper of mincore")]
        let answer = unsafe { libc::mincore(start.add(offset).cast(), length, present.as_mut_ptr()) };
        if answer == 0 {
            let pages = present.iter().take(length.div_ceil(PAGE_BYTES));
            resident += pages.filter(|page| **page & 1 == 1).count() as u64 * PAGE_BYTES as u64;
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn pages_are_taken_when_they_are_touched() {
        for shared in [true, false] {
            let memory =
                Memory::new(&[(0, 64 << 20)], Some((1 << 32, 64 << 20)), Kind { shared, ..Kind::default() }).unwrap();
            assert_eq!((memory.bytes, memory.resident_bytes()), (64 << 20, Some(0)));
            memory.map.write_obj(7_u64, GuestAddress(1 << 32)).unwrap();
            assert_eq!(memory.map.read_obj::<u64>(GuestAddress(1 << 32)).unwrap(), 7);
            let resident = memory.resident_bytes().unwrap();
            assert!((4096..=4 << 20).contains(&resident), "{resident}");
            assert!(memory.map.read_obj::<u64>(GuestAddress(64 << 20)).is_err());
            assert!(memory.ram.read_obj::<u64>(GuestAddress(1 << 32)).is_err(), "it is gained later");
        }
    }

    #[test]
    fn saved_memory_is_written_in_a_copy() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 8], 1 << 20).unwrap();
        let saved = || Memory::saved(&[(0, 1 << 20)], Some((1 << 32, 1 << 20)), &file, &[]).unwrap();
        let (one, other) = (saved(), saved());
        assert_eq!(one.map.read_obj::<[u8; 8]>(GuestAddress(1 << 32)).unwrap(), [7; 8]);
        one.map.write_obj(9_u8, GuestAddress(1 << 32)).unwrap();
        for (memory, byte) in [(&one, 9), (&other, 7)] {
            assert_eq!(memory.map.read_obj::<u8>(GuestAddress(1 << 32)).unwrap(), byte);
            assert_eq!(memory.bytes, 1 << 20);
        }
        assert!(one.ram.read_obj::<u8>(GuestAddress(1 << 32)).is_err(), "it is gained later");
    }

    #[test]
    fn own_memory_starts_where_a_large_page_may() {
        let memory = Memory::new(&[(0, 3 << 20), (1 << 32, 5 << 20)], None, Kind::default()).unwrap();
        for region in memory.map.iter() {
            assert_eq!(region.as_ptr() as usize % LARGE_PAGE_BYTES, 0);
        }
    }

    #[test]
    fn memory_comes_from_nodes_that_the_host_has() {
        let of = |nodes: &[u32]| Memory::new(&[(0, 1 << 20)], None, Kind { nodes, ..Kind::default() });
        for nodes in [&[1000][..], &[5000], &[0, 1 << 31]] {
            let refused = of(nodes).unwrap_err();
            assert!(refused.is_invalid() && refused.to_string().contains("host_nodes"), "{nodes:?}: {refused}");
        }
        match of(&[0]) {
            Ok(memory) => memory.map.write_obj(7_u64, GuestAddress(0)).unwrap(),
            // A kernel without NUMA.
            Err(error) => assert!(error.to_string().contains("not implemented"), "{error}"),
        }
    }
}

//! An uncompressed kernel with a PVH entry (Xen, docs/misc/pvh.pandoc; the ELF note `XEN_ELFNOTE_PHYS32_ENTRY`).

use std::fs::File;

use vm_memory::GuestMemoryMmap;

use super::{COMMAND_LINE, Entry, Images, START_INFO, copy, load_initrd, put, read};
use crate::Error;
use crate::arch::layout;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More program headers than any kernel has.
const HEADERS_MAX: u16 = 128;
/// More notes than any kernel has, in bytes.
const NOTE_BYTES_MAX: u64 = 64 << 10;
const PHYS32_ENTRY: u32 = 18;
/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;

/// A part of the file.
struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

/// Loads the kernel and gives its entry.
pub(super) fn load(memory: &GuestMemoryMmap, images: &Images<'_>, rsdp: u64) -> Result<Entry, Error> {
    let segments = segments(images.kernel)?;
    let mut entry = None;
    let mut end = layout::EXTENDED;
    for segment in &segments {
        match segment.kind {
            PT_LOAD => {
                if segment.file_bytes > segment.memory_bytes {
                    return Err(not_a_kernel("a part of it is larger in the file than in memory"));
                }
                let last = segment.address.checked_add(segment.memory_bytes);
                let last = last.filter(|last| *last <= layout::LOW_RAM_END && segment.address >= layout::EXTENDED);
                let last = last.ok_or_else(|| not_a_kernel("a part of it lies outside of a machine's memory"))?;
                copy(memory, images.kernel, "the kernel", segment.offset, segment.address, segment.file_bytes)?;
                end = end.max(last);
            }
            PT_NOTE if entry.is_none() => entry = find_entry(images.kernel, segment)?,
            _ => {}
        }
    }
    let Some(address) = entry else {
        return Err(not_a_kernel(
            "it has no PVH entry: the kernel must be built with CONFIG_PVH, as distributions' are",
        ));
    };
    let initrd = load_initrd(memory, images.initrd, layout::LOW_RAM_END, end.next_multiple_of(4096))?;
    write_start_info(memory, initrd, rsdp)?;
    Ok(Entry::Pvh { address, start_info: START_INFO })
}

fn not_a_kernel(why: &str) -> Error {
    Error::Image(format!("the kernel's file is not an uncompressed x86-64 kernel: {why}"))
}

fn segments(file: &File) -> Result<Vec<Segment>, Error> {
    let mut header = [0; 64];
    read(file, 0, &mut header)?;
    let identification = header.first_chunk::<6>().copied().unwrap_or_default();
    if identification != [0x7f, b'E', b'L', b'F', 2, 1] || number::<2>(&header, 18) != 62 {
        return Err(not_a_kernel("it has no such ELF header"));
    }
    let (table, size) = (number::<8>(&header, 32), number::<2>(&header, 54));
    let count = u16::try_from(number::<2>(&header, 56)).unwrap_or(u16::MAX);
    if size != 56 || count == 0 || count > HEADERS_MAX {
        return Err(not_a_kernel("its program headers are not those of a kernel"));
    }
    let mut segments = Vec::with_capacity(usize::from(count));
    for index in 0..u64::from(count) {
        let mut header = [0; 56];
        let offset = table.checked_add(index * size).ok_or_else(|| not_a_kernel("its program headers lie nowhere"))?;
        read(file, offset, &mut header)?;
        segments.push(Segment {
            kind: u32::try_from(number::<4>(&header, 0)).unwrap_or(0),
            offset: number::<8>(&header, 8),
            address: number::<8>(&header, 24),
            file_bytes: number::<8>(&header, 32),
            memory_bytes: number::<8>(&header, 40),
        });
    }
    Ok(segments)
}

/// The little-endian number of `N` bytes at `at`, which is inside of `bytes`.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    for (place, byte) in value.iter_mut().zip(bytes.iter().skip(at).take(N)) {
        *place = *byte;
    }
    u64::from_le_bytes(value)
}

/// The entry that a note gives, where it is in this segment.
fn find_entry(file: &File, segment: &Segment) -> Result<Option<u64>, Error> {
    if segment.file_bytes > NOTE_BYTES_MAX {
        return Err(not_a_kernel("its notes are too long"));
    }
    let mut notes = vec![0; usize::try_from(segment.file_bytes).unwrap_or(0)];
    read(file, segment.offset, &mut notes)?;
    let mut rest = notes.as_slice();
    while let Some((header, body)) = rest.split_at_checked(12) {
        let (name, descriptor) = (number::<4>(header, 0), number::<4>(header, 4));
        let kind = number::<4>(header, 8);
        let padded = |bytes: u64| usize::try_from(bytes.next_multiple_of(4)).ok();
        let (Some(name_bytes), Some(descriptor_bytes)) = (padded(name), padded(descriptor)) else { return Ok(None) };
        let Some((name, body)) = body.split_at_checked(name_bytes) else { return Ok(None) };
        let Some((descriptor, next)) = body.split_at_checked(descriptor_bytes) else { return Ok(None) };
        if name.starts_with(b"Xen\0") && kind == u64::from(PHYS32_ENTRY) {
            let entry = match descriptor.len() {
                4 => number::<4>(descriptor, 0),
                _ => number::<8>(descriptor, 0),
            };
            return Ok(Some(entry).filter(|entry| *entry <= u64::from(u32::MAX)));
        }
        rest = next;
    }
    Ok(None)
}

/// `hvm_start_info` version 1, one module where there is a RAM disk, and the memory map.
fn write_start_info(memory: &GuestMemoryMmap, initrd: (u64, u64), rsdp: u64) -> Result<(), Error> {
    let modules = START_INFO + 0x40;
    let map_address = START_INFO + 0x80;
    let map = layout::memory_map(bytes_of(memory));
    let mut info = Vec::with_capacity(56);
    let count = u32::from(initrd.1 > 0);
    for word in [MAGIC, 1, 0, count] {
        info.extend(word.to_le_bytes());
    }
    for address in [modules, COMMAND_LINE, rsdp, map_address] {
        info.extend(address.to_le_bytes());
    }
    info.extend(u32::try_from(map.len()).unwrap_or(0).to_le_bytes());
    info.extend(0_u32.to_le_bytes());
    put(memory, START_INFO, &info)?;
    let module: Vec<u8> = [initrd.0, initrd.1, 0, 0].iter().flat_map(|number| number.to_le_bytes()).collect();
    put(memory, modules, &module)?;
    let mut entries = Vec::with_capacity(map.len() * 24);
    for (address, bytes, kind) in map {
        entries.extend(address.to_le_bytes());
        entries.extend(bytes.to_le_bytes());
        entries.extend((kind as u32).to_le_bytes());
        entries.extend(0_u32.to_le_bytes());
    }
    put(memory, map_address, &entries)
}

/// All bytes of the guest's memory.
pub(super) fn bytes_of(memory: &GuestMemoryMmap) -> u64 {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    memory.iter().map(GuestMemoryRegion::len).sum()
}

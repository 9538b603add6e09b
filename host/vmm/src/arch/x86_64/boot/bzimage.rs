//! A bzImage by its 64-bit entry (Linux, Documentation/arch/x86/boot.rst): it decompresses itself.

use vm_memory::GuestMemoryMmap;

use super::pvh::bytes_of;
use super::{COMMAND_LINE, Entry, GDT, Images, PAGE_TABLES, copy, load_initrd, put, read};
use crate::Error;
use crate::arch::layout;

/// The zero page, on which the start information of the other entry is: only one of the two is used.
const ZERO_PAGE: u64 = 0x7000;
/// The setup header within file and zero page.
const HEADER: u64 = 0x1f1;
const HEADER_END: u64 = 0x290;
const SECTOR: u64 = 512;
/// `XLF_KERNEL_64`: there is a 64-bit entry, 0x200 bytes after the start of the protected-mode code.
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;

/// The setup header, with fields at the offsets that the protocol gives.
struct Header([u8; (HEADER_END - HEADER) as usize]);

impl Header {
    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let from = usize::try_from(at - HEADER).unwrap_or(0);
        self.0.get(from..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }

    fn set<const N: usize>(&mut self, at: u64, value: [u8; N]) {
        let from = usize::try_from(at - HEADER).unwrap_or(0);
        if let Some(place) = self.0.get_mut(from..).and_then(|rest| rest.first_chunk_mut()) {
            *place = value;
        }
    }
}

/// Loads the kernel and gives its entry.
pub(super) fn load(memory: &GuestMemoryMmap, images: &Images<'_>, rsdp: u64) -> Result<Entry, Error> {
    let mut header = Header([0; (HEADER_END - HEADER) as usize]);
    read(images.kernel, HEADER, &mut header.0)?;
    let not_a_kernel = |why: &str| Error::Image(format!("the kernel's file is not a 64-bit bzImage: {why}"));
    if header.get::<4>(0x202) != *b"HdrS" {
        return Err(not_a_kernel("it has no setup header"));
    }
    if u16::from_le_bytes(header.get(0x206)) < 0x20c || u16::from_le_bytes(header.get(0x236)) & KERNEL_64 == 0 {
        return Err(not_a_kernel("it has no 64-bit entry"));
    }
    let sectors = match header.get::<1>(0x1f1) {
        [0] => 4,
        [sectors] => u64::from(sectors),
    };
    let offset = (sectors + 1) * SECTOR;
    let file_bytes = images.kernel.metadata().map_err(|error| Error::Image(error.to_string()))?.len();
    let code = file_bytes.checked_sub(offset).ok_or_else(|| not_a_kernel("it is truncated"))?;
    // What the header promises of the code's size, in paragraphs of 16 bytes: a truncated file has less.
    if code < u64::from(u32::from_le_bytes(header.get(0x1f4))) * 16 {
        return Err(not_a_kernel("it is truncated"));
    }
    let address = u64::from_le_bytes(header.get(0x258));
    let needs = u64::from(u32::from_le_bytes(header.get(0x260))).max(code);
    let end = address.checked_add(needs).filter(|end| *end <= layout::LOW_RAM_END && address >= layout::EXTENDED);
    let end = end.ok_or_else(|| not_a_kernel("it wants to lie outside of a machine's memory"))?;
    copy(memory, images.kernel, "the kernel", offset, address, code)?;
    let limit = u64::from(u32::from_le_bytes(header.get(0x22c))) + 1;
    let initrd = load_initrd(memory, images.initrd, limit, end.next_multiple_of(4096))?;
    fill_in(&mut header, initrd);
    put(memory, ZERO_PAGE + HEADER, &header.0)?;
    put(memory, ZERO_PAGE + 0x70, &rsdp.to_le_bytes())?;
    write_memory_map(memory)?;
    write_tables(memory)?;
    let address = address + ENTRY_64;
    Ok(Entry::Long { address, zero_page: ZERO_PAGE, page_tables: PAGE_TABLES, gdt: GDT })
}

fn fill_in(header: &mut Header, initrd: (u64, u64)) {
    let low = |number: u64| u32::try_from(number).unwrap_or(0).to_le_bytes();
    // A loader without a number of its own.
    header.set(0x210, [0xff]);
    header.set(0x218, low(initrd.0));
    header.set(0x21c, low(initrd.1));
    header.set(0x228, low(COMMAND_LINE));
}

fn write_memory_map(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let map = layout::memory_map(bytes_of(memory));
    put(memory, ZERO_PAGE + 0x1e8, &[u8::try_from(map.len()).unwrap_or(0)])?;
    let mut entries = Vec::with_capacity(map.len() * 20);
    for (address, bytes, kind) in map {
        entries.extend(address.to_le_bytes());
        entries.extend(bytes.to_le_bytes());
        entries.extend((kind as u32).to_le_bytes());
    }
    put(memory, ZERO_PAGE + 0x2d0, &entries)
}

/// Descriptors for flat segments at the protocol's selectors, and page tables that map the first 4 GiB to themselves.
fn write_tables(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let descriptors: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let bytes: Vec<u8> = descriptors.iter().flat_map(|word| word.to_le_bytes()).collect();
    put(memory, GDT, &bytes)?;
    let (top, second, first) = (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    let put_entry = |address: u64, value: u64| put(memory, address, &value.to_le_bytes());
    // Present and writable.
    put_entry(top, second | 3)?;
    for gib in 0..4 {
        let table = first + gib * 0x1000;
        put_entry(second + gib * 8, table | 3)?;
        for entry in 0..512 {
            // And 2 MiB large.
            put_entry(table + entry * 8, (gib << 30 | entry << 21) | 0x83)?;
        }
    }
    Ok(())
}

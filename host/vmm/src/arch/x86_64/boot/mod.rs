//! From a kernel's file to the state of the first processor at the kernel's first instruction.
//!
//! The files are the host's, but may be truncated or something else; each number in them is checked before it is used.

mod bzimage;
mod pvh;

use std::fs::File;
use std::os::unix::fs::FileExt;

use coracle_monitor_api::KernelForm;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout;
use crate::Error;

/// Pages of the boot itself, in conventional memory, which the kernel takes over.
const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const PAGE_TABLES: u64 = 0x9000;
const COMMAND_LINE: u64 = 0x2_0000;

/// The longest command line that x86 kernels take, with the byte at its end (Linux, `COMMAND_LINE_SIZE`).
const COMMAND_LINE_BYTES: usize = 2048;

/// How the first processor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// 32-bit protected mode without paging; the start information is in EBX (Xen, docs/misc/pvh.pandoc).
    Pvh {
        /// The first instruction.
        address: u64,
        /// For EBX.
        start_info: u64,
    },
    /// 64-bit mode with identity paging; the zero page is in RSI (Linux, Documentation/arch/x86/boot.rst).
    Long {
        /// The first instruction.
        address: u64,
        /// For RSI.
        zero_page: u64,
        /// For CR3.
        page_tables: u64,
        /// The descriptor table.
        gdt: u64,
    },
}

/// What is booted.
pub(crate) struct Images<'a> {
    pub(crate) kernel: &'a File,
    pub(crate) form: KernelForm,
    pub(crate) initrd: &'a File,
    pub(crate) command_line: &'a str,
}

/// Puts kernel, RAM disk and command line into the guest's memory. `rsdp` is the address of the ACPI tables' root.
pub(crate) fn load(memory: &GuestMemoryMmap, images: &Images<'_>, rsdp: u64) -> Result<Entry, Error> {
    let line = images.command_line.as_bytes();
    if line.len() >= COMMAND_LINE_BYTES || line.contains(&0) {
        return Err(Error::Invalid(format!(
            "the kernel's command line has {} bytes; it may have {}, and no zero byte",
            line.len(),
            COMMAND_LINE_BYTES - 1
        )));
    }
    put(memory, COMMAND_LINE, line)?;
    put(memory, COMMAND_LINE + line.len() as u64, &[0])?;
    match images.form {
        KernelForm::PvhElf => pvh::load(memory, images, rsdp),
        KernelForm::BzImage => bzimage::load(memory, images, rsdp),
    }
}

fn put(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|_| Error::Invalid("the machine has too little memory to boot in".into()))
}

/// Reads the kernel's file at `offset`, whole or not at all.
fn read(file: &File, offset: u64, bytes: &mut [u8]) -> Result<(), Error> {
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::Image("the kernel's file is truncated".into()),
        _ => Error::Image(format!("the kernel's file can't be read: {error}")),
    })
}

/// Moves a part of a file straight into the guest's memory.
fn copy(memory: &GuestMemoryMmap, file: &File, what: &str, offset: u64, address: u64, bytes: u64) -> Result<(), Error> {
    let size = usize::try_from(bytes).map_err(|_| Error::Image(format!("{what} is too large")))?;
    let place = memory.get_slice(GuestAddress(address), size);
    let place = place.map_err(|_| {
        Error::Image(format!("{what} does not fit: {bytes} bytes at {address:#x} are not in the machine's memory"))
    })?;
    let guard = place.ptr_guard_mut();
    // SAFETY: the slice is mapped, writable, `size` bytes long, and lives as long as `memory`, which outlives this call.
    // Nothing else in this process touches the guest's memory before the machine runs.
    #[expect(unsafe_code, reason = "one copy less of the whole kernel")]
    let bytes = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), size) };
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::Image(format!("{what} is truncated")),
        _ => Error::Image(format!("{what} can't be read: {error}")),
    })
}

/// Puts the RAM disk as high as it may be, below `limit` (exclusive). Gives its address and its bytes; an empty one is none, at
/// no address.
fn load_initrd(memory: &GuestMemoryMmap, file: &File, limit: u64, above: u64) -> Result<(u64, u64), Error> {
    let bytes = file.metadata().map_err(|error| Error::Image(format!("the RAM disk can't be read: {error}")))?.len();
    if bytes == 0 {
        return Ok((0, 0));
    }
    let low = memory.iter().next().map_or(0, GuestMemoryRegion::len);
    let end = low.min(limit).min(layout::LOW_RAM_END);
    let address = end.checked_sub(bytes).map(|address| address & !0xfff).filter(|address| *address >= above);
    let address = address.ok_or_else(|| {
        Error::Image(format!(
            "the RAM disk ({} MiB) does not fit beside the kernel into the machine's memory ({} MiB)",
            bytes >> 20,
            low >> 20
        ))
    })?;
    copy(memory, file, "the RAM disk", 0, address, bytes)?;
    Ok((address, bytes))
}

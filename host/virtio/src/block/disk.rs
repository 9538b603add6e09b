//! What is behind the device: a raw file, or a block device of the host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, OFlags, SeekFrom, StatxFlags, fallocate, fcntl_getfl, fdatasync, fstat,
    ftruncate, ioctl_blkpbszget, ioctl_blksszget, seek, statx,
};
use rustix::io::{Errno, retry_on_intr};
use vm_memory::VolatileSlice;

use super::SECTOR_BYTES;
use crate::chain::Slices;
use crate::vectored;

/// Bytes of the buffer that misaligned data goes through.
const BOUNCE_BYTES: usize = 256 << 10;
/// What any file system and disk is content with, for a file that does not say what it wants.
const CAUTIOUS_ALIGNMENT: u32 = 4096;
/// `BLKDISCARD` (linux/fs.h): `_IO(0x12, 119)`.
const BLKDISCARD: libc::Ioctl = 0x1277;

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    file: OwnedFd,
    is_device: bool,
    sectors: u64,
    block_bytes: u32,
    physical_bytes: u32,
    discards: bool,
    /// For a file that passes the page cache by: what the addresses of buffers must be multiples of.
    alignment: Option<usize>,
    bounce: Option<Bounce>,
}

impl Disk {
    /// # Errors
    /// A file of another kind, one that is not open for what the guest may do, one of less than a block, or what the kernel
    /// says.
    pub(super) fn new(file: OwnedFd, direct: bool, read_only: bool) -> io::Result<Self> {
        let metadata = fstat(&file)?;
        let is_device = match FileType::from_raw_mode(metadata.st_mode) {
            FileType::BlockDevice => true,
            FileType::RegularFile => false,
            _ => return Err(invalid("a disk is a file or a block device")),
        };
        let flags = fcntl_getfl(&file)?;
        let mode = flags & OFlags::RWMODE;
        if mode != OFlags::RDWR && (mode != OFlags::RDONLY || !read_only) {
            return Err(invalid("the disk's file is not open for what the guest may do"));
        }
        // Whatever the caller says, the kernel goes by the flag.
        let direct = direct || flags.contains(OFlags::DIRECT);
        let (memory, offset) = if direct { direct_alignment(&file, is_device) } else { (1, 512) };
        let block_bytes = if is_device { ioctl_blksszget(&file)?.max(offset) } else { offset };
        let physical = if is_device { ioctl_blkpbszget(&file)? } else { metadata.st_blksize.try_into().unwrap_or(512) };
        let powers = 512..=1 << 16;
        if !block_bytes.is_power_of_two() || !powers.contains(&block_bytes) {
            return Err(invalid("the disk's blocks have a size that can't be"));
        }
        let physical = if physical.is_power_of_two() && powers.contains(&physical) { physical } else { block_bytes };
        let bytes = length(&file)?;
        let blocks = bytes / u64::from(block_bytes);
        if blocks == 0 {
            return Err(invalid("the disk has less than one block"));
        }
        let mut disk = Self {
            file,
            is_device,
            sectors: blocks * (u64::from(block_bytes) / SECTOR_BYTES),
            block_bytes,
            physical_bytes: physical.max(block_bytes),
            discards: false,
            alignment: direct.then_some(memory as usize),
            bounce: None,
        };
        // A file's holes are tried where there is nothing to lose: behind its end.
        disk.discards = !read_only && (is_device || disk.punch(bytes, u64::from(CAUTIOUS_ALIGNMENT)).is_ok());
        Ok(disk)
    }

    /// Gives it so many bytes, of which it has no more now. A file grows with it; a device has them, or can't have them.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where it has more, or its device has fewer; else the kernel's.
    pub(super) fn grow(&mut self, bytes: u64, read_only: bool) -> io::Result<()> {
        let sectors = bytes / u64::from(self.block_bytes) * (u64::from(self.block_bytes) / SECTOR_BYTES);
        if sectors < self.sectors {
            let has = self.sectors * SECTOR_BYTES;
            return Err(invalid(&format!("the disk has {has} bytes: with {bytes} it would lose some")));
        }
        let behind = length(&self.file)?;
        if behind < bytes {
            if self.is_device || read_only {
                return Err(invalid(&format!("what is behind the disk has {behind} bytes, and can't have {bytes}")));
            }
            retry_on_intr(|| ftruncate(&self.file, bytes))?;
        }
        self.sectors = sectors;
        Ok(())
    }

    /// Sectors, a whole number of blocks.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// What requests are multiples of, a power of two from 512 on.
    pub(super) fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// What they had better be multiples of, a power of two, at least a block.
    pub(super) fn physical_bytes(&self) -> u32 {
        self.physical_bytes
    }

    /// Whether what is not needed can be given back.
    pub(super) fn discards(&self) -> bool {
        self.discards
    }

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// The kernel's, and the file's end.
    pub(super) fn read(&mut self, into: &mut Slices<'_>, mut offset: u64) -> io::Result<()> {
        if self.misaligned(into.pieces()) {
            let bounce = self.bounce.get_or_insert_with(Bounce::new);
            while !into.is_empty() {
                let piece = bounce.first(into.len());
                let count = retry_on_intr(|| rustix::io::pread(&self.file, &mut *piece, offset))?;
                into.put(piece.get(..count).unwrap_or_default());
                offset = advanced(offset, count)?;
            }
            return Ok(());
        }
        while !into.is_empty() {
            let count = vectored::read_at(self.file.as_fd(), into.pieces(), offset)?;
            into.advance(count);
            offset = advanced(offset, count)?;
        }
        Ok(())
    }

    /// Writes all of `from` at `offset`.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn write(&mut self, from: &mut Slices<'_>, mut offset: u64) -> io::Result<()> {
        if self.misaligned(from.pieces()) {
            let bounce = self.bounce.get_or_insert_with(Bounce::new);
            while !from.is_empty() {
                let piece = bounce.first(from.len());
                // It has as many bytes as are asked for.
                let _ = from.take(piece);
                offset = write_all(&self.file, piece, offset)?;
            }
            return Ok(());
        }
        while !from.is_empty() {
            let count = vectored::write_at(self.file.as_fd(), from.pieces(), offset)?;
            from.advance(count);
            offset = advanced(offset, count)?;
        }
        Ok(())
    }

    fn misaligned(&self, pieces: &[VolatileSlice<'_>]) -> bool {
        let Some(alignment) = self.alignment else { return false };
        let odd = |piece: &VolatileSlice<'_>| {
            let address = piece.ptr_guard().as_ptr().addr();
            !address.is_multiple_of(alignment) || !piece.len().is_multiple_of(self.block_bytes as usize)
        };
        pieces.iter().any(odd)
    }

    /// Waits until what was written is safe.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(retry_on_intr(|| fdatasync(&self.file))?)
    }

    /// Gives a range back. What is read there afterwards may be anything.
    ///
    /// # Errors
    /// The kernel's; [`io::ErrorKind::Unsupported`] among them.
    pub(super) fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if !self.is_device {
            return self.punch(offset, bytes);
        }
        let range = [offset, bytes];
        // SAFETY: the request reads two numbers of 64 bits behind the pointer, which live during the call.
        #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), BLKDISCARD, range.as_ptr()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Makes a hole: zeros that take no room. Of a device the kernel makes one only where it reads as zeros.
    fn punch(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(retry_on_intr(|| fallocate(&self.file, flags, offset, bytes))?)
    }

    /// Fills a range with zeros, and gives it back where it may.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn zero(&mut self, offset: u64, bytes: u64, may_discard: bool) -> io::Result<()> {
        if may_discard && self.discards && self.punch(offset, bytes).is_ok() {
            return Ok(());
        }
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| fallocate(&self.file, flags, offset, bytes)) {
            Err(Errno::OPNOTSUPP) => {}
            result => return Ok(result?),
        }
        let bounce = self.bounce.get_or_insert_with(Bounce::new);
        let (mut offset, end) = (offset, offset.saturating_add(bytes));
        bounce.first(BOUNCE_BYTES).fill(0);
        while offset < end {
            let piece = bounce.first(usize::try_from(end - offset).unwrap_or(usize::MAX));
            offset = write_all(&self.file, piece, offset)?;
        }
        Ok(())
    }
}

/// The bytes of a file or device; a device's metadata has none. Nothing here uses the position that this moves.
fn length(file: &OwnedFd) -> io::Result<u64> {
    Ok(seek(file, SeekFrom::End(0))?)
}

/// The offset behind `count` more bytes.
fn advanced(offset: u64, count: usize) -> io::Result<u64> {
    // A file that somebody has made shorter: whoever goes on would do so forever.
    if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(offset.saturating_add(count as u64)) }
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> io::Result<u64> {
    while !bytes.is_empty() {
        let count = retry_on_intr(|| rustix::io::pwrite(file, bytes, offset))?;
        bytes = bytes.get(count..).unwrap_or_default();
        offset = advanced(offset, count)?;
    }
    Ok(offset)
}

/// What the addresses of buffers, and offsets and lengths, must be multiples of without the page cache.
fn direct_alignment(file: &OwnedFd, is_device: bool) -> (u32, u32) {
    let said = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    let said = said.filter(|said| said.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && said.stx_dio_offset_align != 0);
    match said {
        Some(said) => (said.stx_dio_mem_align.max(1), said.stx_dio_offset_align.max(512)),
        None if is_device => (CAUTIOUS_ALIGNMENT, 512),
        None => (CAUTIOUS_ALIGNMENT, CAUTIOUS_ALIGNMENT),
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// A buffer on a page's boundary, which pleases any disk.
#[derive(Debug)]
struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn new() -> Self {
        let alignment = CAUTIOUS_ALIGNMENT as usize;
        // It is never made longer, so it stays where it is.
        let bytes = vec![0; BOUNCE_BYTES + alignment];
        let start = bytes.as_ptr().align_offset(alignment).min(alignment);
        Self { bytes, start }
    }

    /// Its first bytes, as many as are wanted and it has.
    fn first(&mut self, wanted: usize) -> &mut [u8] {
        let count = wanted.min(BOUNCE_BYTES);
        self.bytes.get_mut(self.start..self.start + count).unwrap_or_default()
    }
}

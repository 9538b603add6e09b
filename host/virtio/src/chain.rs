//! What a chain's descriptors cover, walked once.
//!
//! The guest may change descriptors while a device looks at them. A device that walks a chain a second time may see another
//! chain, so none does: lengths are taken here, checked against the guest's memory here, and are right from then on. The
//! bytes themselves may still change; whoever believes them copies them first.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use crate::ring::Chain;

/// The most descriptors of a chain. A driver links no more than the queue has entries (virtio 1.3, section 2.7.5.2), and no
/// queue here has more than this.
pub const DESCRIPTORS_MAX: usize = 1024;

/// Why a chain can't be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It does not end, or its next descriptor can't be read.
    #[error("the chain has no end")]
    Endless,
    /// It has more than [`DESCRIPTORS_MAX`] descriptors, or covers so many pieces of memory.
    #[error("the chain has too many descriptors")]
    TooLong,
    /// A descriptor to read follows one to write (section 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A descriptor covers what is not the guest's memory.
    #[error("a descriptor lies outside the guest's memory")]
    Outside,
}

/// The memory of a chain's descriptors.
#[derive(Debug)]
pub struct Buffers<'m> {
    /// What the device reads.
    pub readable: Slices<'m>,
    /// What the device writes.
    pub writable: Slices<'m>,
    /// How many descriptors there were.
    pub descriptors: usize,
}

/// Walks `chain`, whose descriptors lie in `memory`.
///
/// # Errors
/// [`Malformed`].
pub fn walk<'m>(chain: &Chain, memory: &'m GuestMemoryMmap) -> Result<Buffers<'m>, Malformed> {
    let mut buffers = Buffers { readable: Slices::default(), writable: Slices::default(), descriptors: 0 };
    // The iterator ends alike where the chain does and where it can't be followed: this tells them apart.
    let mut ended = false;
    for descriptor in chain.clone() {
        buffers.descriptors += 1;
        if buffers.descriptors > DESCRIPTORS_MAX {
            return Err(Malformed::TooLong);
        }
        ended = !descriptor.has_next();
        if descriptor.is_write_only() {
            buffers.writable.cover(memory, &descriptor)?;
        } else if buffers.writable.slices.is_empty() {
            buffers.readable.cover(memory, &descriptor)?;
        } else {
            return Err(Malformed::Order);
        }
        // A descriptor over two regions is two pieces, and a call to the kernel takes so many.
        if buffers.readable.slices.len() + buffers.writable.slices.len() > DESCRIPTORS_MAX {
            return Err(Malformed::TooLong);
        }
    }
    if ended { Ok(buffers) } else { Err(Malformed::Endless) }
}

/// Pieces of the guest's memory in order, as one run of bytes that is taken from its front.
#[derive(Debug, Default)]
pub struct Slices<'m> {
    slices: Vec<VolatileSlice<'m>>,
    /// How many slices are used up.
    used: usize,
    bytes: usize,
}

impl<'m> Slices<'m> {
    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether none are left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// The pieces that are left. None is empty.
    #[must_use]
    pub fn pieces(&self) -> &[VolatileSlice<'m>] {
        self.slices.get(self.used..).unwrap_or_default()
    }

    fn cover(&mut self, memory: &'m GuestMemoryMmap, descriptor: &Descriptor) -> Result<(), Malformed> {
        // A descriptor of no bytes covers nothing, wherever it points. It counts as a descriptor all the same.
        let length = descriptor.len() as usize;
        let pieces = memory.get_slices(descriptor.addr(), length, Permissions::ReadWrite);
        for piece in pieces.map_err(|_| Malformed::Outside)? {
            let piece = piece.map_err(|_| Malformed::Outside)?;
            self.bytes += piece.len();
            self.slices.push(piece);
        }
        Ok(())
    }

    /// Leaves out the first `count` bytes, or all where there are fewer.
    pub fn advance(&mut self, mut count: usize) {
        while count > 0
            && let Some(first) = self.slices.get_mut(self.used)
        {
            match first.offset(count) {
                Ok(rest) if !rest.is_empty() => {
                    *first = rest;
                    self.bytes -= count;
                    return;
                }
                _ => {
                    count = count.saturating_sub(first.len());
                    self.bytes -= first.len();
                    self.used += 1;
                }
            }
        }
    }

    /// Leaves out what is behind the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        while self.bytes > count
            && let Some(last) = self.slices.pop()
        {
            self.bytes -= last.len();
            if self.bytes < count
                && let Ok(part) = last.subslice(0, count - self.bytes)
            {
                self.slices.push(part);
                self.bytes = count;
            }
        }
        self.used = self.used.min(self.slices.len());
    }

    /// Takes the last byte off. `None` where there is none.
    pub fn split_last(&mut self) -> Option<VolatileSlice<'m>> {
        let before = self.bytes.checked_sub(1)?;
        let last = self.pieces().last()?;
        let byte = last.offset(last.len().checked_sub(1)?).ok()?;
        self.truncate(before);
        Some(byte)
    }

    /// Copies the first bytes out and advances. False, and nothing is taken, where there are fewer.
    #[must_use]
    pub fn take(&mut self, bytes: &mut [u8]) -> bool {
        if self.bytes < bytes.len() {
            return false;
        }
        let mut copied = 0;
        for piece in self.pieces() {
            let Some(rest) = bytes.get_mut(copied..).filter(|rest| !rest.is_empty()) else { break };
            copied += piece.copy_to(rest);
        }
        self.advance(copied);
        true
    }

    /// Copies bytes in and advances. Returns how many found room.
    pub fn put(&mut self, bytes: &[u8]) -> usize {
        let mut copied = 0;
        for piece in self.pieces() {
            let Some(rest) = bytes.get(copied..).filter(|rest| !rest.is_empty()) else { break };
            piece.copy_from(rest);
            copied += rest.len().min(piece.len());
        }
        self.advance(copied);
        copied
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Driver, NEXT, WRITE, memory};
    use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

    fn walked(prepare: impl FnOnce(&mut Driver), check: impl FnOnce(Result<Buffers<'_>, Malformed>)) {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        prepare(&mut driver);
        let mut ring = driver.ring(false);
        let chain = ring.pop().unwrap().unwrap();
        check(walk(&chain, &memory.memory()));
    }

    #[test]
    fn reads_and_writes_go_through_all_pieces() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 16);
        driver.chain(&[
            (0x8000, 3, false),
            (0x9000, 0, false),
            (0xa000, 5, false),
            (0xb000, 2, true),
            (0xc000, 4, true),
        ]);
        memory.memory().write_slice(b"abc", GuestAddress(0x8000)).unwrap();
        memory.memory().write_slice(b"defgh", GuestAddress(0xa000)).unwrap();
        let chain = driver.ring(false).pop().unwrap().unwrap();
        let guard = memory.memory();
        let Buffers { mut readable, mut writable, descriptors } = walk(&chain, &guard).unwrap();
        assert_eq!(descriptors, 5);
        assert_eq!((readable.len(), writable.len()), (8, 6));
        let mut bytes = [0; 4];
        assert!(readable.take(&mut bytes));
        assert_eq!(&bytes, b"abcd");
        assert_eq!((readable.len(), readable.pieces().len()), (4, 1));
        readable.truncate(3);
        let mut bytes = [0; 4];
        assert!(!readable.take(&mut bytes), "only three are left");
        assert!(readable.take(&mut bytes[..3]));
        assert_eq!(&bytes, b"efg\0");
        assert!(readable.is_empty() && readable.pieces().is_empty());

        let last = writable.split_last().unwrap();
        last.copy_from(b"Z");
        assert_eq!(writable.len(), 5);
        assert_eq!(writable.put(b"1234567"), 5);
        assert_eq!(writable.put(b"8"), 0);
        assert!(writable.split_last().is_none());
        let mut written = [0; 2];
        guard.read_slice(&mut written, GuestAddress(0xb000)).unwrap();
        assert_eq!(&written, b"12");
        let mut written = [0; 4];
        guard.read_slice(&mut written, GuestAddress(0xc000)).unwrap();
        assert_eq!(&written, b"345Z");
    }

    #[test]
    fn truncating_what_is_partly_used_counts_from_the_front() {
        walked(
            |driver| {
                driver.chain(&[(0x8000, 10, false), (0x9000, 10, false), (0xa000, 10, false)]);
            },
            |buffers| {
                let mut readable = buffers.unwrap().readable;
                readable.advance(12);
                readable.truncate(9);
                assert_eq!(readable.pieces().iter().map(VolatileSlice::len).collect::<Vec<_>>(), [8, 1]);
                readable.truncate(8);
                assert_eq!(readable.pieces().iter().map(VolatileSlice::len).collect::<Vec<_>>(), [8]);
                readable.truncate(0);
                assert!(readable.is_empty() && readable.pieces().is_empty());
                readable.advance(1);
            },
        );
    }

    #[test]
    fn a_piece_over_two_regions_is_two() {
        walked(
            |driver| {
                driver.chain(&[(crate::driver::SEAM - 4, 8, true)]);
            },
            |buffers| {
                let writable = buffers.unwrap().writable;
                assert_eq!((writable.len(), writable.pieces().len()), (8, 2));
            },
        );
    }

    #[test]
    fn nonsense_is_told() {
        // A loop.
        walked(
            |driver| {
                driver.table(0, 0x8000, 1, NEXT, 1);
                driver.table(1, 0x8000, 1, NEXT, 0);
                driver.offer(0);
            },
            |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Endless),
        );
        // A next descriptor that is none.
        walked(
            |driver| {
                driver.table(0, 0x8000, 1, NEXT, 16);
                driver.offer(0);
            },
            |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Endless),
        );
        // More than 2^32 bytes.
        walked(
            |driver| {
                driver.table(0, 0x8000, 0, NEXT, 1);
                driver.table(1, 0x8000, 8, NEXT, 2);
                driver.table(2, 0x8000, u32::MAX, 0, 0);
                driver.offer(0);
            },
            |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Endless),
        );
        walked(
            |driver| {
                driver.chain(&[(0x8000, 1, true), (0x9000, 1, false)]);
            },
            |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Order),
        );
        for (address, length) in
            [(crate::driver::END - 1, 2), (crate::driver::END, 1), (u64::MAX, 1), (u64::MAX - 1, 4)]
        {
            walked(
                |driver| {
                    driver.chain(&[(address, length, false)]);
                },
                |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Outside),
            );
        }
    }

    #[test]
    fn an_indirect_table_is_bounded() {
        // The table's own entries are not bounded by the ring's.
        let long = |entries: u16, last: bool| {
            move |driver: &mut Driver| {
                for slot in 0..entries {
                    let flags = if last && slot == entries - 1 { WRITE } else { WRITE | NEXT };
                    driver.indirect(0x10000, slot, 0x8000, 1, flags, slot + 1);
                }
                driver.table(0, 0x10000, 16 * u32::from(entries), crate::driver::INDIRECT, 0);
                driver.offer(0);
            }
        };
        walked(long(1024, true), |buffers| assert_eq!(buffers.unwrap().writable.len(), 1024));
        walked(long(1025, true), |buffers| assert_eq!(buffers.unwrap_err(), Malformed::TooLong));
        walked(long(3, false), |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Endless));
        // Those that cover nothing count as well.
        walked(
            |driver| {
                for slot in 0..1025 {
                    driver.indirect(0x10000, slot, 0, 0, if slot == 1024 { WRITE } else { WRITE | NEXT }, slot + 1);
                }
                driver.table(0, 0x10000, 16 * 1025, crate::driver::INDIRECT, 0);
                driver.offer(0);
            },
            |buffers| assert_eq!(buffers.unwrap_err(), Malformed::TooLong),
        );
        // A table of no entries, of half an entry, and within a table.
        for length in [0, 8, 17] {
            walked(
                |driver| {
                    driver.table(0, 0x10000, length, crate::driver::INDIRECT, 0);
                    driver.offer(0);
                },
                |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Endless),
            );
        }
        walked(
            |driver| {
                driver.indirect(0x10000, 0, 0x10000, 16, crate::driver::INDIRECT, 0);
                driver.table(0, 0x10000, 16, crate::driver::INDIRECT, 0);
                driver.offer(0);
            },
            |buffers| assert_eq!(buffers.unwrap_err(), Malformed::Endless),
        );
    }
}

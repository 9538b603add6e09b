//! The guest's side of a queue, for tests: a driver that writes its rings by hand, well or badly.

use std::sync::Arc;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Activation, Memory};
use crate::ring::{Interrupts, Ring};

/// `VIRTQ_DESC_F_NEXT`.
pub(crate) const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub(crate) const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub(crate) const INDIRECT: u16 = 4;

/// Where one region of the guest's memory ends and the next begins.
pub(crate) const SEAM: u64 = 0x10_0000;
/// The end of the guest's memory.
pub(crate) const END: u64 = 0x20_0000;
/// Where data may lie: below are the rings of up to eight queues.
pub(crate) const DATA: u64 = 0x1_0000;

const QUEUE_BYTES: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1400;

/// Two MiB of memory, in two regions.
pub(crate) fn memory() -> Memory {
    let half = SEAM as usize;
    let regions = [(GuestAddress(0), half), (GuestAddress(SEAM), half)];
    Memory::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
}

/// What a device is activated with by a driver of all these queues.
pub(crate) fn activation(memory: &Memory, features: u64, rings: Vec<Option<Ring>>) -> Activation {
    Activation { features, memory: memory.clone(), rings }
}

/// One queue.
pub(crate) struct Driver {
    memory: Memory,
    index: u16,
    size: u16,
    base: u64,
    /// The next descriptor to use.
    pub(crate) slot: u16,
    available: u16,
    used: u16,
    interrupt: EventFd,
    /// Whether the index of what is available is right.
    pub(crate) honest: bool,
}

impl Driver {
    /// The queue of that index, which has so many entries (256 at most).
    pub(crate) fn new(memory: &Memory, index: u16, size: u16) -> Self {
        let base = u64::from(index) * QUEUE_BYTES;
        let zeros = [0; QUEUE_BYTES as usize];
        memory.memory().write_slice(&zeros, GuestAddress(base)).unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        Self { memory: memory.clone(), index, size, base, slot: 0, available: 0, used: 0, interrupt, honest: true }
    }

    /// The device's side.
    pub(crate) fn ring(&self, event_idx: bool) -> Ring {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + USED)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        let interrupts = Interrupts::new(vec![self.interrupt.try_clone().unwrap()], usize::from(self.index) + 1);
        interrupts.set(Some(self.index), 0);
        let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
        Ring::new(self.index, queue, self.memory.clone(), Arc::new(interrupts), doorbell).unwrap()
    }

    fn store<const N: usize>(&self, offset: u64, bytes: [u8; N]) {
        self.memory.memory().write_slice(&bytes, GuestAddress(self.base + offset)).unwrap();
    }

    fn load<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(self.base + offset)).unwrap();
        bytes
    }

    /// Writes a descriptor of the table.
    pub(crate) fn table(&self, slot: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.indirect(self.base, slot, address, length, flags, next);
    }

    /// Writes a descriptor of a table anywhere.
    pub(crate) fn indirect(&self, table: u64, slot: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = Vec::from(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.memory().write_slice(&bytes, GuestAddress(table + 16 * u64::from(slot))).unwrap();
    }

    /// Makes a chain available by its head.
    pub(crate) fn offer(&mut self, head: u16) {
        let place = u64::from(self.available % self.size);
        self.store(AVAILABLE + 4 + 2 * place, head.to_le_bytes());
        self.jump(1);
    }

    /// Moves the index of what is available without writing the entries.
    pub(crate) fn jump(&mut self, by: u16) {
        self.honest &= by == 1;
        self.available = self.available.wrapping_add(by);
        self.store(AVAILABLE + 2, self.available.to_le_bytes());
    }

    /// Makes a chain of descriptors (address, length, whether the device writes) available. Its head is returned.
    pub(crate) fn chain(&mut self, descriptors: &[(u64, u32, bool)]) -> u16 {
        let head = self.slot;
        for (index, (address, length, writable)) in descriptors.iter().enumerate() {
            let next = (self.slot + 1) % self.size;
            let more = if index + 1 < descriptors.len() { NEXT } else { 0 };
            self.table(self.slot, *address, *length, if *writable { WRITE } else { 0 } | more, next);
            self.slot = next;
        }
        self.offer(head);
        head
    }

    /// The chains that were given back since the last call: their heads and lengths.
    pub(crate) fn used(&mut self) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        let index = u16::from_le_bytes(self.load(USED + 2));
        assert!(index.wrapping_sub(self.used) <= self.size, "more was given back than there are entries");
        while self.used != index {
            let at = USED + 4 + 8 * u64::from(self.used % self.size);
            all.push((u32::from_le_bytes(self.load(at)), u32::from_le_bytes(self.load(at + 4))));
            self.used = self.used.wrapping_add(1);
        }
        all
    }

    /// Whether the guest was interrupted since the last call.
    pub(crate) fn interrupted(&self) -> bool {
        self.interrupt.read().is_ok()
    }

    /// Sets `used_event`.
    pub(crate) fn want_interrupt_after(&self, index: u16) {
        self.store(AVAILABLE + 4 + 2 * u64::from(self.size), index.to_le_bytes());
    }

    /// `avail_event`.
    pub(crate) fn wants_doorbell_after(&self) -> u16 {
        u16::from_le_bytes(self.load(USED + 4 + 8 * u64::from(self.size)))
    }

    /// How many chains are available and not given back, and the ring's entries.
    pub(crate) fn outstanding(&self) -> (u16, u16) {
        let index = u16::from_le_bytes(self.load(USED + 2));
        (self.available.wrapping_sub(index), self.size)
    }
}

/// Bytes into the guest's memory.
pub(crate) fn poke(memory: &Memory, address: u64, bytes: &[u8]) {
    memory.memory().write_slice(bytes, GuestAddress(address)).unwrap();
}

/// Bytes out of the guest's memory.
pub(crate) fn peek(memory: &Memory, address: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

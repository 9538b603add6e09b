//! The guest's memory with a copy beside it, and what a device may change of it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;

use coracle_virtio::device::Memory;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = 4;

/// Where one region of the memory ends and the next begins.
pub const SEAM: u64 = 0x2_0000;
/// The end of the memory.
pub const END: u64 = 0x3_0000;
/// Where data lies, mostly: below are the rings of up to eight queues.
pub const DATA: u64 = 0x1_0000;

/// Between the rings of two queues.
pub const QUEUE_BYTES: u64 = 0x2000;
/// From the table of descriptors to the ring of what is available.
pub const AVAILABLE: u64 = 0x1000;
/// From the table of descriptors to the ring of what is used.
pub const USED: u64 = 0x1400;

/// A queue as the driver has set it up.
#[derive(Debug, Clone, Copy)]
pub struct Queue {
    /// Entries.
    pub size: u16,
    /// The address of the table of descriptors.
    pub descriptors: u64,
    /// The address of the ring of what is available.
    pub available: u64,
    /// The address of the ring of what is used.
    pub used: u64,
    /// The next descriptor that the driver writes.
    pub slot: u16,
    /// The index of what is available.
    pub offered: u16,
    /// How many chains the device has given back, modulo 2^16. It serves them in order.
    given: u16,
}

/// What a device may do in a turn.
#[derive(Debug, Default)]
struct Plan {
    /// What it may write.
    writable: Vec<Range<u64>>,
    /// What it goes by. A device that is allowed to write there may do anything afterwards.
    read: Vec<Range<u64>>,
    /// By queue: the chains that wait, and how many bytes of each may be written.
    waiting: Vec<Vec<(u16, u64)>>,
    /// An index is nonsense.
    astray: bool,
}

/// See the module.
pub struct Guest {
    memory: Memory,
    /// What the memory held when it was looked at last, with the driver's own changes since.
    copy: Vec<u8>,
    scratch: Vec<u8>,
    /// By their indices; `None` for one that is not enabled.
    pub queues: Vec<Option<Queue>>,
    /// The device was allowed to overwrite what it goes by, so nothing can be told of its writes until it is reset.
    lost: bool,
    /// Where the device may take whole pages: they hold zeroes then.
    empties: Range<u64>,
    /// The queue whose chains the device keeps over turns: the guest may have changed its ring by the time they come back.
    keeps: Option<usize>,
    turns: usize,
    /// Descriptors that were followed.
    effort: Cell<usize>,
}

thread_local! {
    static MEMORY: Memory = {
        let regions = [(GuestAddress(0), SEAM as usize), (GuestAddress(SEAM), (END - SEAM) as usize)];
        Memory::new(GuestMemoryMmap::from_ranges(&regions).unwrap())
    };
    /// What it holds at first: rings of zeroes, and a pattern where data lies.
    static PATTERN: Vec<u8> = {
        let mut bytes = vec![0; END as usize];
        for (place, at) in bytes[DATA as usize..].chunks_mut(8).zip(0_u64..) {
            place.copy_from_slice(&(at.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 0x8080_8080_8080_8080).to_le_bytes());
        }
        bytes
    };
}

thread_local! {
    /// The copies of the last input, for the next one.
    static SPARE: Cell<(Vec<u8>, Vec<u8>)> = Cell::default();
}

impl Drop for Guest {
    fn drop(&mut self) {
        SPARE.set((std::mem::take(&mut self.copy), std::mem::take(&mut self.scratch)));
    }
}

/// After how many descriptors an input ends. Chains that go round in circles take a second for each hundred bytes of input, and
/// an input that is twice as long shows nothing more.
const EFFORT_MAX: usize = 1 << 17;

/// What a device takes at a time.
const PAGE_BYTES: usize = 4096;

/// After how many turns all of the memory is looked at.
const LOOK_AFTER: usize = 16;

impl Default for Guest {
    fn default() -> Self {
        Self::new()
    }
}

impl Guest {
    /// With memory that is the same each time.
    #[must_use]
    pub fn new() -> Self {
        let memory = MEMORY.with(Memory::clone);
        let (mut copy, mut scratch) = SPARE.take();
        PATTERN.with(|pattern| pattern.clone_into(&mut copy));
        scratch.resize(copy.len(), 0);
        memory.memory().write_slice(&copy, GuestAddress(0)).unwrap();
        Self {
            memory,
            copy,
            scratch,
            queues: Vec::new(),
            lost: false,
            empties: 0..0,
            keeps: None,
            turns: 0,
            effort: Cell::new(0),
        }
    }

    /// The device may take any page of this part of the memory.
    pub fn let_pages_go(&mut self, part: Range<u64>) {
        self.empties = part;
    }

    /// The device may keep chains of this queue for as long as it likes.
    pub fn let_chains_be_kept(&mut self, queue: usize) {
        self.keeps = Some(queue);
    }

    /// Takes over which pages have gone. A device that has taken its own rings may do anything afterwards.
    fn see_what_has_gone(&mut self) {
        if self.empties.is_empty() {
            return;
        }
        self.memory.memory().read_slice(&mut self.scratch, GuestAddress(0)).unwrap();
        let rings: Vec<_> = self.queues.iter().flatten().map(|queue| (rings_span(queue), used_span(queue))).collect();
        let pages = self.copy.chunks_mut(PAGE_BYTES).zip(self.scratch.chunks(PAGE_BYTES)).zip(0_u64..);
        for ((before, now), number) in pages.filter(|((before, now), _)| before != now) {
            let start = number * PAGE_BYTES as u64;
            let span = start..start + PAGE_BYTES as u64;
            let (mut has_rings, mut rest) = (false, now.to_vec());
            for (_, used) in rings.iter().filter(|(all, _)| overlap(all, &span)) {
                has_rings = true;
                // What the device has written there since.
                let own = used.start.clamp(span.start, span.end) - start..used.end.clamp(span.start, span.end) - start;
                rest[own.start as usize..own.end as usize].fill(0);
            }
            if rest.iter().all(|byte| *byte == 0) && overlap(&self.empties, &span) {
                before.copy_from_slice(now);
                self.lost |= has_rings;
            }
        }
    }

    /// Whether an input has had its share of time: it ends here.
    #[must_use]
    pub fn is_tired(&self) -> bool {
        self.effort.get() > EFFORT_MAX
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Whether nothing can be told of the device's writes any more.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// It can't be told any more what the device may write: its queues are not where the driver has put them.
    pub fn lose_track(&mut self) {
        self.lost = true;
    }

    /// The driver has reset the device: it has no queues.
    pub fn forget(&mut self) {
        self.look();
        self.queues.clear();
        self.lost = false;
    }

    /// The driver has set up this queue, or has not.
    pub fn add_queue(&mut self, queue: Option<(u16, [u64; 3])>) {
        let queue = queue.map(|(size, [descriptors, available, used])| Queue {
            size,
            descriptors,
            available,
            used,
            slot: 0,
            offered: 0,
            given: 0,
        });
        if let Some(queue) = queue {
            // Its rings begin with zeroes.
            for (at, bytes) in [(queue.available, 4), (queue.used, 4)] {
                self.write(at, &[0; 4][..bytes]);
            }
        }
        self.queues.push(queue);
    }

    /// The driver writes, where there is memory.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let Some(end) = at.checked_add(bytes.len() as u64).filter(|end| *end <= END) else { return };
        self.copy[at as usize..end as usize].copy_from_slice(bytes);
        self.memory.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// The driver writes over anything: where that is what the device alone writes, it can't be told any more what is whose.
    pub fn scribble(&mut self, at: u64, bytes: &[u8]) {
        let span = at..at.saturating_add(bytes.len() as u64);
        self.lost |= self.queues.iter().flatten().any(|queue| overlap(&used_span(queue), &span));
        self.write(at, bytes);
    }

    /// What the memory held when it was looked at last.
    #[must_use]
    pub fn read(&self, at: u64, count: usize) -> &[u8] {
        self.copy.get(at as usize..).and_then(|rest| rest.get(..count)).unwrap_or_default()
    }

    fn number<const N: usize>(&self, at: u64) -> [u8; N] {
        usize::try_from(at).ok().and_then(|at| self.copy.get(at..)?.first_chunk()).copied().unwrap_or([0; N])
    }

    /// Writes a descriptor of the table at `table`.
    pub fn descriptor(&mut self, table: u64, slot: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table.saturating_add(16 * u64::from(slot)), &bytes);
    }

    /// The queue, where it is enabled.
    #[must_use]
    pub fn queue(&self, index: u16) -> Option<Queue> {
        self.queues.get(usize::from(index)).copied().flatten()
    }

    fn queue_mut(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index)).and_then(Option::as_mut)
    }

    /// The next descriptor that the driver writes is this.
    pub fn set_slot(&mut self, index: u16, slot: u16) {
        if let Some(queue) = self.queue_mut(index) {
            queue.slot = slot % queue.size;
        }
    }

    /// Makes a chain available by its head.
    pub fn offer(&mut self, index: u16, head: u16) {
        let Some(queue) = self.queue(index) else { return };
        let place = u64::from(queue.offered % queue.size);
        self.write(queue.available + 4 + 2 * place, &head.to_le_bytes());
        self.jump(index, 1);
    }

    /// Moves the index of what is available.
    pub fn jump(&mut self, index: u16, by: u16) {
        let Some(queue) = self.queue_mut(index) else { return };
        queue.offered = queue.offered.wrapping_add(by);
        let (at, offered) = (queue.available + 2, queue.offered);
        self.write(at, &offered.to_le_bytes());
    }

    /// How many chains are available and not given back.
    #[must_use]
    pub fn outstanding(&self, index: u16) -> u16 {
        self.queue(index).map_or(0, |queue| queue.offered.wrapping_sub(queue.given))
    }

    /// Makes a chain of descriptors (address, length, whether the device writes) available, as a good driver does.
    pub fn chain(&mut self, index: u16, descriptors: &[(u64, u32, bool)]) {
        let Some(queue) = self.queue(index) else { return };
        let (head, mut slot) = (queue.slot, queue.slot);
        for (at, (address, length, writable)) in descriptors.iter().enumerate() {
            let next = (slot + 1) % queue.size;
            let more = if at + 1 < descriptors.len() { NEXT } else { 0 };
            let flags = if *writable { WRITE } else { 0 } | more;
            self.descriptor(queue.descriptors, slot, *address, *length, flags, next);
            slot = next;
        }
        self.set_slot(index, slot);
        self.offer(index, head);
    }

    /// The length of the chain that was given back last.
    #[must_use]
    pub fn last_used(&self, index: u16) -> Option<u32> {
        let queue = self.queue(index).filter(|queue| queue.given > 0)?;
        let place = u64::from(queue.given.wrapping_sub(1) % queue.size);
        Some(u32::from_le_bytes(self.number(queue.used + 8 + 8 * place)))
    }

    /// How many chains were given back.
    #[must_use]
    pub fn given(&self, index: u16) -> u16 {
        self.queue(index).map_or(0, |queue| queue.given)
    }

    /// Lets the device work, and looks at what it has changed. An idle device may change nothing.
    ///
    /// # Panics
    /// Where it has written what it was not given to write, or given back what it was not offered.
    pub fn watch<T>(&mut self, active: bool, work: impl FnOnce() -> T) -> T {
        let plan = if active { self.plan() } else { Plan::default() };
        self.lost |= plan.astray;
        let result = work();
        self.see_what_has_gone();
        if !self.lost {
            self.accept(plan);
        }
        self.turns += 1;
        if self.turns.is_multiple_of(LOOK_AFTER) {
            self.look();
        }
        result
    }

    /// Looks whether the memory holds what it should.
    ///
    /// # Panics
    /// Where it does not.
    pub fn look(&mut self) {
        self.memory.memory().read_slice(&mut self.scratch, GuestAddress(0)).unwrap();
        if self.lost {
            std::mem::swap(&mut self.copy, &mut self.scratch);
        } else if self.copy != self.scratch {
            let mut places = self.copy.iter().zip(&self.scratch);
            panic!("the device has written where it may not: {:#x?}", places.position(|(before, now)| before != now));
        }
    }

    /// Takes over what the device may have written, and checks what it has given back.
    fn accept(&mut self, plan: Plan) {
        let memory = self.memory.memory();
        for range in plan.writable {
            let place = &mut self.copy[range.start as usize..range.end as usize];
            memory.read_slice(place, GuestAddress(range.start)).unwrap();
        }
        let now = &self.copy;
        for (index, (queue, waiting)) in self.queues.iter_mut().zip(&plan.waiting).enumerate() {
            let Some(queue) = queue else { continue };
            let given = u16::from_le_bytes(*now[queue.used as usize + 2..].first_chunk().unwrap());
            let count = given.wrapping_sub(queue.given);
            assert!(
                usize::from(count) <= waiting.len(),
                "queue {index}: more was given back than was offered: {count}"
            );
            let checked = if self.keeps == Some(index) { 0 } else { usize::from(count) };
            for (nth, (head, room)) in waiting.iter().enumerate().take(checked) {
                let place = u64::from(queue.given.wrapping_add(nth as u16) % queue.size);
                let entry = (queue.used + 4 + 8 * place) as usize;
                let entry = u64::from_le_bytes(*now[entry..].first_chunk().unwrap());
                assert_eq!(entry & 0xffff_ffff, u64::from(*head), "queue {index}: not the chain that was next");
                assert!(entry >> 32 <= *room, "queue {index}: {} bytes in a chain of {room}", entry >> 32);
            }
            queue.given = given;
        }
    }

    fn plan(&self) -> Plan {
        let mut plan = Plan::default();
        for queue in &self.queues {
            let mut waiting = Vec::new();
            if let Some(queue) = queue {
                self.plan_queue(queue, &mut plan, &mut waiting);
            }
            plan.waiting.push(waiting);
        }
        let mut used: Vec<_> = self.queues.iter().flatten().map(used_span).collect();
        let count = used.len();
        join(&mut used);
        join(&mut plan.read);
        join(&mut plan.writable);
        // What the device writes into a ring of what is used must stay what it has written, to be looked at.
        plan.astray |= used.len() < count || meet(&plan.writable, &used);
        plan.astray |= meet(&plan.writable, &plan.read) || meet(&used, &plan.read);
        plan.writable.extend(used);
        join(&mut plan.writable);
        plan
    }

    fn plan_queue(&self, queue: &Queue, plan: &mut Plan, waiting: &mut Vec<(u16, u64)>) {
        let size = u64::from(queue.size);
        plan.read.push(queue.descriptors..queue.descriptors + 16 * size);
        plan.read.push(queue.available..queue.available + 6 + 2 * size);
        let count = u16::from_le_bytes(self.number(queue.available + 2)).wrapping_sub(queue.given);
        if count > queue.size {
            // The device will say so.
            plan.astray = true;
            return;
        }
        // A ring whose index has jumped holds the same chains again and again.
        let mut rooms = BTreeMap::new();
        for nth in 0..count {
            let place = u64::from(queue.given.wrapping_add(nth) % queue.size);
            let head = u16::from_le_bytes(self.number(queue.available + 4 + 2 * place));
            let plan_it = || self.plan_chain(queue.descriptors, queue.size.into(), head, true, plan);
            let room = *rooms.entry(head).or_insert_with(plan_it);
            waiting.push((head, room));
        }
    }

    /// What of a chain may be written. It is followed further than a device may, never less far.
    fn plan_chain(&self, table: u64, entries: u64, head: u16, outer: bool, plan: &mut Plan) -> u64 {
        let (mut room, mut slot) = (0, head);
        for _ in 0..entries.min(1025) {
            self.effort.set(self.effort.get() + 1);
            if u64::from(slot) >= entries {
                break;
            }
            let at = table.saturating_add(16 * u64::from(slot));
            let address = u64::from_le_bytes(self.number(at));
            let length = u64::from(u32::from_le_bytes(self.number(at.saturating_add(8))));
            let flags = u16::from_le_bytes(self.number(at.saturating_add(12)));
            let range = address.min(END)..address.saturating_add(length).min(END);
            if flags & INDIRECT != 0 {
                if outer {
                    plan.read.push(range);
                    room += self.plan_chain(address, length / 16, 0, false, plan);
                }
            } else if flags & WRITE != 0 {
                room += length;
                plan.writable.push(range);
            }
            if flags & NEXT == 0 {
                break;
            }
            slot = u16::from_le_bytes(self.number(at.saturating_add(14)));
        }
        room
    }
}

/// From the first byte of a queue's rings to the last.
fn rings_span(queue: &Queue) -> Range<u64> {
    let size = u64::from(queue.size);
    let starts = [queue.descriptors, queue.available, queue.used];
    let ends = [queue.descriptors + 16 * size, queue.available + 6 + 2 * size, queue.used + 6 + 8 * size];
    starts.into_iter().min().unwrap_or(0)..ends.into_iter().max().unwrap_or(0)
}

fn used_span(queue: &Queue) -> Range<u64> {
    queue.used..queue.used + 6 + 8 * u64::from(queue.size)
}

/// Sorts ranges, and makes one of those that meet.
fn join(ranges: &mut Vec<Range<u64>>) {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let meet = next.start < last.end;
        last.end = last.end.max(if meet { next.end } else { 0 });
        meet
    });
}

/// Whether any of these ranges overlap any of those. All of them are sorted and apart.
fn meet(these: &[Range<u64>], those: &[Range<u64>]) -> bool {
    these.iter().any(|one| {
        let at = those.partition_point(|other| other.end <= one.start);
        those.get(at).is_some_and(|other| overlap(one, other))
    })
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

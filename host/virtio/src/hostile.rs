//! A driver that means harm, for tests: rings that look valid, with fields that are not.
//!
//! It is random but the same at each run. What it must not achieve: a panic, a turn without end, memory without bound.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::device::{Broken, Device, EVENT_IDX, Memory, Turn};
use crate::driver::{DATA, Driver, END, INDIRECT, NEXT, SEAM, WRITE, activation, memory, poke};

/// The allocator of the tests, which counts what a thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    HELD.set(HELD.get() + bytes);
    PEAK.set(PEAK.get().max(HELD.get()));
}

#[expect(unsafe_code, reason = "an allocator is unsafe by declaration")]
// SAFETY: every call goes on to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size().cast_signed());
        // SAFETY: the caller's promises are the system's allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-layout.size().cast_signed());
        // SAFETY: the caller's promises are the system's allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that the thread held at once during `work`, beyond what it held before.
pub(crate) fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    PEAK.set(before);
    let result = work();
    (result, usize::try_from(PEAK.get() - before).unwrap_or(0))
}

/// Numbers that look random and are the same at each run (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    /// A number of the range.
    pub(crate) fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// One of these.
    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.within(0..all.len() as u64) as usize]
    }

    /// True once in so many times.
    pub(crate) fn once_in(&mut self, times: u64) -> bool {
        self.within(0..times) == 0
    }
}

/// Who writes a queue's chains.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    Driver,
    Device,
    /// The driver the first part, the device the rest.
    Both,
}

/// What is to be tormented.
pub(crate) struct Victim<'a> {
    pub(crate) device: Box<dyn Device>,
    pub(crate) features: u64,
    /// How a chain of a queue looks that makes sense.
    pub(crate) shape: fn(u16) -> Shape,
    /// How long its descriptors are, mostly.
    pub(crate) lengths: &'a [u32],
    /// What a request of this device begins with, well or badly formed.
    pub(crate) header: &'a dyn Fn(&mut Random) -> Vec<u8>,
    /// What happens on the host's side meanwhile.
    pub(crate) host: &'a mut dyn FnMut(&mut Random),
    /// The most bytes that a turn may hold at once.
    pub(crate) memory_max: usize,
    /// The most bytes that a turn may move.
    pub(crate) moved_max: u64,
}

/// Lets the other thread end, also where this one panics.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Rings {
    drivers: Vec<Driver>,
    /// By their indices.
    enabled: usize,
}

impl Victim<'_> {
    /// Torments the device so many times.
    pub(crate) fn torment(mut self, seed: u64, times: usize) {
        let memory = memory();
        let mut random = Random(seed);
        let mut rings = self.activate(&memory, &mut random);
        let (mut broken, mut turns) = (0, 0_usize);
        for _ in 0..times {
            let index = random.within(0..rings.enabled as u64) as u16;
            self.scribble(&memory, index, &mut rings.drivers[usize::from(index)], &mut random);
            (self.host)(&mut random);
            if random.once_in(100) {
                self.device.reset();
                rings = self.activate(&memory, &mut random);
                continue;
            }
            // A chain that is given back takes a turn at most, and nothing else is offered meanwhile.
            let turns_max = 2 * rings.drivers.iter().map(|driver| usize::from(driver.outstanding().1)).sum::<usize>();
            let mut left = turns_max;
            loop {
                let event = random.once_in(2).then(|| if random.once_in(8) { random.next() as u16 } else { index / 2 });
                turns += 1;
                match self.turn(index, event) {
                    Ok(Turn::Done) => break,
                    Ok(Turn::More) => {}
                    Err(_) => {
                        broken += 1;
                        self.device.reset();
                        rings = self.activate(&memory, &mut random);
                        break;
                    }
                }
                left -= 1;
                assert!(left > 0, "the device turns without end");
            }
            // Where the guest lets a device write over the rings, it has itself to blame for what is in them.
            if rings.drivers.iter().all(|driver| driver.honest) {
                for driver in &mut rings.drivers {
                    driver.used();
                    let (outstanding, size) = driver.outstanding();
                    assert!(outstanding <= size, "more was given back than was offered");
                }
            }
        }
        println!(
            "{}: {times} times, {turns} turns, broken {broken} times, {:?}",
            self.device.name(),
            self.device.counters()
        );
        assert!(broken > 0 && broken < times / 2, "the torment is of one kind only: broken {broken} times");
    }

    /// Torments it while another thread of the guest changes everything.
    pub(crate) fn torment_while_it_changes(mut self, seed: u64, times: usize) {
        let memory = memory();
        let mut random = Random(seed);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random(!seed);
                while !over.load(Ordering::Relaxed) {
                    // Mostly descriptors, sometimes the rings' indices.
                    let queue = random.within(0..3) * 0x2000;
                    let at = if random.once_in(64) { 0x1000 + random.within(0..0x10) } else { random.within(0..0x100) };
                    let value = random.of(&[0, 1, 2, 3, 7, 0xff, 0x10]);
                    poke(&memory, queue + at, &[value]);
                }
            });
            let _over = Ends(&over);
            let mut rings = self.activate(&memory, &mut random);
            for _ in 0..times {
                let index = random.within(0..rings.enabled as u64) as u16;
                self.scribble(&memory, index, &mut rings.drivers[usize::from(index)], &mut random);
                (self.host)(&mut random);
                if self.turn(index, None).is_err() {
                    self.device.reset();
                    rings = self.activate(&memory, &mut random);
                }
            }
        });
    }

    fn turn(&mut self, queue: u16, source: Option<u16>) -> Result<Turn, Broken> {
        let before = self.device.counters();
        let device = &mut self.device;
        let (result, held) = peak(|| match source {
            // The doorbell comes as well: what a source's turn has left is not the queue's.
            Some(token) => device.on_source(token).and_then(|_| device.on_queue(queue)),
            None => device.on_queue(queue),
        });
        assert!(held <= self.memory_max, "a turn held {held} bytes");
        let after = self.device.counters();
        let moved = after.bytes_in + after.bytes_out - before.bytes_in - before.bytes_out;
        let turns = if source.is_some() { 2 } else { 1 };
        assert!(moved <= turns * self.moved_max, "a turn moved {moved} bytes");
        result
    }

    /// Activates the device with all its queues, most of the time.
    fn activate(&mut self, memory: &Memory, random: &mut Random) -> Rings {
        loop {
            let sizes = self.device.queue_sizes().to_vec();
            let size = |max: &u16, random: &mut Random| random.of(&[1, 2, 4, 16, 64, 64, 256, 256]).min(*max);
            let drivers: Vec<_> =
                (0..).zip(&sizes).map(|(index, max)| Driver::new(memory, index, size(max, random))).collect();
            let event_idx = random.once_in(2);
            let mut rings: Vec<_> = drivers.iter().map(|driver| Some(driver.ring(event_idx))).collect();
            if random.once_in(16) {
                let missing = random.within(0..rings.len() as u64) as usize;
                rings[missing] = None;
            }
            let features = self.features & if random.once_in(4) { random.next() } else { u64::MAX };
            let features = features | if event_idx { EVENT_IDX } else { 0 };
            if self.device.activate(activation(memory, features, rings)).is_ok() {
                return Rings { enabled: drivers.len(), drivers };
            }
            self.device.reset();
        }
    }

    fn length(&self, random: &mut Random) -> u32 {
        match random.within(0..256) {
            0..2 => u32::MAX - random.within(0..3) as u32,
            2..4 => random.next() as u32 & 0x1f_ffff,
            4..6 => 65562 + random.within(0..3) as u32,
            6..24 => random.of(&[0, 1, 2, 10, 11, 12, 13, 15, 16, 17, 20, 26, 60, 511, 513, 1526, 8192]),
            _ => random.of(self.lengths),
        }
    }

    /// Offers some chains. Each looks like a request at first, then fields of it are changed.
    fn scribble(&self, memory: &Memory, queue: u16, driver: &mut Driver, random: &mut Random) {
        let shape = if random.once_in(32) { Shape::Both } else { (self.shape)(queue) };
        let (outstanding, size) = driver.outstanding();
        let free = size.saturating_sub(outstanding);
        let chains = random.of(&[1, 1, 1, 2, 3, 8]).min(free);
        let mut slot = if random.once_in(32) { random.within(0..u64::from(size)) as u16 } else { driver.slot };
        for _ in 0..chains {
            let head = slot;
            let count = random.of(&[1, 2, 2, 3, 3, 4, 9, 40]).min(size);
            let readable = match shape {
                Shape::Driver => count,
                Shape::Device => 0,
                Shape::Both if random.once_in(4) => random.within(0..u64::from(count) + 1) as u16,
                Shape::Both => random.of(&[1, count - 1]),
            };
            let table = random.once_in(4).then(|| DATA + 16 * random.within(0..64));
            for index in 0..count {
                let (at, next) = if table.is_some() { (index, index + 1) } else { (slot, (slot + 1) % size) };
                let more = if index + 1 < count { NEXT } else { 0 };
                let mut flags = more | if index < readable { 0 } else { WRITE };
                let (mut address, mut length, mut next) = (place(random), self.length(random), next);
                if index == 0 && readable > 0 {
                    let header = (self.header)(random);
                    address = DATA + 0x1000 + 0x100 * random.within(0..64);
                    poke(memory, address, &header);
                    length = if random.once_in(8) { length } else { header.len() as u32 };
                }
                if more == 0 && readable < count && !random.once_in(4) {
                    length = 1;
                }
                match random.within(0..160) {
                    0 => address = random.next(),
                    1 => flags = random.next() as u16 & 7,
                    2 => next = random.next() as u16 % (size * 2),
                    3 => length = random.next() as u32,
                    4 => flags |= NEXT,
                    5 => flags ^= WRITE,
                    _ => {}
                }
                driver.honest &= address >= DATA;
                match table {
                    Some(table) => driver.indirect(table, at, address, length, flags, next),
                    None => driver.table(at, address, length, flags, next),
                }
                slot = if table.is_some() { slot } else { next % size };
            }
            if let Some(table) = table {
                let entries = if random.once_in(32) { random.within(0..0x2_0000) as u32 } else { u32::from(count) };
                driver.table(head, table, 16 * entries, INDIRECT | random.of(&[0, 0, 0, NEXT, WRITE]), head);
                slot = (head + 1) % size;
            }
            driver.offer(if random.once_in(400) { random.next() as u16 % (size * 2) } else { head });
        }
        driver.slot = slot % size;
        if random.once_in(400) {
            driver.jump(random.next() as u16);
        }
        driver.want_interrupt_after(random.of(&[0, 1, 2, u16::MAX]));
    }
}

/// Where a descriptor points to: mostly data, sometimes what must not be touched, or what is the device's own to write.
fn place(random: &mut Random) -> u64 {
    match random.within(0..200) {
        0 => u64::MAX - random.within(0..3),
        1 => END - random.within(0..3),
        2 => END + random.within(0..0x1000),
        3 if random.once_in(4) => random.within(0..DATA),
        4..20 => SEAM - random.within(0..600),
        _ => DATA + 0x8000 + random.within(0..0x1_0000),
    }
}

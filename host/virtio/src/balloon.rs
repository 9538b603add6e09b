//! The memory balloon (virtio 1.3, section 5.5): the guest tells which of its memory it does not use, and the host takes it back: what the
//! guest's kernel reports as free, and so many pages as the host asks for, of which the guest takes back what it can't do without.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use vm_memory::{GuestAddressSpace, GuestMemoryMmap, VolatileSlice};

use crate::chain::{Slices, walk};
use crate::device::{Activation, Broken, Counters, Device, Memory, Turn};
use crate::drain::{Budget, Served, drain};
use crate::reclaim::{self, PAGE_BYTES};
use crate::ring::{Chain, Ring};

/// `VIRTIO_BALLOON_F_STATS_VQ`, `_DEFLATE_ON_OOM`, `_REPORTING`.
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

/// The queues in the order in which drivers number those that were agreed upon.
const QUEUES: [Queue; 4] = [Queue::Inflate, Queue::Deflate, Queue::Stats, Queue::Reporting];
const SIZES: [u16; 4] = [128; 4];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// The most page numbers of one chain that are looked at: what Linux puts into one.
const NUMBERS_MAX: usize = 256;
/// The most figures of one report.
const FIGURES_MAX: usize = 32;
/// Bytes of a figure: its kind, and its value.
const FIGURE_BYTES: usize = 10;
const BUDGET: Budget = Budget { chains: 32, bytes: 256 << 20 };

/// Bytes of the configuration that there are with these features: pages that the host wants, pages that it has.
const CONFIG_BYTES: usize = 8;
const WANTED_AT: usize = 0;
const ACTUAL_AT: usize = 4;

/// What the guest says of its memory (section 5.5.6.3.1), each as it says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Figures {
    /// Bytes that nothing uses (`VIRTIO_BALLOON_S_MEMFREE`).
    free: u64,
    /// Bytes of all memory that it has (`VIRTIO_BALLOON_S_MEMTOT`).
    total: u64,
    /// Bytes that programs could have without swapping (`VIRTIO_BALLOON_S_AVAIL`).
    available: u64,
    /// Bytes of files' contents (`VIRTIO_BALLOON_S_CACHES`).
    caches: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Balloon {
    /// How many there are for whom all of the guest's memory must stay where it is.
    held: Arc<AtomicUsize>,
    config: [u8; CONFIG_BYTES],
    /// The kind of each ring is that of its place among those that were agreed upon.
    rings: Vec<(Queue, Option<Ring>)>,
    memory: Option<Memory>,
    /// A report of the guest's that is kept until figures are wanted (section 5.5.6.3).
    report: Option<Chain>,
    figures: Option<Figures>,
    counters: Counters,
}

impl Balloon {
    /// An empty one, which takes nothing while `held` is not 0: somebody needs all of the guest's memory where it is.
    #[must_use]
    pub fn new(held: Arc<AtomicUsize>) -> Self {
        Self {
            held,
            config: [0; CONFIG_BYTES],
            rings: Vec::new(),
            memory: None,
            report: None,
            figures: None,
            counters: Counters::default(),
        }
    }

    /// A number of pages of the configuration.
    fn pages(&self, at: usize) -> u64 {
        let bytes = self.config.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_le_bytes(bytes.unwrap_or_default()).into()
    }

    fn set_config(&mut self, at: usize, pages: u32) {
        if let Some(place) = self.config.get_mut(at..at + 4) {
            place.copy_from_slice(&pages.to_le_bytes());
        }
    }

    /// What the guest has last said of its memory, which may be anything; none where it has said nothing. It is asked to say it again.
    fn ask_for_figures(&mut self) -> Result<Option<Figures>, Broken> {
        let ring = self.rings.iter_mut().find(|(queue, _)| *queue == Queue::Stats).and_then(|(_, ring)| ring.as_mut());
        if let (Some(ring), Some(report)) = (ring, self.report.take()) {
            ring.push(report.head_index(), 0)?;
            ring.signal()?;
        }
        Ok(self.figures)
    }
}

/// Takes the pages behind each number of a chain.
fn inflate(memory: &GuestMemoryMmap, numbers: &mut Slices<'_>) -> u64 {
    let mut taken = 0;
    let mut run: Option<(u64, u64)> = None;
    let mut take = |(first, count): (u64, u64)| {
        if reclaim::discard(memory, first * PAGE_BYTES, count * PAGE_BYTES).is_ok() {
            taken += count;
        }
    };
    for _ in 0..NUMBERS_MAX {
        let mut number = [0; 4];
        if !numbers.take(&mut number) {
            break;
        }
        let number = u64::from(u32::from_le_bytes(number));
        // What follows each other goes at once, in either direction.
        run = Some(match run {
            Some((first, count)) if first + count == number => (first, count + 1),
            Some((first, count)) if number + 1 == first => (number, count + 1),
            Some(other) => {
                take(other);
                (number, 1)
            }
            None => (number, 1),
        });
    }
    run.map(take);
    taken
}

/// Takes what a report of free pages covers.
fn take_reported(pieces: &[VolatileSlice<'_>], memory: &GuestMemoryMmap) -> u64 {
    let mut taken = 0;
    for piece in pieces {
        let place = piece.ptr_guard().as_ptr();
        let Some(address) = reclaim::address_of(memory, place) else { continue };
        if reclaim::discard(memory, address, piece.len() as u64).is_ok() {
            taken += piece.len() as u64 / PAGE_BYTES;
        }
    }
    taken
}

fn read_figures(report: &mut Slices<'_>, figures: &mut Figures) {
    for _ in 0..FIGURES_MAX {
        let mut bytes = [0; FIGURE_BYTES];
        if !report.take(&mut bytes) {
            return;
        }
        let [low, high, value @ ..] = bytes;
        let value = u64::from_le_bytes(value);
        match u16::from_le_bytes([low, high]) {
            4 => figures.free = value,
            5 => figures.total = value,
            6 => figures.available = value,
            7 => figures.caches = value,
            _ => {}
        }
    }
}

impl Device for Balloon {
    fn name(&self) -> &'static str {
        "balloon"
    }

    fn id(&self) -> u16 {
        5
    }

    fn features(&self) -> u64 {
        STATS_VQ | DEFLATE_ON_OOM | REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    /// The guest says how many pages the host has.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == ACTUAL_AT
            && data.len() == 4
            && let Some(place) = self.config.get_mut(ACTUAL_AT..)
        {
            place.copy_from_slice(data);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let Activation { features, memory, rings } = activation;
        let agreed = QUEUES.into_iter().filter(|queue| match queue {
            Queue::Stats => features & STATS_VQ != 0,
            Queue::Reporting => features & REPORTING != 0,
            Queue::Inflate | Queue::Deflate => true,
        });
        self.rings = agreed.zip(rings).collect();
        self.memory = Some(memory);
        Ok(())
    }

    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken> {
        let Some((kind, Some(ring))) = self.rings.get_mut(usize::from(queue)) else { return Ok(Turn::Done) };
        let (kind, Some(memory)) = (*kind, &self.memory) else { return Ok(Turn::Done) };
        if kind == Queue::Stats {
            return self.take_report(queue);
        }
        let (counters, memory) = (&mut self.counters, memory.memory());
        let is_held = self.held.load(Ordering::Acquire) > 0;
        drain(ring, BUDGET, |chain| {
            counters.operations_out += 1;
            let Ok(mut buffers) = walk(chain, chain.memory()) else {
                counters.errors += 1;
                return Ok(Served::default());
            };
            let pages = match kind {
                // A guest that does not believe it loses nothing by that.
                _ if is_held => 0,
                Queue::Inflate => inflate(&memory, &mut buffers.readable),
                Queue::Reporting => take_reported(buffers.writable.pieces(), &memory),
                // What the guest takes back is there when it touches it.
                Queue::Deflate | Queue::Stats => 0,
            };
            let bytes = pages * PAGE_BYTES;
            counters.bytes_out += bytes;
            Ok(Served { written: 0, moved: usize::try_from(bytes).unwrap_or(usize::MAX) })
        })
    }

    /// What the host asks for it asks of the next driver, too; that one has given nothing yet.
    fn reset(&mut self) {
        self.rings.clear();
        (self.memory, self.report, self.figures) = (None, None, None);
        self.set_config(ACTUAL_AT, 0);
    }

    fn resize(&mut self, bytes: u64) -> std::io::Result<()> {
        let pages = u32::try_from(bytes / PAGE_BYTES).map_err(|_| std::io::ErrorKind::InvalidInput)?;
        self.set_config(WANTED_AT, pages);
        Ok(())
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), Broken> {
        // What the host wants of the guest, and what that has said that the host has.
        self.config = saved.try_into().map_err(|_| Broken::new("that is no balloon's configuration"))?;
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.counters
    }

    fn figures(&mut self) -> Result<Vec<(&'static str, u64)>, Broken> {
        let mut named = vec![("balloon_bytes", self.pages(ACTUAL_AT) * PAGE_BYTES)];
        if let Some(Figures { free, total, available, caches }) = self.ask_for_figures()? {
            named.extend([
                ("guest_memory_free_bytes", free),
                ("guest_memory_total_bytes", total),
                ("guest_memory_available_bytes", available),
                ("guest_memory_caches_bytes", caches),
            ]);
        }
        Ok(named)
    }
}

impl Balloon {
    /// Reads a report, and keeps its chain until the next is wanted. A driver has one under way; what it gives beside that it gets back.
    fn take_report(&mut self, queue: u16) -> Result<Turn, Broken> {
        let Some((_, Some(ring))) = self.rings.get_mut(usize::from(queue)) else { return Ok(Turn::Done) };
        for _ in 0..BUDGET.chains {
            let Some(chain) = ring.pop()? else {
                // For what the guest has added before it sees this it does not ring.
                if ring.listen()? {
                    continue;
                }
                return Ok(Turn::Done);
            };
            self.counters.operations_out += 1;
            match walk(&chain, chain.memory()) {
                Ok(mut buffers) => read_figures(&mut buffers.readable, self.figures.get_or_insert_default()),
                Err(_) => self.counters.errors += 1,
            }
            if let Some(before) = self.report.replace(chain) {
                ring.push(before.head_index(), 0)?;
                ring.signal()?;
            }
        }
        Ok(Turn::More)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::driver::{DATA, Driver, SEAM, activation, memory, peek, poke};
    use crate::hostile::{Shape, Victim};

    const ALL: u64 = STATS_VQ | DEFLATE_ON_OOM | REPORTING;

    fn running(features: u64, count: u16) -> (Balloon, Vec<Driver>, Memory) {
        let memory = memory();
        let drivers: Vec<_> = (0..count).map(|index| Driver::new(&memory, index, 64)).collect();
        let rings = drivers.iter().map(|driver| Some(driver.ring(false))).collect();
        let mut balloon = Balloon::new(Arc::default());
        balloon.activate(activation(&memory, features, rings)).unwrap();
        (balloon, drivers, memory)
    }

    fn is_there(memory: &Memory, page: u64) -> bool {
        memory.memory().read_obj::<u8>(GuestAddress(page * PAGE_BYTES)).unwrap() == 0x77
    }

    /// Pages that hold something, from the middle of the memory on.
    fn fill(memory: &Memory) -> u64 {
        let first = SEAM / PAGE_BYTES - 4;
        for page in first..first + 8 {
            poke(memory, page * PAGE_BYTES, &[0x77; 4096]);
        }
        first
    }

    #[test]
    fn pages_by_their_numbers_go_and_come_back_empty() {
        let (mut balloon, mut drivers, memory) = running(DEFLATE_ON_OOM, 2);
        let first = fill(&memory);
        // A run upwards over the border of two regions, one downwards, one that is nowhere.
        let numbers: Vec<u32> = [3, 4, 1, 0].iter().map(|page| u32::try_from(first + page).unwrap()).collect();
        let numbers: Vec<u8> = numbers.into_iter().chain([u32::MAX]).flat_map(u32::to_le_bytes).collect();
        poke(&memory, DATA, &numbers);
        drivers[0].chain(&[(DATA, u32::try_from(numbers.len()).unwrap(), false)]);
        assert_eq!(balloon.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(drivers[0].used(), [(0, 0)]);
        let there: Vec<bool> = (first..first + 8).map(|page| is_there(&memory, page)).collect();
        assert_eq!(there, [false, false, true, false, false, true, true, true]);
        assert_eq!(balloon.counters().bytes_out, 4 * PAGE_BYTES);
        drivers[1].chain(&[(DATA, 8, false)]);
        assert_eq!(balloon.on_queue(1).unwrap(), Turn::Done);
        assert_eq!(drivers[1].used(), [(0, 0)]);
        balloon.write_config(ACTUAL_AT, &[4, 0, 0, 0]);
        balloon.write_config(0, &[9, 9, 9, 9]);
        assert_eq!(balloon.config(), [0, 0, 0, 0, 4, 0, 0, 0]);
    }

    #[test]
    fn what_the_host_asks_for_it_asks_of_the_next_driver_too() {
        let (mut balloon, _, _) = running(ALL, 4);
        balloon.resize(9 * PAGE_BYTES + 1).unwrap();
        balloon.write_config(ACTUAL_AT, &[4, 0, 0, 0]);
        assert_eq!(balloon.config(), [9, 0, 0, 0, 4, 0, 0, 0]);
        assert_eq!(balloon.figures().unwrap(), [("balloon_bytes", 4 * PAGE_BYTES)]);
        balloon.reset();
        assert_eq!(balloon.config(), [9, 0, 0, 0, 0, 0, 0, 0]);
        assert!(balloon.resize(PAGE_BYTES << 32).is_err());
    }

    #[test]
    fn nothing_goes_while_all_must_stay() {
        let held = Arc::new(AtomicUsize::new(1));
        let (mut balloon, mut drivers, memory) = running(ALL, 4);
        balloon.held = Arc::clone(&held);
        let first = fill(&memory);
        for stays in [true, false] {
            held.store(usize::from(stays), Ordering::Relaxed);
            drivers[3].chain(&[(first * PAGE_BYTES, 4096, true)]);
            assert_eq!(balloon.on_queue(3).unwrap(), Turn::Done);
            assert_eq!(drivers[3].used().len(), 1);
            assert_eq!(is_there(&memory, first), stays);
        }
    }

    #[test]
    fn reported_pages_go_whole_ones_only() {
        // Without the queue of figures, reports come on the one before.
        for (features, queue) in [(ALL, 3), (REPORTING, 2)] {
            let (mut balloon, mut drivers, memory) = running(features, 4);
            let first = fill(&memory);
            let at = |page: u64| (first + page) * PAGE_BYTES;
            drivers[queue].chain(&[(at(0), 4096, true), (at(2) + 8, 2 * 4096, true), (at(6), 4096, true)]);
            assert_eq!(balloon.on_queue(u16::try_from(queue).unwrap()).unwrap(), Turn::Done);
            assert_eq!(drivers[queue].used(), [(0, 0)]);
            let there: Vec<bool> = (first..first + 8).map(|page| is_there(&memory, page)).collect();
            assert_eq!(there, [false, true, true, false, true, true, false, true]);
        }
    }

    #[test]
    fn a_guest_that_rings_only_when_it_is_asked_to_is_heard() {
        let memory = memory();
        let mut drivers: Vec<_> = (0..4).map(|index| Driver::new(&memory, index, 64)).collect();
        let rings = drivers.iter().map(|driver| Some(driver.ring(true))).collect();
        let mut balloon = Balloon::new(Arc::default());
        balloon.activate(activation(&memory, ALL, rings)).unwrap();
        for report in 1..4 {
            drivers[2].chain(&[(DATA, 10, false)]);
            assert_eq!(balloon.on_queue(2).unwrap(), Turn::Done);
            assert_eq!(drivers[2].wants_doorbell_after(), report);
        }
    }

    #[test]
    fn figures_are_kept_and_asked_for_again() {
        let (mut balloon, mut drivers, memory) = running(ALL, 4);
        assert_eq!(balloon.ask_for_figures().unwrap(), None);
        let figure = |kind: u16, value: u64| [kind.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat();
        let report = [figure(4, 1000), figure(5, 9000), figure(99, 1), figure(6, 2000), figure(7, 500)].concat();
        poke(&memory, DATA, &report);
        drivers[2].chain(&[(DATA, u32::try_from(report.len()).unwrap(), false)]);
        assert_eq!(balloon.on_queue(2).unwrap(), Turn::Done);
        assert_eq!(drivers[2].used(), [], "it is kept");
        let expected = Figures { free: 1000, total: 9000, available: 2000, caches: 500 };
        assert_eq!(balloon.ask_for_figures().unwrap(), Some(expected));
        assert_eq!(drivers[2].used(), [(0, 0)]);
        assert!(drivers[2].interrupted());
        // Two at a time: the first one is given back.
        drivers[2].chain(&[(DATA, 10, false)]);
        drivers[2].chain(&[(DATA + 10, 10, false)]);
        assert_eq!(balloon.on_queue(2).unwrap(), Turn::Done);
        assert_eq!(drivers[2].used(), [(1, 0)]);
        balloon.reset();
        assert_eq!(balloon.ask_for_figures().unwrap(), None);
        assert_eq!(peek(&memory, DATA, 2), [4, 0]);
    }

    fn victim() -> Victim<'static> {
        Victim {
            device: Box::new(Balloon::new(Arc::default())),
            features: ALL,
            shape: |queue| if queue == 3 { Shape::Device } else { Shape::Driver },
            lengths: &[4, 10, 100, 4096, 0x1_0000],
            header: &|random| random.next().to_le_bytes().to_vec(),
            host: Box::leak(Box::new(|_| {})),
            // A chain of pieces as many as there may be, while their list grows.
            memory_max: 128 << 10,
            moved_max: BUDGET.bytes as u64 + (4 << 20),
        }
    }

    #[test]
    fn a_hostile_driver_gets_nowhere() {
        victim().torment(4, 20_000);
    }

    #[test]
    fn a_driver_that_changes_its_rings_gets_nowhere() {
        victim().torment_while_it_changes(4, 5_000);
    }
}

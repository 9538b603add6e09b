//! The memory device (virtio 1.3, section 5.15): a region of the guest's address space, of which the guest uses as many blocks as the host
//! lets it. What it gives back goes back to the host at once.

use std::mem;
use std::ops::Range;

use vm_memory::GuestAddressSpace;

use crate::chain::{Slices, walk};
use crate::device::{Activation, Broken, Counters, Device, Memory, Turn};
use crate::drain::{Budget, Served, drain};
use crate::reclaim::{self, PAGE_BYTES};
use crate::ring::Ring;

/// The unit in which memory comes and goes where nothing else is asked for: one large page of x86.
pub const BLOCK_BYTES: u64 = 2 << 20;

const SIZES: [u16; 1] = [64];
/// A request may empty gigabytes, which takes the kernel a while: one, and the others have their turn.
const BUDGET: Budget = Budget { chains: 64, bytes: 1 << 30 };

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the guest leaves alone what it has not.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a request and of its answer (section 5.15.6).
const REQUEST_BYTES: usize = 24;
const ANSWER_BYTES: usize = 10;

/// Bytes of the configuration (section 5.15.4), and where the fields that change are.
const CONFIG_BYTES: usize = 56;
const PLUGGED_AT: usize = 40;
const REQUESTED_AT: usize = 48;

/// Kinds of request.
mod kind {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// What a request gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum Answer {
    Ack = 0,
    Nack = 1,
    Busy = 2,
    Error = 3,
}

/// What [`kind::STATE`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
enum State {
    Plugged = 0,
    Unplugged = 1,
    Mixed = 2,
}

/// Who has to know which of its memory the guest uses.
pub trait Observer: Send {
    /// The guest is to use a block, by its address.
    ///
    /// # Errors
    /// Where it can't: then it does not.
    fn gains(&mut self, start: u64, bytes: u64) -> std::io::Result<()>;

    /// The guest has given a block back, and nobody else may use it from now on.
    ///
    /// # Errors
    /// Where somebody still does: then it stays the guest's.
    fn loses(&mut self, start: u64, bytes: u64) -> std::io::Result<()>;

    /// The guest uses so many bytes now.
    fn uses(&mut self, bytes: u64);
}

/// See the module.
pub struct Mem {
    start: u64,
    block: u64,
    /// Whether the guest uses it, of each block.
    plugged: Vec<bool>,
    count: usize,
    requested: u64,
    config: [u8; CONFIG_BYTES],
    observer: Box<dyn Observer>,
    running: Option<(Ring, Memory)>,
    counters: Counters,
}

impl Mem {
    /// Over the guest's memory from `start` on, as many whole blocks of `block` bytes as `bytes` has. The guest is to use none at first.
    ///
    /// # Errors
    /// Where it does not start at a block's multiple, or has none, or a block is no power of two of a page at least.
    pub fn new(start: u64, bytes: u64, block: u64, observer: Box<dyn Observer>) -> Result<Self, Broken> {
        let is_unit = block.is_power_of_two() && block >= PAGE_BYTES;
        let count = bytes.checked_div(block).and_then(|count| usize::try_from(count).ok()).unwrap_or(0);
        if !is_unit || count == 0 || !start.is_multiple_of(block) || start.checked_add(bytes).is_none() {
            return Err(Broken(format!(
                "a memory device can't have {bytes} bytes from {start:#x} on in blocks of {block}"
            )));
        }
        let mut config = [0; CONFIG_BYTES];
        let region = count as u64 * block;
        // Block size, (node), address, size of the region, of what is usable of it.
        for (at, value) in [(0, block), (16, start), (24, region), (32, region)] {
            set(&mut config, at, value);
        }
        let (plugged, counters) = (vec![false; count], Counters::default());
        Ok(Self { start, block, plugged, count: 0, requested: 0, config, observer, running: None, counters })
    }

    /// The blocks that a request means; none where they are not all the device's.
    fn blocks(&self, request: &[u8; REQUEST_BYTES]) -> Option<Range<usize>> {
        let [_, _, _, _, _, _, _, _, address @ .., _, _, _, _, _, _, _, _] = request;
        let [a, b, c, d, e, f, g, h] = *address;
        let (offset, block) = (u64::from_le_bytes([a, b, c, d, e, f, g, h]).checked_sub(self.start)?, self.block);
        let [.., low, high, _, _, _, _, _, _] = *request;
        let count = usize::from(u16::from_le_bytes([low, high]));
        let first = usize::try_from(offset / block).ok().filter(|_| offset.is_multiple_of(block))?;
        let range = first..first.checked_add(count)?;
        self.plugged.get(range.clone()).filter(|blocks| !blocks.is_empty()).map(|_| range)
    }

    /// Does what the guest asks for: the answer, the state where that was asked for, and how many bytes of memory came or went.
    fn answer(&mut self, memory: &Memory, request: &[u8; REQUEST_BYTES]) -> (Answer, Option<State>, u64) {
        let [low, high, ..] = *request;
        let kind = u16::from_le_bytes([low, high]);
        let (before, requested, block) = (self.count, self.requested, self.block);
        let refused = (Answer::Error, None, 0);
        if kind == kind::UNPLUG_ALL {
            return (self.unplug_all(memory), None, self.plugged.len() as u64 * block);
        }
        let Some(range) = self.blocks(request) else { return refused };
        let blocks = self.plugged.get(range.clone()).unwrap_or_default();
        let (length, set) = (blocks.len(), blocks.iter().filter(|block| **block).count());
        match kind {
            kind::PLUG if set > 0 => refused,
            kind::PLUG if (before + length) as u64 * block > requested => (Answer::Nack, None, 0),
            kind::PLUG => (self.plug(memory, range), None, length as u64 * block),
            kind::UNPLUG if set < length => refused,
            kind::UNPLUG => (self.unplug(memory, range), None, length as u64 * block),
            kind::STATE => {
                let state = match set {
                    0 => State::Unplugged,
                    _ if set == length => State::Plugged,
                    _ => State::Mixed,
                };
                (Answer::Ack, Some(state), 0)
            }
            _ => refused,
        }
    }

    /// The address of a block.
    fn address(&self, index: usize) -> u64 {
        self.start + index as u64 * self.block
    }

    /// The guest gets blocks, of which it has none: all of them, or none.
    fn plug(&mut self, memory: &Memory, range: Range<usize>) -> Answer {
        for index in range.clone() {
            if let Err(error) = self.observer.gains(self.address(index), self.block) {
                log::warn!("mem: the guest can't have memory: {error}");
                for index in range.start..index {
                    let (start, bytes) = (self.address(index), self.block);
                    // Whoever was to use it may have taken it already.
                    let _ = self.observer.loses(start, bytes).and_then(|()| self.empty(memory, index));
                }
                return Answer::Busy;
            }
        }
        self.set(range, true);
        Answer::Ack
    }

    /// Gives blocks back to the host, all of which the guest has: all of them, or none.
    fn unplug(&mut self, memory: &Memory, range: Range<usize>) -> Answer {
        for index in range.clone() {
            let lost = self.observer.loses(self.address(index), self.block);
            if let Err(error) = lost.and_then(|()| self.empty(memory, index)) {
                log::warn!("mem: memory can't be given back: {error}");
                for index in range.start..=index {
                    // What could not be lost is had still: gaining it again is refused, and that is right.
                    let _ = self.observer.gains(self.address(index), self.block);
                }
                return Answer::Busy;
            }
        }
        self.set(range, false);
        Answer::Ack
    }

    /// Gives back whatever the guest has, and whatever else of the region it has touched.
    fn unplug_all(&mut self, memory: &Memory) -> Answer {
        for index in 0..self.plugged.len() {
            let has = self.plugged.get(index).is_some_and(|plugged| *plugged);
            if has && self.unplug(memory, index..index + 1) != Answer::Ack {
                return Answer::Busy;
            }
        }
        let all = self.plugged.len() as u64 * self.block;
        // What it has not been given it had no claim to.
        match reclaim::discard(&memory.memory(), self.start, all) {
            Ok(()) => Answer::Ack,
            Err(_) => Answer::Busy,
        }
    }

    fn empty(&self, memory: &Memory, index: usize) -> std::io::Result<()> {
        reclaim::discard(&memory.memory(), self.address(index), self.block)
    }

    fn set(&mut self, range: Range<usize>, plugged: bool) {
        let changed = range.len();
        if let Some(blocks) = self.plugged.get_mut(range) {
            blocks.fill(plugged);
        }
        let count = if plugged { self.count + changed } else { self.count.saturating_sub(changed) };
        self.count(count);
    }

    fn count(&mut self, count: usize) {
        if mem::replace(&mut self.count, count) != count {
            let bytes = count as u64 * self.block;
            set(&mut self.config, PLUGGED_AT, bytes);
            self.observer.uses(bytes);
        }
    }
}

impl std::fmt::Debug for Mem {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Mem").field("start", &self.start).field("count", &self.count).finish_non_exhaustive()
    }
}

fn set(config: &mut [u8; CONFIG_BYTES], at: usize, value: u64) {
    if let Some(place) = config.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

impl Device for Mem {
    fn name(&self) -> &'static str {
        "mem"
    }

    fn id(&self) -> u16 {
        24
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), Broken> {
        self.running = Some((activation.only_ring()?, activation.memory));
        Ok(())
    }

    fn on_queue(&mut self, _: u16) -> Result<Turn, Broken> {
        // Taken for the time of the turn: the answers change the device.
        let Some((mut ring, memory)) = self.running.take() else { return Ok(Turn::Done) };
        let turn = drain(&mut ring, BUDGET, |chain| {
            self.counters.operations_out += 1;
            let mut request = [0; REQUEST_BYTES];
            let buffers = walk(chain, chain.memory()).ok();
            let room = buffers.and_then(|mut buffers| buffers.readable.take(&mut request).then_some(buffers.writable));
            let Some(mut room) = room.filter(|room: &Slices<'_>| room.len() >= ANSWER_BYTES) else {
                self.counters.errors += 1;
                return Ok(Served::default());
            };
            let (answer, state, moved) = self.answer(&memory, &request);
            if answer == Answer::Ack {
                self.counters.bytes_out += moved;
            }
            self.counters.errors += u64::from(answer == Answer::Error);
            let mut bytes = [0; ANSWER_BYTES];
            let [low, high, _, _, _, _, _, _, state_low, state_high] = &mut bytes;
            [*low, *high] = (answer as u16).to_le_bytes();
            [*state_low, *state_high] = state.map_or(0, |state| state as u16).to_le_bytes();
            room.put(&bytes);
            let moved = usize::try_from(moved).unwrap_or(usize::MAX);
            Ok(Served { written: u32::try_from(ANSWER_BYTES).unwrap_or(0), moved })
        });
        self.running = Some((ring, memory));
        turn
    }

    /// Memory stays the guest's over a reset of the device (section 5.15.5): its kernel may be in it.
    fn reset(&mut self) {
        self.running = None;
    }

    /// What the guest is to use from now on, in whole blocks. It takes and gives it when it can.
    fn resize(&mut self, bytes: u64) -> std::io::Result<()> {
        let most = self.plugged.len() as u64 * self.block;
        if bytes > most || !bytes.is_multiple_of(self.block) {
            let text = format!("the memory that a machine gains is at most {most} bytes, in steps of {}", self.block);
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, text));
        }
        self.requested = bytes;
        set(&mut self.config, REQUESTED_AT, bytes);
        Ok(())
    }

    /// What the guest is to use, and a byte for each block: whether it does.
    fn save(&self) -> Option<Vec<u8>> {
        let mut saved = Vec::from(self.requested.to_le_bytes());
        saved.extend(self.plugged.iter().map(|plugged| u8::from(*plugged)));
        Some(saved)
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), Broken> {
        let wrong = || Broken::new("that is not the memory that this machine can gain");
        let (requested, blocks) = saved.split_first_chunk().ok_or_else(wrong)?;
        if blocks.len() != self.plugged.len() || blocks.iter().any(|block| *block > 1) {
            return Err(wrong());
        }
        self.resize(u64::from_le_bytes(*requested)).map_err(|_| wrong())?;
        for (index, _) in blocks.iter().enumerate().filter(|(_, block)| **block == 1) {
            let gained = self.observer.gains(self.address(index), self.block);
            gained.map_err(|error| Broken(format!("the guest can't have its memory: {error}")))?;
            self.set(index..index + 1, true);
        }
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::driver::{DATA, Driver, activation, peek, poke};
    use crate::hostile::{Shape, Victim};

    const START: u64 = 16 << 20;
    const BLOCKS: u64 = 8;

    struct Bench {
        mem: Mem,
        driver: Driver,
        memory: Memory,
        told: Arc<Mutex<Vec<u64>>>,
    }

    fn bench() -> Bench {
        let regions = [(GuestAddress(0), 2 << 20), (GuestAddress(START), (BLOCKS * BLOCK_BYTES) as usize)];
        let memory = Memory::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
        let told = Arc::new(Mutex::new(Vec::new()));
        let observer = Told { uses: Arc::clone(&told), refuses: None };
        let mut mem = Mem::new(START, BLOCKS * BLOCK_BYTES + 5, BLOCK_BYTES, Box::new(observer)).unwrap();
        let driver = Driver::new(&memory, 0, 64);
        mem.activate(activation(&memory, 0, vec![Some(driver.ring(false))])).unwrap();
        Bench { mem, driver, memory, told }
    }

    /// What is told, in blocks; one block is refused.
    struct Told {
        uses: Arc<Mutex<Vec<u64>>>,
        refuses: Option<u64>,
    }

    impl Observer for Told {
        fn gains(&mut self, start: u64, _: u64) -> std::io::Result<()> {
            if self.refuses == Some(start) { Err(std::io::ErrorKind::OutOfMemory.into()) } else { Ok(()) }
        }

        fn loses(&mut self, start: u64, _: u64) -> std::io::Result<()> {
            self.gains(start, 0)
        }

        fn uses(&mut self, bytes: u64) {
            self.uses.lock().unwrap().push(bytes / BLOCK_BYTES);
        }
    }

    fn nobody() -> Box<dyn Observer> {
        Box::new(Told { uses: Arc::default(), refuses: None })
    }

    fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
        let parts = [&kind.to_le_bytes()[..], &[0; 6], &address.to_le_bytes(), &count.to_le_bytes(), &[0; 6]];
        parts.concat()
    }

    impl Bench {
        /// The answer to a request, and the state in it.
        fn ask(&mut self, kind: u16, first: u64, count: u16) -> (u16, u16) {
            self.ask_at(kind, START + first * BLOCK_BYTES, count)
        }

        fn ask_at(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
            poke(&self.memory, DATA, &request(kind, address, count));
            poke(&self.memory, DATA + 0x100, &[0xff; ANSWER_BYTES]);
            self.driver.chain(&[(DATA, 24, false), (DATA + 0x100, 10, true)]);
            assert_eq!(self.mem.on_queue(0).unwrap(), Turn::Done);
            assert_eq!(self.driver.used().last().map(|used| used.1), Some(10));
            let found = peek(&self.memory, DATA + 0x100, 10);
            (u16::from_le_bytes([found[0], found[1]]), u16::from_le_bytes([found[8], found[9]]))
        }

        fn field(&self, at: usize) -> u64 {
            u64::from_le_bytes(self.mem.config()[at..at + 8].try_into().unwrap())
        }
    }

    const ACK: (u16, u16) = (0, 0);
    const NACK: (u16, u16) = (1, 0);
    const BUSY: (u16, u16) = (2, 0);
    const ERROR: (u16, u16) = (3, 0);

    #[test]
    fn another_device_has_what_the_guest_had() {
        let mut bench = bench();
        bench.mem.resize(4 * BLOCK_BYTES).unwrap();
        assert_eq!(bench.ask(kind::PLUG, 2, 2), ACK);
        assert_eq!(bench.ask(kind::PLUG, 7, 1), ACK);
        let saved = bench.mem.save().unwrap();
        let mut other = self::bench();
        other.mem.restore(&saved).unwrap();
        assert_eq!(other.told.lock().unwrap().last(), Some(&3));
        assert_eq!([other.field(PLUGGED_AT), other.field(REQUESTED_AT)], [3 * BLOCK_BYTES, 4 * BLOCK_BYTES]);
        assert_eq!((other.ask(kind::PLUG, 7, 1), other.ask(kind::PLUG, 0, 1)), (ERROR, ACK));
        assert_eq!(other.ask(kind::PLUG, 1, 1), NACK);
        for (at, byte) in [(0, 1), (5, 1), (9, 2)] {
            let mut edited = saved.clone();
            edited[at] ^= byte;
            assert!(self::bench().mem.restore(&edited).is_err(), "{at}");
        }
        assert!(self::bench().mem.restore(&saved[..saved.len() - 1]).is_err());
        let observer = Told { uses: Arc::default(), refuses: Some(START + 7 * BLOCK_BYTES) };
        let mut refused = Mem::new(START, BLOCKS * BLOCK_BYTES, BLOCK_BYTES, Box::new(observer)).unwrap();
        assert!(refused.restore(&saved).is_err(), "somebody can't have it");
    }

    #[test]
    fn the_guest_takes_what_it_is_offered_and_no_more() {
        let mut bench = bench();
        assert_eq!([bench.field(0), bench.field(16), bench.field(24)], [BLOCK_BYTES, START, BLOCKS * BLOCK_BYTES]);
        assert_eq!(bench.ask(kind::PLUG, 0, 1), NACK, "nothing is offered");
        bench.mem.resize(3 * BLOCK_BYTES).unwrap();
        assert_eq!(bench.field(REQUESTED_AT), 3 * BLOCK_BYTES);
        assert_eq!(bench.ask(kind::PLUG, 2, 2), ACK);
        assert_eq!(bench.ask(kind::PLUG, 0, 2), NACK, "one too many");
        assert_eq!(bench.ask(kind::PLUG, 3, 1), ERROR, "it has it");
        assert_eq!(bench.ask(kind::PLUG, 7, 1), ACK);
        assert_eq!(bench.field(PLUGGED_AT), 3 * BLOCK_BYTES);
        assert_eq!(bench.ask(kind::STATE, 2, 2), (0, 0));
        assert_eq!(bench.ask(kind::STATE, 0, 2), (0, 1));
        assert_eq!(bench.ask(kind::STATE, 1, 3), (0, 2));
        assert_eq!(*bench.told.lock().unwrap(), [2, 3]);
    }

    #[test]
    fn what_is_given_back_is_the_hosts_again() {
        let mut bench = bench();
        bench.mem.resize(4 * BLOCK_BYTES).unwrap();
        assert_eq!(bench.ask(kind::PLUG, 1, 4), ACK);
        let map = bench.memory.memory();
        let at = |block: u64| GuestAddress(START + block * BLOCK_BYTES);
        for block in 1..5 {
            map.write_obj(0x5a_u8, at(block)).unwrap();
        }
        bench.mem.resize(0).unwrap();
        assert_eq!(bench.ask(kind::UNPLUG, 2, 2), ACK);
        let read = |block| map.read_obj::<u8>(at(block)).unwrap();
        assert_eq!([1, 2, 3, 4].map(read), [0x5a, 0, 0, 0x5a]);
        assert_eq!(bench.ask(kind::UNPLUG, 2, 1), ERROR, "it has it no more");
        assert_eq!(bench.ask(kind::UNPLUG_ALL, 0, 0), ACK);
        assert_eq!([1, 4].map(read), [0, 0]);
        map.write_obj(0x5a_u8, at(7)).unwrap();
        assert_eq!(bench.ask(kind::UNPLUG_ALL, 0, 0), ACK, "nothing to do is done");
        assert_eq!(read(7), 0, "what it had no claim to goes, too");
        assert_eq!(*bench.told.lock().unwrap(), [4, 2, 1, 0]);
    }

    #[test]
    fn a_reset_leaves_the_guest_its_memory() {
        let mut bench = bench();
        bench.mem.resize(2 * BLOCK_BYTES).unwrap();
        assert_eq!(bench.ask(kind::PLUG, 0, 2), ACK);
        bench.mem.reset();
        assert_eq!(bench.mem.on_queue(0).unwrap(), Turn::Done);
        bench.driver = Driver::new(&bench.memory, 0, 64);
        bench.mem.activate(activation(&bench.memory, 0, vec![Some(bench.driver.ring(false))])).unwrap();
        assert_eq!(bench.ask(kind::STATE, 0, 2), (0, 0));
        assert!(bench.mem.activate(activation(&bench.memory, 0, vec![None])).is_err());
    }

    #[test]
    fn ranges_that_are_not_its_own_are_errors() {
        let mut bench = bench();
        bench.mem.resize(BLOCKS * BLOCK_BYTES).unwrap();
        for (address, count) in [
            (START - BLOCK_BYTES, 1),
            (START + 1, 1),
            (START, 0),
            (START, 9),
            (START + BLOCKS * BLOCK_BYTES, 1),
            (!(BLOCK_BYTES - 1), u16::MAX),
            (0, 1),
        ] {
            for kind in [kind::PLUG, kind::UNPLUG, kind::STATE] {
                assert_eq!(bench.ask_at(kind, address, count), ERROR, "{kind} of {count} at {address:#x}");
            }
        }
        assert_eq!(bench.ask(4, 0, 1), ERROR, "no kind");
        assert!(bench.mem.resize(BLOCK_BYTES / 2).is_err() && bench.mem.resize(BLOCK_BYTES * 9).is_err());
        assert!(Mem::new(START + 1, BLOCK_BYTES, BLOCK_BYTES, nobody()).is_err());
        for block in [0, 1, 2048, 3 << 20] {
            assert!(Mem::new(0, 6 << 20, block, nobody()).is_err(), "{block}");
        }
        assert!(Mem::new(START, BLOCK_BYTES - 1, BLOCK_BYTES, nobody()).is_err());
        assert!(Mem::new(!(BLOCK_BYTES - 1), BLOCK_BYTES * 2, BLOCK_BYTES, nobody()).is_err());
    }

    #[test]
    fn a_chain_without_room_for_an_answer_changes_nothing() {
        let mut bench = bench();
        bench.mem.resize(BLOCK_BYTES).unwrap();
        poke(&bench.memory, DATA, &request(kind::PLUG, START, 1));
        bench.driver.chain(&[(DATA, 24, false), (DATA + 0x100, 9, true)]);
        bench.driver.chain(&[(DATA, 23, false), (DATA + 0x100, 10, true)]);
        assert_eq!(bench.mem.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(bench.driver.used(), [(0, 0), (2, 0)]);
        assert_eq!((bench.field(PLUGGED_AT), bench.mem.counters().errors), (0, 2));
    }

    #[test]
    fn what_an_observer_refuses_is_not_done() {
        let mut bench = bench();
        bench.mem.resize(8 * BLOCK_BYTES).unwrap();
        let refuses = |block: u64| Some(START + block * BLOCK_BYTES);
        let told = Arc::clone(&bench.told);
        bench.mem.observer = Box::new(Told { uses: Arc::clone(&told), refuses: refuses(2) });
        assert_eq!(bench.ask(kind::PLUG, 0, 4), BUSY);
        assert_eq!(bench.ask(kind::STATE, 0, 4), (0, 1));
        assert_eq!(bench.ask(kind::PLUG, 3, 4), ACK);
        bench.mem.observer = Box::new(Told { uses: told, refuses: refuses(5) });
        bench.memory.memory().write_obj(7_u8, GuestAddress(START + 6 * BLOCK_BYTES)).unwrap();
        assert_eq!(bench.ask(kind::UNPLUG, 3, 4), BUSY);
        assert_eq!(bench.ask(kind::STATE, 3, 4), (0, 0), "all of it is the guest's");
        assert_eq!(bench.field(PLUGGED_AT), 4 * BLOCK_BYTES);
        assert_eq!(bench.memory.memory().read_obj::<u8>(GuestAddress(START + 6 * BLOCK_BYTES)).unwrap(), 7);
    }

    fn victim() -> Victim<'static> {
        // All of the memory that the tormentor has is the device's.
        let mut mem = Mem::new(0, BLOCK_BYTES, BLOCK_BYTES, nobody()).unwrap();
        mem.resize(BLOCK_BYTES).unwrap();
        Victim {
            device: Box::new(mem),
            features: 0,
            shape: |_| Shape::Driver,
            lengths: &[10, 24, 64],
            header: &|random| {
                request(random.of(&[0, 1, 2, 3, 7]), random.of(&[0, 1, BLOCK_BYTES]), random.of(&[0, 1, 2]))
            },
            host: Box::leak(Box::new(|_| {})),
            // A chain of pieces as many as there may be, while their list grows.
            memory_max: 128 << 10,
            moved_max: (BUDGET.bytes as u64) + BLOCK_BYTES,
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

//! The console device (virtio 1.3, section 5.3) with one port, for what the guest has to say: nothing is ever typed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::chain::walk;
use crate::device::{Activation, Broken, Counters, Device, Turn};
use crate::drain::{Budget, Served, drain};
use crate::ring::Ring;
use crate::vectored;

const RX: usize = 0;
const TX: u16 = 1;
const SIZES: [u16; 2] = [64, 64];
/// The most bytes of a chain that are written. A driver writes a page at a time.
const CHAIN_BYTES_MAX: usize = 64 << 10;
const BUDGET: Budget = Budget { chains: 64, bytes: 4 * CHAIN_BYTES_MAX };

/// See the module.
#[derive(Debug)]
pub struct Console {
    output: OwnedFd,
    /// Held and left alone: what the guest would read into.
    rx: Option<Ring>,
    tx: Option<Ring>,
    counters: Counters,
}

impl Console {
    /// A device whose output goes to `output`, which is made nonblocking, for all who share its open file description.
    /// What it does not take at once is dropped: its chain counts as an error.
    ///
    /// # Errors
    /// Where the descriptor's flags can't be changed.
    pub fn new(output: OwnedFd) -> io::Result<Self> {
        fcntl_setfl(&output, fcntl_getfl(&output)? | OFlags::NONBLOCK)?;
        Ok(Self { output, rx: None, tx: None, counters: Counters::default() })
    }
}

impl Device for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn id(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let mut rings = activation.rings.into_iter();
        let (rx, tx) = (rings.nth(RX).flatten(), rings.next().flatten());
        if rx.is_none() || tx.is_none() {
            return Err(Broken::new("the driver runs without its receive or transmit queue"));
        }
        (self.rx, self.tx) = (rx, tx);
        Ok(())
    }

    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken> {
        let Some(tx) = self.tx.as_mut().filter(|_| queue == TX) else { return Ok(Turn::Done) };
        let (output, counters) = (self.output.as_fd(), &mut self.counters);
        drain(tx, BUDGET, |chain| {
            counters.operations_out += 1;
            let Ok(buffers) = walk(chain, chain.memory()) else {
                counters.errors += 1;
                return Ok(Served::default());
            };
            let mut text = buffers.readable;
            let said = text.len();
            text.truncate(CHAIN_BYTES_MAX);
            let taken = if text.is_empty() { Ok(0) } else { vectored::write(output, text.pieces()) };
            // Whoever reads the console may be slow or gone. The guest is not the one to suffer from it.
            let taken = taken.unwrap_or(0);
            counters.bytes_out += taken as u64;
            counters.errors += u64::from(taken < said || said == 0);
            Ok(Served { written: 0, moved: taken })
        })
    }

    fn reset(&mut self) {
        (self.rx, self.tx) = (None, None);
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    use crate::device::Memory;
    use crate::driver::{DATA, Driver, END, NEXT, SEAM, activation, memory, poke};
    use crate::hostile::{Shape, Victim};

    fn running(output: OwnedFd) -> (Console, Driver, Driver, Memory) {
        let memory = memory();
        let (rx, tx) = (Driver::new(&memory, 0, 64), Driver::new(&memory, 1, 64));
        let mut console = Console::new(output).unwrap();
        console.activate(activation(&memory, 0, vec![Some(rx.ring(false)), Some(tx.ring(false))])).unwrap();
        (console, rx, tx, memory)
    }

    fn pipe() -> (File, OwnedFd) {
        let (reader, writer) = std::io::pipe().unwrap();
        (OwnedFd::from(reader).into(), writer.into())
    }

    fn said(reader: &mut File, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        reader.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_the_guest_says_is_written() {
        let (mut reader, writer) = pipe();
        let (mut console, mut rx, mut tx, memory) = running(writer);
        poke(&memory, DATA, b"one ");
        poke(&memory, SEAM - 2, b"two ");
        poke(&memory, DATA + 0x100, b"three");
        rx.chain(&[(DATA, 64, true)]);
        tx.chain(&[(DATA, 4, false), (SEAM - 2, 4, false)]);
        tx.chain(&[(DATA + 0x100, 5, false), (DATA, 64, true)]);
        assert_eq!(console.on_queue(1).unwrap(), Turn::Done);
        assert_eq!(tx.used(), [(0, 0), (2, 0)]);
        assert!(tx.interrupted());
        assert_eq!(said(&mut reader, 13), b"one two three");
        assert_eq!(console.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(rx.used(), [], "nobody types");
        assert_eq!(console.counters(), Counters { operations_out: 2, bytes_out: 13, ..Counters::default() });
    }

    #[test]
    fn a_reader_that_is_slow_or_gone_costs_the_guest_nothing() {
        let (reader, writer) = pipe();
        let room = rustix::pipe::fcntl_getpipe_size(&writer).unwrap();
        let (mut console, _rx, mut tx, _) = running(writer);
        let chunk = CHAIN_BYTES_MAX as u32;
        let chunks = room / CHAIN_BYTES_MAX;
        for _ in 0..=chunks {
            tx.chain(&[(DATA, chunk, false)]);
        }
        while console.on_queue(1).unwrap() == Turn::More {}
        assert_eq!(tx.used().len(), chunks + 1);
        let counters = console.counters();
        assert_eq!((counters.bytes_out, counters.errors), (room as u64, 1));
        drop(reader);
        tx.chain(&[(DATA, 5, false)]);
        assert_eq!(console.on_queue(1).unwrap(), Turn::Done);
        assert_eq!(tx.used().len(), 1);
        assert_eq!(console.counters().errors, 2);
    }

    #[test]
    fn nonsense_is_given_back_and_counted() {
        let (mut reader, writer) = pipe();
        let (mut console, _rx, mut tx, memory) = running(writer);
        poke(&memory, DATA, b"word");
        tx.chain(&[(DATA, 0, false)]);
        tx.chain(&[(DATA, 4, true)]);
        tx.chain(&[(DATA, 4, false), (END, 1, false)]);
        tx.table(20, DATA, 4, NEXT, 20);
        tx.offer(20);
        tx.chain(&[(DATA, 4, false)]);
        assert_eq!(console.on_queue(1).unwrap(), Turn::Done);
        assert_eq!(tx.used(), [(0, 0), (1, 0), (2, 0), (20, 0), (4, 0)]);
        assert_eq!(console.counters(), Counters { operations_out: 5, bytes_out: 4, errors: 4, ..Counters::default() });
        assert_eq!(said(&mut reader, 4), b"word");
    }

    #[test]
    fn more_than_a_chain_may_say_is_dropped_and_a_turn_is_bounded() {
        let output = tempfile::tempfile().unwrap();
        let (mut console, _rx, mut tx, _) = running(output.try_clone().unwrap().into());
        for _ in 0..6 {
            tx.chain(&[(DATA, 0x2_0000, false)]);
        }
        assert_eq!(console.on_queue(1).unwrap(), Turn::More);
        assert_eq!(output.metadata().unwrap().len(), 4 << 16);
        assert_eq!(console.on_queue(1).unwrap(), Turn::Done);
        assert_eq!(output.metadata().unwrap().len(), 6 << 16);
        assert_eq!(console.counters().errors, 6);
    }

    #[test]
    fn it_needs_its_queues_and_forgets_them() {
        let (_, writer) = pipe();
        let (mut console, rx, mut tx, memory) = running(writer);
        console.reset();
        tx.chain(&[(DATA, 4, false)]);
        assert_eq!(console.on_queue(1).unwrap(), Turn::Done);
        assert_eq!(tx.used(), []);
        assert!(console.activate(activation(&memory, 0, vec![None, Some(tx.ring(false))])).is_err());
        assert!(console.activate(activation(&memory, 0, vec![Some(rx.ring(false)), None])).is_err());
        assert!(console.activate(activation(&memory, 0, vec![])).is_err());
    }

    fn victim() -> Victim<'static> {
        let output: OwnedFd = File::options().write(true).open("/dev/null").unwrap().into();
        Victim {
            device: Box::new(Console::new(output).unwrap()),
            features: 0,
            shape: |queue| if queue == TX { Shape::Driver } else { Shape::Device },
            lengths: &[1, 80, 1024, 4096],
            header: &|_| b"text".to_vec(),
            host: Box::leak(Box::new(|_| {})),
            memory_max: 256 << 10,
            moved_max: (BUDGET.bytes + CHAIN_BYTES_MAX) as u64,
        }
    }

    #[test]
    fn a_hostile_driver_gets_nowhere() {
        victim().torment(3, 20_000);
    }

    #[test]
    fn a_driver_that_changes_its_rings_gets_nowhere() {
        victim().torment_while_it_changes(3, 5_000);
    }
}

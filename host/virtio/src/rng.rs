//! The entropy device (virtio 1.3, section 5.4), which gives the guest the host's random bytes.

use std::mem;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::chain::{Slices, walk};
use crate::device::{Activation, Broken, Counters, Device, Turn};
use crate::drain::{Budget, Served, drain};
use crate::ring::Ring;

const SIZES: [u16; 1] = [64];
/// The most bytes of a chain that are filled. The device may use less than the whole buffer (section 5.4.6.2).
const CHAIN_BYTES_MAX: usize = 64 << 10;
const BUDGET: Budget = Budget { chains: 64, bytes: 4 * CHAIN_BYTES_MAX };
/// Bytes of one call to the kernel, which can be interrupted only between pages.
const PIECE_BYTES: usize = 4096;

/// See the module.
#[derive(Debug, Default)]
pub struct Rng {
    ring: Option<Ring>,
    counters: Counters,
}

impl Rng {
    /// A device over getrandom(2).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

/// Fills `slices`. Returns how many bytes that were.
fn fill(slices: &mut Slices<'_>) -> Result<usize, Broken> {
    let mut piece = [0; PIECE_BYTES];
    let before = slices.len();
    while !slices.is_empty() {
        let room = slices.len().min(PIECE_BYTES);
        let place = piece.get_mut(..room).unwrap_or_default();
        let count = match getrandom(place, GetRandomFlags::empty()) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(Broken(format!("the host has no random bytes: {error}"))),
        };
        slices.put(piece.get(..count).unwrap_or_default());
    }
    Ok(before)
}

impl Device for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn id(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), Broken> {
        self.ring = Some(activation.only_ring()?);
        Ok(())
    }

    fn on_queue(&mut self, _: u16) -> Result<Turn, Broken> {
        let Some(ring) = &mut self.ring else { return Ok(Turn::Done) };
        let counters = &mut self.counters;
        drain(ring, BUDGET, |chain| {
            counters.operations_out += 1;
            let mut room = match walk(chain, chain.memory()) {
                Ok(buffers) => buffers.writable,
                Err(_) => Slices::default(),
            };
            if room.is_empty() {
                counters.errors += 1;
                return Ok(Served::default());
            }
            room.truncate(CHAIN_BYTES_MAX);
            let filled = fill(&mut room)?;
            counters.operations_in += 1;
            counters.bytes_in += filled as u64;
            Ok(Served { written: u32::try_from(filled).unwrap_or(0), moved: filled })
        })
    }

    fn reset(&mut self) {
        mem::take(&mut self.ring);
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Memory;
    use crate::driver::{DATA, Driver, END, NEXT, WRITE, activation, memory, peek};
    use crate::hostile::{Shape, Victim};

    fn running() -> (Rng, Driver, Memory) {
        let memory = memory();
        let driver = Driver::new(&memory, 0, 64);
        let mut rng = Rng::new();
        rng.activate(activation(&memory, 0, vec![Some(driver.ring(false))])).unwrap();
        (rng, driver, memory)
    }

    #[test]
    fn buffers_are_filled_and_nothing_else() {
        let (mut rng, mut driver, memory) = running();
        driver.chain(&[(DATA, 16, false), (DATA + 0x100, 20, true), (DATA + 0x200, 5000, true)]);
        assert_eq!(rng.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(driver.used(), [(0, 5020)]);
        assert!(driver.interrupted());
        assert_eq!(peek(&memory, DATA, 0x100), [0; 0x100], "what the device may only read");
        let filled = [peek(&memory, DATA + 0x100, 20), peek(&memory, DATA + 0x200, 5000)].concat();
        // Of 5020 random bytes, 20 are zero, and more than 80 never.
        assert!(filled.iter().filter(|byte| **byte == 0).count() < 80);
        assert_eq!(peek(&memory, DATA + 0x114, 20), [0; 20]);
        assert_eq!(peek(&memory, DATA + 0x200 + 5000, 20), [0; 20]);
        let expected = Counters { operations_out: 1, operations_in: 1, bytes_in: 5020, ..Counters::default() };
        assert_eq!(rng.counters(), expected);
    }

    #[test]
    fn a_chain_gets_no_more_than_its_bound_and_a_turn_neither() {
        let (mut rng, mut driver, _) = running();
        for _ in 0..6 {
            driver.chain(&[(DATA, 0x2_0000, true)]);
        }
        assert_eq!(rng.on_queue(0).unwrap(), Turn::More);
        assert_eq!(driver.used(), [(0, 65536), (1, 65536), (2, 65536), (3, 65536)]);
        assert_eq!(rng.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(driver.used(), [(4, 65536), (5, 65536)]);
    }

    #[test]
    fn nonsense_is_given_back_and_counted() {
        let (mut rng, mut driver, _) = running();
        driver.chain(&[(DATA, 16, false)]);
        driver.chain(&[(DATA, 0, true)]);
        driver.chain(&[(END - 4, 8, true)]);
        driver.table(10, DATA, 16, WRITE | NEXT, 10);
        driver.offer(10);
        driver.chain(&[(DATA, 16, true)]);
        assert_eq!(rng.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(driver.used(), [(0, 0), (1, 0), (2, 0), (10, 0), (3, 16)]);
        assert_eq!(rng.counters().errors, 4);
    }

    #[test]
    fn it_needs_its_queue_and_forgets_it() {
        let mut rng = Rng::new();
        assert!(rng.activate(activation(&memory(), 0, vec![None])).is_err());
        assert!(rng.activate(activation(&memory(), 0, vec![])).is_err());
        let (mut rng, mut driver, _) = running();
        driver.chain(&[(DATA, 16, true)]);
        rng.reset();
        assert_eq!(rng.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(driver.used(), []);
    }

    fn victim() -> Victim<'static> {
        Victim {
            device: Box::new(Rng::new()),
            features: 0,
            shape: |_| Shape::Device,
            lengths: &[16, 64, 1024, 4096],
            header: &|_| vec![1; 16],
            host: Box::leak(Box::new(|_| {})),
            memory_max: 128 << 10,
            moved_max: (BUDGET.bytes + CHAIN_BYTES_MAX) as u64,
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

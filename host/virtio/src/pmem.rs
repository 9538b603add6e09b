//! Persistent memory (virtio 1.3, section 5.19): a part of the guest's addresses behind which is a file of the host's. This one is read-only:
//! the guest reads the host's own pages of the file, and there is nothing to write back.

use std::mem;

use crate::chain::walk;
use crate::device::{Activation, Broken, Counters, Device, Turn};
use crate::drain::{Budget, Served, drain};
use crate::ring::Ring;

const SIZES: [u16; 1] = [64];
const BUDGET: Budget = Budget { chains: 64, bytes: 64 * ANSWER_BYTES };

/// Bytes of a request, and of its answer.
const REQUEST_BYTES: usize = 4;
const ANSWER_BYTES: usize = 4;
/// `VIRTIO_PMEM_REQ_TYPE_FLUSH`.
const FLUSH: u32 = 0;
/// Answers (section 5.19.6).
const DONE: i32 = 0;
const FAILED: i32 = -1;

/// Bytes of the configuration: where it is, and how many bytes it has.
const CONFIG_BYTES: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Pmem {
    config: [u8; CONFIG_BYTES],
    ring: Option<Ring>,
    counters: Counters,
}

impl Pmem {
    /// Over `bytes` at the guest's address `start`, where whoever makes it has put a file that the guest can't write to.
    #[must_use]
    pub fn new(start: u64, bytes: u64) -> Self {
        let mut config = [0; CONFIG_BYTES];
        let (place, size) = config.split_at_mut(CONFIG_BYTES / 2);
        place.copy_from_slice(&start.to_le_bytes());
        size.copy_from_slice(&bytes.to_le_bytes());
        Self { config, ring: None, counters: Counters::default() }
    }
}

impl Device for Pmem {
    fn name(&self) -> &'static str {
        "pmem"
    }

    fn id(&self) -> u16 {
        27
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
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
            let mut request = [0; REQUEST_BYTES];
            let Ok(mut buffers) = walk(chain, chain.memory()) else {
                counters.errors += 1;
                return Ok(Served::default());
            };
            if !buffers.readable.take(&mut request) || buffers.writable.len() < ANSWER_BYTES {
                counters.errors += 1;
                return Ok(Served::default());
            }
            // What nobody can write is on the disk, whenever that is asked.
            let answer = if u32::from_le_bytes(request) == FLUSH { DONE } else { FAILED };
            counters.errors += u64::from(answer != DONE);
            buffers.writable.put(&answer.to_le_bytes());
            Ok(Served { written: 4, moved: ANSWER_BYTES })
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
    use crate::driver::{DATA, Driver, END, activation, memory, peek, poke};
    use crate::hostile::{Shape, Victim};

    fn running() -> (Pmem, Driver, Memory) {
        let memory = memory();
        let driver = Driver::new(&memory, 0, 64);
        let mut pmem = Pmem::new(5 << 30, 6 << 20);
        pmem.activate(activation(&memory, 0, vec![Some(driver.ring(false))])).unwrap();
        (pmem, driver, memory)
    }

    #[test]
    fn the_driver_learns_where_it_is() {
        let pmem = Pmem::new(5 << 30, 6 << 20);
        let words: Vec<_> = pmem.config().chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [5 << 30, 6 << 20]);
        let mut other = Pmem::new(5 << 30, 8 << 20);
        assert!(other.restore(&pmem.save().unwrap()).is_err(), "another size is another file");
    }

    #[test]
    fn all_is_on_the_disk_and_nothing_else_is_known() {
        let (mut pmem, mut driver, memory) = running();
        for (nth, kind) in [FLUSH, 1, u32::MAX].into_iter().enumerate() {
            let at = DATA + 0x100 * nth as u64;
            poke(&memory, at, &kind.to_le_bytes());
            poke(&memory, at + 8, &[9; 8]);
            driver.chain(&[(at, 4, false), (at + 8, 8, true)]);
        }
        assert_eq!(pmem.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(driver.used(), [(0, 4), (2, 4), (4, 4)]);
        let answers = [0, 1, 2].map(|nth| peek(&memory, DATA + 0x100 * nth + 8, 8));
        assert_eq!(
            answers,
            [[0, 0, 0, 0, 9, 9, 9, 9], [255, 255, 255, 255, 9, 9, 9, 9], [255, 255, 255, 255, 9, 9, 9, 9]]
        );
        assert_eq!((pmem.counters().operations_out, pmem.counters().errors), (3, 2));
    }

    #[test]
    fn nonsense_is_given_back_and_counted() {
        let (mut pmem, mut driver, _) = running();
        driver.chain(&[(DATA, 3, false), (DATA + 8, 4, true)]);
        driver.chain(&[(DATA, 4, false), (DATA + 8, 3, true)]);
        driver.chain(&[(DATA, 4, false)]);
        driver.chain(&[(DATA + 8, 4, true)]);
        driver.chain(&[(END - 2, 4, false), (DATA + 8, 4, true)]);
        assert_eq!(pmem.on_queue(0).unwrap(), Turn::Done);
        assert!(driver.used().iter().all(|(_, written)| *written == 0));
        assert_eq!(pmem.counters().errors, 5);
    }

    #[test]
    fn it_needs_its_queue_and_forgets_it() {
        let mut pmem = Pmem::new(0, 0);
        assert!(pmem.activate(activation(&memory(), 0, vec![None])).is_err());
        let (mut pmem, mut driver, _) = running();
        driver.chain(&[(DATA, 4, false), (DATA + 8, 4, true)]);
        pmem.reset();
        assert_eq!(pmem.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(driver.used(), []);
    }

    fn victim() -> Victim<'static> {
        Victim {
            device: Box::new(Pmem::new(5 << 30, 6 << 20)),
            features: 0,
            shape: |_| Shape::Both,
            lengths: &[4, 8, 64],
            header: &|random| u32::to_le_bytes(random.of(&[0, 0, 1, u32::MAX])).to_vec(),
            host: Box::leak(Box::new(|_| {})),
            memory_max: 128 << 10,
            moved_max: (BUDGET.bytes + ANSWER_BYTES) as u64,
        }
    }

    #[test]
    fn a_hostile_driver_gets_nowhere() {
        victim().torment(27, 20_000);
    }

    #[test]
    fn a_driver_that_changes_its_rings_gets_nowhere() {
        victim().torment_while_it_changes(27, 5_000);
    }
}

//! The block device.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::config;
use super::disk::Disk;
use super::request::{HEADER_BYTES, ID_BYTES, Refused, Rules, Status, serve};
use crate::chain::{Buffers, walk};
use crate::device::{Activation, Broken, Counters, Device, Source, Turn};
use crate::drain::{Budget, Served, drain};
use crate::limit::{Limiter, Limits, Way};
use crate::ring::{Chain, Ring};

/// The most queues.
pub const QUEUES_MAX: u16 = 64;

const QUEUE_SIZE: u16 = 256;
/// The source that tells when a limit lets those go on who wait.
const TIMER: u16 = 0;
const BUDGET: Budget = Budget { chains: 32, bytes: 16 << 20 };

/// Features (section 5.2.3).
mod feature {
    pub(super) const SIZE_MAX: u64 = 1 << 1;
    pub(super) const SEG_MAX: u64 = 1 << 2;
    pub(super) const RO: u64 = 1 << 5;
    pub(super) const BLK_SIZE: u64 = 1 << 6;
    pub(super) const FLUSH: u64 = 1 << 9;
    pub(super) const TOPOLOGY: u64 = 1 << 10;
    pub(super) const MQ: u64 = 1 << 12;
    pub(super) const DISCARD: u64 = 1 << 13;
    pub(super) const WRITE_ZEROES: u64 = 1 << 14;
}
use feature::{BLK_SIZE, DISCARD, FLUSH, MQ, RO, SEG_MAX, SIZE_MAX, TOPOLOGY, WRITE_ZEROES};

/// What a block device is made of.
#[derive(Debug)]
pub struct BlockConfig {
    /// A raw file or a block device, open for reading, and for writing where it is not `read_only`. Its size is taken once.
    pub file: OwnedFd,
    /// The guest may not write, whatever the file would allow.
    pub read_only: bool,
    /// The file was opened with `O_DIRECT`.
    pub direct: bool,
    /// What the guest knows the disk by: at most 20 bytes of ASCII.
    pub serial: String,
    /// Queues, 1 to [`QUEUES_MAX`].
    pub queues: u16,
}

/// See the module above.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    rules: Rules,
    config: Vec<u8>,
    sizes: Vec<u16>,
    rings: Vec<Option<Ring>>,
    tally: Tally,
    limiter: Limiter,
}

#[derive(Debug, Default)]
struct Tally {
    counters: Counters,
    /// How often the host's disk has failed.
    failures: u64,
}

impl Block {
    /// A device over a file.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] where the configuration can't be, or the file is of another kind or smaller than a
    /// block; else what the kernel says.
    pub fn new(config: BlockConfig) -> io::Result<Self> {
        let BlockConfig { file, read_only, direct, serial, queues } = config;
        let mut id = [0; ID_BYTES];
        match id.get_mut(..serial.len()) {
            Some(place) if serial.is_ascii() => place.copy_from_slice(serial.as_bytes()),
            _ => {
                let text = format!("the serial number {serial:?} is not at most {ID_BYTES} bytes of ASCII");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        }
        if !(1..=QUEUES_MAX).contains(&queues) {
            let text = format!("a block device has 1 to {QUEUES_MAX} queues, not {queues}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let disk = Disk::new(file, direct, read_only)?;
        Ok(Self {
            config: config::space(&disk, queues).to_vec(),
            sizes: vec![QUEUE_SIZE; usize::from(queues)],
            rules: Rules { read_only, id, durable: true },
            rings: Vec::new(),
            tally: Tally::default(),
            limiter: Limiter::new()?,
            disk,
        })
    }
}

/// Serves one chain. A request that has no place for its status, or whose chain makes no sense, is only given back.
fn request(disk: &mut Disk, rules: &Rules, tally: &mut Tally, chain: &Chain) -> Served {
    let walked = walk(chain, chain.memory()).ok();
    let Some((mut buffers, place)) = walked.and_then(|mut buffers| {
        // The last byte that may be written, wherever it is (section 5.2.6.4).
        let place = buffers.writable.split_last()?;
        Some((buffers, place))
    }) else {
        tally.counters.errors += 1;
        return Served::default();
    };
    let (to_read, to_write) = (buffers.readable.len(), buffers.writable.len());
    let result = serve(disk, rules, &mut buffers);
    let Buffers { readable, writable, .. } = buffers;
    let taken = to_read.saturating_sub(readable.len()).saturating_sub(HEADER_BYTES);
    let filled = to_write - writable.len();
    tally.note(&result, taken, filled);
    let beside = usize::try_from(*result.as_ref().unwrap_or(&0)).unwrap_or(usize::MAX);
    let status = result.map_or_else(|refused| refused.status(), |_| Status::Ok);
    place.copy_from(&[status as u8]);
    Served { written: u32::try_from(filled + 1).unwrap_or(u32::MAX), moved: (taken + filled).saturating_add(beside) }
}

impl Tally {
    fn note(&mut self, result: &Result<u64, Refused>, taken: usize, filled: usize) {
        self.counters.bytes_out += taken as u64;
        self.counters.bytes_in += filled as u64;
        match result {
            Ok(_) if filled > 0 => self.counters.operations_in += 1,
            Ok(_) => self.counters.operations_out += 1,
            Err(refused) => {
                self.counters.errors += 1;
                if let Refused::Failed(error) = refused
                    && refused.status() == Status::Error
                {
                    self.failures += 1;
                    // The guest can ask as often as it likes. It must not fill the host's log.
                    if self.failures.is_power_of_two() {
                        log::warn!("block: the host's disk has failed {} times: {error}", self.failures);
                    }
                }
            }
        }
    }
}

impl Device for Block {
    fn name(&self) -> &'static str {
        "block"
    }

    fn id(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let mut features = SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY;
        if self.rules.read_only {
            features |= RO;
        } else {
            features |= WRITE_ZEROES | if self.disk.discards() { DISCARD } else { 0 };
        }
        features | if self.sizes.len() > 1 { MQ } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let Activation { features, mut rings, .. } = activation;
        // There is one queue, or the driver says which of them it uses by setting them up (section 5.2.2).
        if features & MQ == 0 {
            rings.truncate(1);
        }
        if !matches!(rings.first(), Some(Some(_))) {
            return Err(Broken::new("the driver runs without its first queue"));
        }
        self.rings = rings;
        self.rules.durable = features & FLUSH == 0;
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { token: TIMER, fd: self.limiter.timer(), edge: false }]
    }

    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken> {
        let Some(Some(ring)) = self.rings.get_mut(usize::from(queue)) else { return Ok(Turn::Done) };
        let Some(budget) = self.limiter.turn(queue, BUDGET, Way::Either)? else { return Ok(Turn::Done) };
        let (disk, rules, tally) = (&mut self.disk, &self.rules, &mut self.tally);
        let before = tally.counters;
        let turn = drain(ring, budget, |chain| Ok(request(disk, rules, tally, chain)));
        self.limiter.took(Way::FromGuest, &before, &self.tally.counters);
        turn
    }

    /// Those who had to wait look again.
    fn on_source(&mut self, _: u16) -> Result<Turn, Broken> {
        for queue in self.limiter.heard() {
            if let Some(Some(ring)) = self.rings.get(usize::from(queue)) {
                let _ = ring.doorbell().write(1);
            }
        }
        Ok(Turn::Done)
    }

    fn reset(&mut self) {
        self.rings.clear();
        self.limiter.reset();
    }

    fn limit(&mut self, limits: Limits) -> io::Result<()> {
        self.limiter.set(limits, Instant::now())
    }

    fn resize(&mut self, bytes: u64) -> io::Result<()> {
        self.disk.grow(bytes, self.rules.read_only)?;
        let queues = u16::try_from(self.sizes.len()).unwrap_or(QUEUES_MAX);
        self.config = config::space(&self.disk, queues).to_vec();
        Ok(())
    }

    fn counters(&self) -> Counters {
        self.tally.counters
    }
}

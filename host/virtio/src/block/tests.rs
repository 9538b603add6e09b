use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use super::request::Refused;
use super::virtio::{Block, BlockConfig};
use super::{DATA_BYTES_MAX, DISCARD_SECTORS_MAX, ZERO_SECTORS_MAX};
use crate::device::{Counters, Device, Memory, Turn};
use crate::driver::{DATA, Driver, END, NEXT, SEAM, WRITE, activation, memory, peek, poke};
use crate::hostile::{Random, Shape, Victim};

const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const HEADER: u64 = DATA;
const STATUS: u64 = DATA + 0x100;
const BUFFER: u64 = DATA + 0x1000;
const SECTORS: u64 = 2048;

struct Bench {
    block: Block,
    memory: Memory,
    queue: Driver,
    /// The disk, to look at.
    file: File,
}

/// A MiB whose bytes tell their sectors.
fn content() -> Vec<u8> {
    (0..SECTORS as usize * 512).map(|at| (at / 512 * 7 + at % 512) as u8).collect()
}

fn disk() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content()).unwrap();
    file
}

fn config(file: &File) -> BlockConfig {
    let file = file.try_clone().unwrap().into();
    BlockConfig { file, read_only: false, direct: false, serial: "serial".to_owned(), queues: 1 }
}

fn bench_of(file: File, change: impl FnOnce(&mut BlockConfig)) -> Bench {
    let mut config = config(&file);
    change(&mut config);
    let memory = memory();
    let mut block = Block::new(config).unwrap();
    let queue = Driver::new(&memory, 0, 64);
    block.activate(activation(&memory, FLUSH, vec![Some(queue.ring(false))])).unwrap();
    Bench { block, memory, queue, file }
}

fn bench() -> Bench {
    bench_of(disk(), |_| {})
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

impl Bench {
    /// A request with these buffers of data between header and status. Returns the status and the length that is given back.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        poke(&self.memory, HEADER, &header(kind, sector));
        poke(&self.memory, STATUS, &[0xaa]);
        let chain = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
        self.queue.chain(&chain);
        // Some are a turn of their own.
        while self.block.on_queue(0).unwrap() == Turn::More {}
        let used = self.queue.used();
        assert_eq!(used.len(), 1);
        (peek(&self.memory, STATUS, 1)[0], used[0].1)
    }

    fn content(&self) -> Vec<u8> {
        let mut file = &self.file;
        file.rewind().unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

#[test]
fn reads_give_what_is_on_the_disk() {
    let mut bench = bench();
    assert_eq!(bench.request(0, 3, &[(BUFFER, 1024, true)]), (OK, 1025));
    assert_eq!(peek(&bench.memory, BUFFER, 1024), content()[3 * 512..5 * 512]);
    assert_eq!(peek(&bench.memory, BUFFER + 1024, 512), [0; 512], "and no more");
    // In pieces of any size, over the seam of two regions.
    assert_eq!(bench.request(0, SECTORS - 2, &[(BUFFER, 1, true), (SEAM - 500, 1023, true)]), (OK, 1025));
    let read = [peek(&bench.memory, BUFFER, 1), peek(&bench.memory, SEAM - 500, 1023)].concat();
    assert_eq!(read, content()[(SECTORS as usize - 2) * 512..]);
    assert!(bench.queue.interrupted());
    let expected = Counters { operations_in: 2, bytes_in: 2048, ..Counters::default() };
    assert_eq!(bench.block.counters(), expected);
    assert_eq!(bench.content(), content());
}

#[test]
fn writes_change_what_they_are_to_and_nothing_else() {
    let mut bench = bench();
    poke(&bench.memory, BUFFER, &[1; 700]);
    poke(&bench.memory, BUFFER + 0x1000, &[2; 324]);
    assert_eq!(bench.request(1, 5, &[(BUFFER, 700, false), (BUFFER + 0x1000, 324, false)]), (OK, 1));
    let mut expected = content();
    expected[5 * 512..5 * 512 + 700].fill(1);
    expected[5 * 512 + 700..7 * 512].fill(2);
    assert_eq!(bench.content(), expected);
    assert_eq!(bench.request(4, 0, &[]), (OK, 1), "flush");
    assert_eq!(bench.block.counters(), Counters { operations_out: 2, bytes_out: 1024, ..Counters::default() });
}

#[test]
fn any_layout_will_do() {
    let mut bench = bench();
    // The header in three descriptors, the last of which has data too.
    poke(&bench.memory, BUFFER, &[header(1, 9), vec![9; 512]].concat());
    bench.queue.chain(&[
        (BUFFER, 5, false),
        (BUFFER + 5, 0, false),
        (BUFFER + 5, 10, false),
        (BUFFER + 15, 513, false),
        (STATUS, 1, true),
    ]);
    // The status is the last byte of the data's descriptor, or the last but for empty ones.
    poke(&bench.memory, HEADER, &header(0, 9));
    bench.queue.chain(&[(HEADER, 16, false), (BUFFER + 0x1000, 513, true)]);
    bench.queue.chain(&[(HEADER, 16, false), (BUFFER + 0x2000, 512, true), (BUFFER + 0x2200, 1, true), (END, 0, true)]);
    assert_eq!(bench.block.on_queue(0).unwrap(), Turn::Done);
    assert_eq!(bench.queue.used().iter().map(|used| used.1).collect::<Vec<_>>(), [1, 513, 513]);
    for at in [0x1000, 0x2000] {
        assert_eq!(peek(&bench.memory, BUFFER + at, 513), [vec![9; 512], vec![OK]].concat());
    }
}

#[test]
fn the_identifier_is_padded() {
    for serial in ["", "disk0", "twenty bytes exactly"] {
        let mut bench = bench_of(disk(), |config| config.serial = serial.to_owned());
        poke(&bench.memory, BUFFER, &[0xff; 32]);
        assert_eq!(bench.request(8, 0, &[(BUFFER, 20, true)]), (OK, 21));
        let mut expected = serial.as_bytes().to_vec();
        expected.resize(20, 0);
        expected.resize(32, 0xff);
        assert_eq!(peek(&bench.memory, BUFFER, 32), expected);
        assert_eq!(bench.request(8, 0, &[(BUFFER, 19, true)]), (IOERR, 1));
        assert_eq!(bench.request(8, 0, &[]), (IOERR, 1));
    }
}

#[test]
fn what_is_not_sound_never_touches_the_disk() {
    let mut bench = bench();
    let big = vec![(BUFFER, 0x4_0000, true); 60];
    let refused = [
        // Beyond the end, by one sector, and where the sum or the product leaves 64 bits.
        (0, SECTORS, vec![(BUFFER, 512, true)]),
        (0, SECTORS - 1, vec![(BUFFER, 1024, true)]),
        (0, u64::MAX, vec![(BUFFER, 512, true)]),
        (0, u64::MAX / 512 + 1, vec![(BUFFER, 512, true)]),
        (1, SECTORS, vec![(BUFFER, 512, false)]),
        (1, SECTORS - 1, vec![(BUFFER, 1024, false)]),
        (1, u64::MAX, vec![(BUFFER, 512, false)]),
        // Not whole sectors, and none.
        (0, 0, vec![(BUFFER, 511, true)]),
        (0, 0, vec![(BUFFER, 513, true)]),
        (1, 0, vec![(BUFFER, 700, false)]),
        (0, 0, vec![]),
        (1, 0, vec![]),
        // The wrong direction, or both.
        (0, 0, vec![(BUFFER, 512, false)]),
        (1, 0, vec![(BUFFER, 512, true)]),
        (0, 0, vec![(BUFFER, 512, false), (BUFFER, 512, true)]),
        (1, 0, vec![(BUFFER, 512, false), (BUFFER, 512, true)]),
        // More than the disk has.
        (0, 0, big),
    ];
    let count = refused.len() as u64;
    for (kind, sector, data) in refused {
        assert_eq!(bench.request(kind, sector, &data), (IOERR, 1), "{kind} {sector} {data:?}");
    }
    for kind in [2, 3, 5, 10, 14, 15, 16, u32::MAX, 0x8000_0001] {
        assert_eq!(bench.request(kind, 0, &[(BUFFER, 512, false)]), (UNSUPP, 1));
    }
    assert_eq!(bench.content(), content());
    assert_eq!(peek(&bench.memory, BUFFER, 4096), [0; 4096]);
    assert_eq!(bench.block.counters(), Counters { errors: count + 9, ..Counters::default() });
}

#[test]
fn a_request_has_a_bound_however_large_the_disk_is() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    let mut bench = bench_of(file, |_| {});
    bench.queue = Driver::new(&bench.memory, 0, 256);
    bench.block.activate(activation(&bench.memory, FLUSH, vec![Some(bench.queue.ring(false))])).unwrap();
    let pieces = DATA_BYTES_MAX / 0x4_0000;
    let mut data = vec![(BUFFER, 0x4_0000, true); pieces];
    assert_eq!(bench.request(0, 0, &data), (OK, DATA_BYTES_MAX as u32 + 1));
    data[0].1 += 512;
    assert_eq!(bench.request(0, 0, &data), (IOERR, 1));
    // A turn ends with the request that passes its bound.
    bench.queue.slot = 0;
    poke(&bench.memory, HEADER, &header(0, 0));
    for _ in 0..3 {
        bench.queue.chain(&[&[(HEADER, 16, false)], &data[1..50], &[(STATUS, 1, true)]].concat());
    }
    assert_eq!(bench.block.on_queue(0).unwrap(), Turn::More);
    assert_eq!(bench.queue.used().len(), 2, "12 MiB each");
    assert_eq!(bench.block.on_queue(0).unwrap(), Turn::Done);
    assert_eq!(bench.queue.used().len(), 1);
}

#[test]
fn a_turn_is_bounded_by_requests_too() {
    let mut bench = bench();
    poke(&bench.memory, HEADER, &header(4, 0));
    for _ in 0..31 {
        bench.queue.chain(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    poke(&bench.memory, HEADER, &header(8, 0));
    bench.queue.slot = 0;
    for _ in 0..2 {
        bench.queue.chain(&[(HEADER, 16, false), (STATUS, 1, true)]);
    }
    assert_eq!(bench.block.on_queue(0).unwrap(), Turn::More);
    assert_eq!(bench.queue.used().len(), 32);
    assert_eq!(bench.block.on_queue(0).unwrap(), Turn::Done);
    assert_eq!(bench.queue.used().len(), 1);
}

#[test]
fn chains_of_no_sense_are_given_back() {
    let mut bench = bench();
    poke(&bench.memory, HEADER, &header(1, 0));
    // Without a place for the status.
    bench.queue.chain(&[(HEADER, 16, false), (BUFFER, 512, false)]);
    bench.queue.chain(&[(HEADER, 16, false), (STATUS, 0, true)]);
    // Data, header or status outside memory.
    bench.queue.chain(&[(HEADER, 16, false), (END - 511, 512, false), (STATUS, 1, true)]);
    bench.queue.chain(&[(u64::MAX - 15, 16, false), (BUFFER, 512, false), (STATUS, 1, true)]);
    bench.queue.chain(&[(HEADER, 16, false), (BUFFER, 512, false), (END, 1, true)]);
    // A loop, and a status before the data.
    bench.queue.table(40, HEADER, 16, NEXT, 41);
    bench.queue.table(41, BUFFER, 512, NEXT, 42);
    bench.queue.table(42, STATUS, 1, WRITE | NEXT, 41);
    bench.queue.offer(40);
    bench.queue.chain(&[(HEADER, 16, false), (STATUS, 1, true), (BUFFER, 512, false)]);
    assert_eq!(bench.block.on_queue(0).unwrap(), Turn::Done);
    assert_eq!(bench.queue.used().iter().map(|used| used.1).collect::<Vec<_>>(), [0; 7]);
    // A header that is cut off has a place for its status.
    poke(&bench.memory, STATUS, &[0xaa]);
    bench.queue.chain(&[(HEADER, 15, false), (STATUS, 1, true)]);
    bench.queue.chain(&[(STATUS + 1, 1, true)]);
    assert_eq!(bench.block.on_queue(0).unwrap(), Turn::Done);
    assert_eq!(bench.queue.used().iter().map(|used| used.1).collect::<Vec<_>>(), [1; 2]);
    assert_eq!(peek(&bench.memory, STATUS, 2), [IOERR; 2]);
    assert_eq!(bench.content(), content());
    assert_eq!(bench.block.counters(), Counters { errors: 9, ..Counters::default() });
    bench.queue.offer(64);
    assert!(bench.block.on_queue(0).is_err(), "there is no such descriptor");
}

#[test]
fn what_is_read_only_stays_as_it_is() {
    // Though the file could be written.
    let mut bench = bench_of(disk(), |config| config.read_only = true);
    assert_eq!(bench.block.features() & (RO | DISCARD | WRITE_ZEROES), RO);
    assert_eq!(bench.request(1, 0, &[(BUFFER, 512, false)]), (IOERR, 1));
    poke(&bench.memory, BUFFER, &range(0, 8, 0));
    assert_eq!(bench.request(11, 0, &[(BUFFER, 16, false)]), (IOERR, 1));
    assert_eq!(bench.request(13, 0, &[(BUFFER, 16, false)]), (IOERR, 1));
    assert_eq!(bench.request(4, 0, &[]), (OK, 1));
    assert_eq!(bench.request(0, 0, &[(BUFFER, 512, true)]), (OK, 513));
    assert_eq!(bench.content(), content());
}

#[test]
fn zeros_are_written_and_holes_are_made() {
    let mut bench = bench();
    let mut expected = content();
    for (kind, flags, sector) in [(13, 0, 100), (13, 1, 200), (11, 0, 304)] {
        poke(&bench.memory, BUFFER, &range(sector, 16, flags));
        assert_eq!(bench.request(kind, 0, &[(BUFFER, 7, false), (BUFFER + 7, 9, false)]), (OK, 1));
        expected[sector as usize * 512..][..16 * 512].fill(0);
    }
    assert_eq!(bench.content(), expected);
    // Several at once, a page each, which a file system gives back.
    let before = bench.file.metadata().unwrap().blocks();
    poke(&bench.memory, BUFFER, &(0..16).flat_map(|index| range(1024 + 16 * index, 8, 0)).collect::<Vec<_>>());
    assert_eq!(bench.request(11, 0, &[(BUFFER, 256, false)]), (OK, 1));
    assert_eq!(bench.file.metadata().unwrap().blocks(), before - 16 * 8);
    let metadata = bench.file.metadata().unwrap();
    assert_eq!(metadata.len(), SECTORS * 512, "it stays as long as it was");
}

#[test]
fn ranges_of_no_sense_touch_nothing() {
    let mut bench = bench();
    let mut refuse = |kind: u32, ranges: &[u8], status: u8| {
        poke(&bench.memory, BUFFER, ranges);
        assert_eq!(bench.request(kind, 0, &[(BUFFER, ranges.len() as u32, false)]), (status, 1), "{kind} {ranges:?}");
    };
    for kind in [11, 13] {
        refuse(kind, &[], IOERR);
        refuse(kind, &range(0, 1, 0)[..15], IOERR);
        refuse(kind, &[range(0, 1, 0), vec![0]].concat(), IOERR);
        refuse(kind, &range(0, 0, 0), IOERR);
        refuse(kind, &range(SECTORS, 1, 0), IOERR);
        refuse(kind, &range(SECTORS - 1, 2, 0), IOERR);
        refuse(kind, &range(u64::MAX, 1, 0), IOERR);
        refuse(kind, &range(u64::MAX / 512, 1, 0), IOERR);
        refuse(kind, &range(0, u32::MAX, 0), IOERR);
        // A good one before a bad one does not happen either.
        refuse(kind, &[range(0, 1, 0), range(SECTORS, 1, 0)].concat(), IOERR);
        refuse(kind, &range(0, 1, 2), UNSUPP);
        refuse(kind, &range(0, 1, 1 << 31), UNSUPP);
    }
    refuse(11, &range(0, 1, 1), UNSUPP);
    refuse(11, &(0..17).flat_map(|index| range(index, 1, 0)).collect::<Vec<_>>(), IOERR);
    refuse(13, &(0..2).flat_map(|index| range(index, 1, 0)).collect::<Vec<_>>(), IOERR);
    assert_eq!(bench.content(), content());
    // The bounds on a disk that has so many sectors.
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    let mut bench = bench_of(file, |_| {});
    for (kind, max) in [(11, DISCARD_SECTORS_MAX), (13, ZERO_SECTORS_MAX)] {
        poke(&bench.memory, BUFFER, &range(0, max, 0));
        assert_eq!(bench.request(kind, 0, &[(BUFFER, 16, false)]), (OK, 1));
        poke(&bench.memory, BUFFER, &range(0, max + 1, 0));
        assert_eq!(bench.request(kind, 0, &[(BUFFER, 16, false)]), (IOERR, 1));
    }
}

#[test]
fn a_disk_that_fails_is_an_error_of_the_request_only() {
    let mut bench = bench();
    bench.file.set_len(1024).unwrap();
    assert_eq!(bench.request(0, 0, &[(BUFFER, 1024, true)]), (OK, 1025));
    assert_eq!(bench.request(0, 1, &[(BUFFER, 1024, true)]), (IOERR, 513), "what there was");
    assert_eq!(bench.request(0, 10, &[(BUFFER, 512, true)]), (IOERR, 1));
    assert_eq!(bench.block.counters().errors, 2);
    assert_eq!(bench.request(0, 0, &[(BUFFER, 1024, true)]), (OK, 1025));
}

#[test]
fn what_the_driver_reads() {
    let number = |block: &Block, at: usize, count: usize| {
        let mut bytes = [0; 8];
        bytes[..count].copy_from_slice(&block.config()[at..at + count]);
        u64::from_le_bytes(bytes)
    };
    let file = disk();
    file.set_len(SECTORS * 512 + 511).unwrap();
    let mut config = config(&file);
    config.queues = 3;
    let block = Block::new(config).unwrap();
    assert_eq!(number(&block, 0, 8), SECTORS, "what is left over is not the guest's");
    assert_eq!((number(&block, 8, 4), number(&block, 12, 4), number(&block, 20, 4)), (0x4_0000, 254, 512));
    let (exponent, io) = (number(&block, 24, 1), number(&block, 26, 2));
    assert_eq!(1 << exponent, io);
    assert_eq!(io * 512, file.metadata().unwrap().blksize().clamp(512, 65536));
    assert_eq!(number(&block, 34, 2), 3);
    assert_eq!((number(&block, 36, 4), number(&block, 40, 4)), (1 << 21, 16));
    assert_eq!((number(&block, 48, 4), number(&block, 52, 4)), (1 << 17, 1));
    assert_eq!(block.config().len(), 60);
    assert_eq!(block.queue_sizes(), [256; 3]);
    assert_eq!(block.features() & MQ, MQ);
    assert_eq!(number(&block, 56, 1) == 1, block.features() & DISCARD != 0);
}

#[test]
fn what_can_not_be_is_refused() {
    let file = disk();
    let refuse = |change: &dyn Fn(&mut BlockConfig)| {
        let mut config = config(&file);
        change(&mut config);
        assert_eq!(Block::new(config).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    };
    refuse(&|config| config.serial = "twenty-one bytes long".to_owned());
    refuse(&|config| config.serial = "ß".to_owned());
    refuse(&|config| config.queues = 0);
    refuse(&|config| config.queues = 65);
    refuse(&|config| config.file = File::open("/dev/null").unwrap().into());
    refuse(&|config| config.file = File::open("/proc/self/exe").unwrap().into());
    refuse(&|config| config.file = tempfile::tempfile().unwrap().into());
    refuse(&|config| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(511).unwrap();
        config.file = file.into();
    });
    refuse(&|config| config.file = File::options().write(true).open("/dev/null").unwrap().into());
    let mut only = config(&file);
    (only.file, only.read_only) = (File::open("/proc/self/exe").unwrap().into(), true);
    Block::new(only).unwrap();
}

#[test]
fn every_queue_is_served_that_the_driver_has_set_up() {
    let memory = memory();
    let mut config = config(&disk());
    config.queues = 3;
    let mut block = Block::new(config).unwrap();
    let mut queues: Vec<_> = (0..3).map(|index| Driver::new(&memory, index, 64)).collect();
    let rings = |wanted: [bool; 3]| {
        wanted.iter().zip(&queues).map(|(wanted, queue)| wanted.then(|| queue.ring(true))).collect()
    };
    block.activate(activation(&memory, MQ, rings([false, true, true]))).unwrap_err();
    block.activate(activation(&memory, MQ, vec![])).unwrap_err();
    block.activate(activation(&memory, MQ, rings([true, false, true]))).unwrap();
    poke(&memory, HEADER, &header(8, 0));
    let mut serve = |block: &mut Block| {
        let mut served = Vec::new();
        for index in 0..4 {
            if let Some(queue) = queues.get_mut(usize::from(index)) {
                queue.chain(&[(HEADER, 16, false), (BUFFER, 20, true), (STATUS, 1, true)]);
            }
            assert_eq!(block.on_queue(index).unwrap(), Turn::Done);
            served.push(queues.get_mut(usize::from(index)).map_or(0, |queue| queue.used().len()));
        }
        (served, queues.iter().map(Driver::wants_doorbell_after).collect::<Vec<_>>())
    };
    assert_eq!(serve(&mut block), (vec![1, 0, 1, 0], vec![1, 0, 1]));
    block.reset();
    assert_eq!(serve(&mut block).0, [0; 4]);
    let queues: Vec<_> = (0..3).map(|index| Driver::new(&memory, index, 64)).collect();
    let rings = queues.iter().map(|queue| Some(queue.ring(false))).collect();
    block.activate(activation(&memory, 0, rings)).unwrap();
    let mut queues = queues;
    queues[1].chain(&[(HEADER, 16, false), (BUFFER, 20, true), (STATUS, 1, true)]);
    assert_eq!(block.on_queue(1).unwrap(), Turn::Done);
    assert_eq!(queues[1].used(), [], "there is one queue for a driver that knows of one");
}

/// Pages of a file that the kernel has yet to write (cachestat(2)). `None` where it doesn't tell.
fn unwritten(file: &File) -> Option<u64> {
    use std::os::fd::AsRawFd;
    /// `__NR_cachestat`, which is the same on all architectures.
    const CACHESTAT: libc::c_long = 451;
    let (range, mut pages) = ([0_u64; 2], [0_u64; 5]);
    // SAFETY: the kernel reads two numbers and writes five, which both live during the call.
    #[expect(unsafe_code, reason = "a system call without a safe wrapper")]
    let result = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), pages.as_mut_ptr(), 0) };
    (result == 0).then_some(pages[1] + pages[2])
}

#[test]
fn a_write_is_safe_when_it_is_done_or_when_it_is_flushed() {
    let mut bench = bench();
    if unwritten(&bench.file).is_none_or(|pages| pages == 0) {
        eprintln!("skipped: the kernel does not tell what it has yet to write");
        return;
    }
    let queue = &bench.queue;
    // Without flushes, for a driver that knows of none.
    bench.block.activate(activation(&bench.memory, 0, vec![Some(queue.ring(false))])).unwrap();
    assert_eq!(bench.request(1, 0, &[(BUFFER, 512, false)]), (OK, 1));
    assert_eq!(unwritten(&bench.file), Some(0));
    bench.queue = Driver::new(&bench.memory, 0, 64);
    bench.block.activate(activation(&bench.memory, FLUSH, vec![Some(bench.queue.ring(false))])).unwrap();
    // The kernel may write of itself at any time, but not each time.
    let waits = (0..5).any(|_| {
        assert_eq!(bench.request(1, 0, &[(BUFFER, 512, false)]), (OK, 1));
        unwritten(&bench.file) != Some(0)
    });
    assert!(waits);
    assert_eq!(bench.request(4, 0, &[]), (OK, 1));
    assert_eq!(unwritten(&bench.file), Some(0));
}

#[test]
fn zeros_are_written_one_by_one_where_the_file_system_knows_no_better() {
    // A tmpfs makes holes, but has no ranges of zeros.
    let Ok(mut file) = tempfile::tempfile_in("/dev/shm") else {
        eprintln!("skipped: no tmpfs here");
        return;
    };
    file.write_all(&content()).unwrap();
    let mut bench = bench_of(file, |_| {});
    let before = bench.file.metadata().unwrap().blocks();
    poke(&bench.memory, BUFFER, &range(1, 1200, 0));
    assert_eq!(bench.request(13, 0, &[(BUFFER, 16, false)]), (OK, 1));
    let mut expected = content();
    expected[512..1201 * 512].fill(0);
    assert!(bench.content() == expected);
    assert_eq!(bench.file.metadata().unwrap().blocks(), before, "nothing is given back that is not to be");
    poke(&bench.memory, BUFFER, &range(0, 1200, 1));
    assert_eq!(bench.request(13, 0, &[(BUFFER, 16, false)]), (OK, 1));
    assert_eq!(bench.file.metadata().unwrap().blocks(), before - 1200);
}

#[test]
fn what_the_host_does_not_do_is_unsupported() {
    for number in [libc::EOPNOTSUPP, libc::ENOSYS] {
        let refused = Refused::Failed(std::io::Error::from_raw_os_error(number));
        assert_eq!(refused.status() as u8, UNSUPP);
    }
    let refused = Refused::Failed(std::io::Error::from_raw_os_error(libc::EIO));
    assert_eq!(refused.status() as u8, IOERR);
}

/// Another open file of the same disk, past the page cache. `None` where the file system has no such thing.
fn direct(file: &File) -> Option<File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path);
    if let Err(error) = &opened {
        eprintln!("skipped: no O_DIRECT here: {error}");
    }
    opened.ok()
}

#[test]
fn misaligned_buffers_do_past_the_page_cache() {
    let file = disk();
    file.sync_all().unwrap();
    let Some(unbuffered) = direct(&file) else { return };
    let mut bench = bench_of(unbuffered, |config| config.direct = true);
    let block = u32::from_le_bytes(bench.block.config()[20..24].try_into().unwrap());
    let bytes = 64 * block;
    for (address, first) in [(BUFFER, bytes), (BUFFER, 100), (BUFFER + 1, bytes), (BUFFER + 3, block + 5)] {
        let mut pieces = vec![(address, first, true)];
        if first < bytes {
            pieces.push((address + u64::from(first) + 7, bytes - first, true));
        }
        assert_eq!(bench.request(0, 256, &pieces), (OK, bytes + 1));
        let read: Vec<_> =
            pieces.iter().flat_map(|(address, length, _)| peek(&bench.memory, *address, *length as usize)).collect();
        assert_eq!(read, content()[256 * 512..][..bytes as usize]);
        let pattern: Vec<_> = (0..bytes).map(|at| (at as u64 * 3 + address) as u8).collect();
        let mut at = 0;
        for piece in &mut pieces {
            poke(&bench.memory, piece.0, &pattern[at..at + piece.1 as usize]);
            at += piece.1 as usize;
            piece.2 = false;
        }
        assert_eq!(bench.request(1, 1024, &pieces), (OK, 1));
        let mut written = vec![0; bytes as usize];
        file.read_exact_at(&mut written, 1024 * 512).unwrap();
        assert_eq!(written, pattern);
    }
    // More than the buffer takes at once.
    let large = 0x8_0000;
    assert_eq!(bench.request(0, 0, &[(BUFFER + 1, large, true)]), (OK, large + 1));
    assert_eq!(peek(&bench.memory, BUFFER + 1, large as usize), content()[..large as usize]);
}

/// Requests that are nearly right.
fn requests(random: &mut Random) -> Vec<u8> {
    let kind = random.of(&[0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 2, u32::MAX]);
    let sector = match random.within(0..16) {
        0 => random.next(),
        1 => SECTORS - random.within(0..3),
        2 => u64::MAX - random.within(0..3),
        _ => random.within(0..SECTORS),
    };
    let mut bytes = header(kind, sector);
    if kind != 11 && kind != 13 && !random.once_in(16) {
        return bytes;
    }
    for _ in 0..random.of(&[0, 1, 1, 1, 2, 16, 17]) {
        let sectors = random.of(&[0, 1, 8, 100, u32::MAX]);
        bytes.extend(range(random.within(0..SECTORS + 2), sectors, random.of(&[0, 0, 0, 1, 2])));
    }
    bytes
}

fn torment(read_only: bool, unbuffered: bool, work: impl FnOnce(Victim<'_>)) {
    // Thousands of flushes are a matter of memory, where that will do.
    let mut file = if unbuffered { tempfile::tempfile() } else { tempfile::tempfile_in("/dev/shm") }
        .or_else(|_| tempfile::tempfile())
        .unwrap();
    file.write_all(&content()).unwrap();
    file.sync_all().unwrap();
    let used = if unbuffered { direct(&file) } else { None };
    let mut config = config(used.as_ref().unwrap_or(&file));
    (config.read_only, config.direct, config.queues) = (read_only, used.is_some(), 3);
    work(Victim {
        device: Box::new(Block::new(config).unwrap()),
        features: FLUSH | MQ,
        shape: |_| Shape::Both,
        lengths: &[512, 512, 1024, 4096, 20],
        header: &requests,
        host: &mut |_| {},
        memory_max: 1 << 20,
        moved_max: (16 << 20) + DATA_BYTES_MAX as u64,
    });
    assert_eq!(file.metadata().unwrap().len(), SECTORS * 512, "the disk stays as long as it was");
    let mut now = vec![0; SECTORS as usize * 512];
    file.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(now == content(), read_only);
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    torment(false, false, |victim| victim.torment(2, 20_000));
}

#[test]
fn a_hostile_driver_gets_nowhere_past_the_page_cache() {
    torment(false, true, |victim| victim.torment(22, 3_000));
}

#[test]
fn a_hostile_driver_writes_nothing_that_is_read_only() {
    torment(true, false, |victim| victim.torment(222, 20_000));
}

#[test]
fn a_driver_that_changes_its_rings_gets_nowhere() {
    torment(false, false, |victim| victim.torment_while_it_changes(2, 5_000));
}

#[test]
fn a_limit_holds_requests_back_until_it_is_another() {
    use crate::limit::{Limits, Rate};
    let file = disk();
    let memory = memory();
    let mut block = Block::new(config(&file)).unwrap();
    let mut queue = Driver::new(&memory, 0, 64);
    let ring = queue.ring(false);
    let doorbell = ring.doorbell().try_clone().unwrap();
    block.activate(activation(&memory, FLUSH, vec![Some(ring)])).unwrap();
    let slow = Rate { bytes_per_second: 0, operations_per_second: 1 };
    block.limit(Limits { to_guest: slow, ..Limits::default() }).unwrap();
    // Until the limit's own news was heard.
    assert_eq!(block.on_source(0).unwrap(), Turn::Done);
    poke(&memory, HEADER, &header(0, 0));
    for _ in 0..4 {
        queue.chain(&[(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)]);
    }
    assert_eq!(block.on_queue(0).unwrap(), Turn::More);
    assert_eq!(queue.used().len(), 1, "one a second");
    assert_eq!(block.on_queue(0).unwrap(), Turn::Done, "the timer tells when there is more to do");
    assert_eq!((queue.used().len(), doorbell.read().is_err()), (0, true));
    block.limit(Limits { from_guest: slow, ..Limits::default() }).unwrap();
    assert_eq!(block.on_source(0).unwrap(), Turn::Done);
    assert!(doorbell.read().is_ok(), "it is to look again");
    while block.on_queue(0).unwrap() == Turn::More {}
    assert_eq!(queue.used().len(), 3, "what is read is not limited any more");
    // A driver that begins anew has nothing that waits.
    block.limit(Limits { to_guest: slow, ..Limits::default() }).unwrap();
    block.reset();
    assert_eq!(block.on_source(0).unwrap(), Turn::Done);
    assert!(doorbell.read().is_err());
}

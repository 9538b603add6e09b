use std::cell::RefCell;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestRegionMmap};

use super::tap::Request;
use super::virtio::Net;
use super::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES};
use crate::device::{Broken, Counters, Device, Memory, Turn};
use crate::driver::{DATA, Driver, END, NEXT, WRITE, activation, memory, peek, poke};
use crate::hostile::{Random, Shape, Victim};

const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RX: u16 = 0;
const TX: u16 = 1;

thread_local! {
    static ASKED: RefCell<Vec<Request>> = const { RefCell::new(Vec::new()) };
    static REFUSED: RefCell<Option<Request>> = const { RefCell::new(None) };
}

/// Instead of the kernel, which knows no such requests of a socket.
fn ask(_: BorrowedFd<'_>, request: Request) -> io::Result<()> {
    ASKED.with_borrow_mut(|asked| asked.push(request));
    if REFUSED.with_borrow(|refused| *refused == Some(request)) {
        Err(io::ErrorKind::Unsupported.into())
    } else {
        Ok(())
    }
}

/// Two ends of what keeps frames apart, as a tap does.
fn link() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap()
}

struct Bench {
    net: Net,
    memory: Memory,
    /// The other ends of the taps.
    peers: Vec<OwnedFd>,
    queues: Vec<Driver>,
}

fn bench(pairs: usize, features: u64) -> Bench {
    bench_of(pairs, features, false, 64)
}

fn bench_of(pairs: usize, features: u64, event_idx: bool, size: u16) -> Bench {
    let (taps, peers): (Vec<_>, Vec<_>) = (0..pairs).map(|_| link()).unzip();
    let memory = memory();
    let mut net = Net::with(taps, MAC, ask).unwrap();
    let count = net.queue_sizes().len() as u16;
    let queues: Vec<_> = (0..count).map(|index| Driver::new(&memory, index, size)).collect();
    let rings = queues.iter().map(|queue| Some(queue.ring(event_idx))).collect();
    net.activate(activation(&memory, features, rings)).unwrap();
    Bench { net, memory, peers, queues }
}

/// A packet with its header, whose bytes count up.
fn packet(frame: usize) -> Vec<u8> {
    let header = [0; HEADER_BYTES].into_iter();
    header.chain((0..frame).map(|index| (index % 251) as u8)).collect()
}

impl Bench {
    fn arrive(&self, pair: usize, packet: &[u8]) {
        send(&self.peers[pair], packet, SendFlags::empty()).unwrap();
    }

    fn departed(&self, pair: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        let (count, _) = recv(&self.peers[pair], bytes.as_mut_slice(), RecvFlags::empty()).ok()?;
        bytes.truncate(count);
        Some(bytes)
    }
}

#[test]
fn frames_leave_as_they_are() {
    let mut bench = bench(1, 0);
    let whole = packet(100);
    poke(&bench.memory, DATA, &whole);
    bench.queues[1].chain(&[(DATA, 112, false)]);
    bench.queues[1].chain(&[(DATA, 5, false), (DATA + 5, 20, false), (DATA + 25, 87, false)]);
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[1].used(), [(0, 0), (1, 0)]);
    assert!(bench.queues[1].interrupted());
    assert_eq!((bench.departed(0).unwrap(), bench.departed(0).unwrap()), (whole.clone(), whole));
    assert_eq!(bench.departed(0), None);
    assert_eq!(bench.net.counters(), Counters { operations_out: 2, bytes_out: 200, ..Counters::default() });
}

#[test]
fn frames_of_no_sense_are_dropped_and_counted() {
    let mut bench = bench(1, 0);
    let (min, max) = ((HEADER_BYTES + FRAME_BYTES_MIN) as u32, (HEADER_BYTES + FRAME_BYTES_MAX) as u32);
    let tx = &mut bench.queues[1];
    tx.chain(&[(DATA, min - 1, false)]);
    tx.chain(&[(DATA, max + 1, false)]);
    tx.chain(&[(DATA, 100, true)]);
    tx.chain(&[(END - 50, 100, false)]);
    tx.chain(&[(DATA, 0, false)]);
    tx.table(20, DATA, 100, NEXT, 20);
    tx.offer(20);
    tx.chain(&[(DATA, min, false)]);
    tx.chain(&[(DATA, max, false)]);
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[1].used().len(), 8);
    assert_eq!(bench.departed(0).unwrap().len(), min as usize);
    assert_eq!(bench.departed(0).unwrap().len(), max as usize);
    assert_eq!(bench.departed(0), None);
    let counters = bench.net.counters();
    assert_eq!((counters.operations_out, counters.errors), (2, 6));
}

#[test]
fn a_tap_that_is_full_loses_frames_and_holds_nobody_up() {
    let mut bench = bench(1, 0);
    let mut lost = 0;
    for _ in 0..40 {
        for _ in 0..32 {
            bench.queues[1].chain(&[(DATA, 60_000, false)]);
        }
        assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
        assert_eq!(bench.queues[1].used().len(), 32);
        lost = bench.net.counters().errors;
    }
    assert!(lost > 0 && bench.net.counters().operations_out > 0);
    // A link that is gone loses all.
    bench.peers.clear();
    bench.queues[1].chain(&[(DATA, 60, false)]);
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
    assert_eq!(bench.net.counters().errors, lost + 1);
}

#[test]
fn a_turn_of_transmitting_is_bounded() {
    let mut bench = bench_of(1, 0, false, 256);
    for _ in 0..65 {
        bench.queues[1].chain(&[(DATA, 60, false)]);
    }
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::More);
    assert_eq!(bench.queues[1].used().len(), 64);
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[1].used().len(), 1);
}

#[test]
fn packets_arrive_in_one_buffer_or_in_several() {
    for (features, count) in [(0, 1), (MRG_RXBUF, 1), (MRG_RXBUF, 3)] {
        let mut bench = bench(1, features);
        let room = if count == 1 { 2000 } else { 500 };
        for buffer in 0..4 {
            let at = DATA + 0x1000 * buffer;
            bench.queues[0].chain(&[(at, 12, true), (at + 12, room - 12, true)]);
        }
        let whole = packet(1200);
        bench.arrive(0, &whole);
        assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done);
        assert!(bench.queues[0].interrupted());
        let used = bench.queues[0].used();
        assert_eq!(used.len(), count);
        let pieces: Vec<_> =
            (0..).zip(&used).map(|(index, used)| peek(&bench.memory, DATA + 0x1000 * index, used.1 as usize)).collect();
        let mut expected = whole;
        expected[10] = count as u8;
        assert_eq!(pieces.concat(), expected);
        assert_eq!(bench.net.counters(), Counters { operations_in: 1, bytes_in: 1200, ..Counters::default() });
    }
}

#[test]
fn a_packet_waits_for_buffers() {
    let mut bench = bench_of(1, MRG_RXBUF, true, 64);
    bench.arrive(0, &packet(1200));
    bench.arrive(0, &packet(100));
    bench.queues[0].chain(&[(DATA, 500, true)]);
    bench.queues[0].chain(&[(DATA + 0x1000, 500, true)]);
    for _ in 0..3 {
        assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done, "it must not turn while the guest has no room");
        assert_eq!(bench.queues[0].used(), []);
        assert_eq!(bench.queues[0].wants_doorbell_after(), 2, "the two that are there do not do");
    }
    bench.queues[0].chain(&[(DATA + 0x2000, 500, true)]);
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used(), [(0, 500), (1, 500), (2, 212)]);
    assert_eq!(bench.queues[0].wants_doorbell_after(), 3, "the second packet waits");
    bench.queues[0].chain(&[(DATA, 500, true)]);
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used(), [(3, 112)]);
    assert_eq!(peek(&bench.memory, DATA + 12, 100), packet(100)[12..]);
    assert_eq!(bench.net.counters().errors, 0);
}

#[test]
fn the_tap_is_read_again_only_when_it_tells() {
    let mut bench = bench(1, 0);
    for _ in 0..4 {
        bench.queues[0].chain(&[(DATA, 2000, true)]);
    }
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done, "there may have been something before it was watched");
    bench.arrive(0, &packet(60));
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used(), []);
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used().len(), 1);
}

#[test]
fn buffers_may_lie_in_memory_that_was_added() {
    let mut bench = bench(1, MRG_RXBUF);
    let region = GuestRegionMmap::from_range(GuestAddress(END), 0x1_0000, None).unwrap();
    let more = bench.memory.memory().insert_region(Arc::new(region)).unwrap();
    bench.memory.lock().unwrap().replace(more);
    bench.queues[0].chain(&[(END - 100, 1000, true)]);
    bench.arrive(0, &packet(600));
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used(), [(0, 612)]);
    assert_eq!(peek(&bench.memory, END - 88, 600), packet(600)[12..]);
    bench.queues[1].chain(&[(END - 100, 612, false)]);
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
    assert_eq!(bench.departed(0).unwrap()[12..], packet(600)[12..]);
}

#[test]
fn a_turn_of_receiving_is_bounded_and_remembers_the_rest() {
    let mut bench = bench_of(1, MRG_RXBUF, false, 256);
    for _ in 0..100 {
        bench.queues[0].chain(&[(DATA, 2000, true)]);
        bench.arrive(0, &packet(60));
    }
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::More);
    assert_eq!(bench.queues[0].used().len(), 64);
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used().len(), 36);
}

#[test]
fn packets_without_a_place_are_dropped_and_counted() {
    // One buffer must do without mergeable buffers: it stays for a packet that fits.
    let mut bench = bench(1, 0);
    bench.queues[0].chain(&[(DATA, 500, true)]);
    bench.queues[0].chain(&[(DATA + 0x1000, 2000, true)]);
    bench.arrive(0, &packet(1200));
    bench.arrive(0, &packet(400));
    bench.arrive(0, &packet(1200));
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used(), [(0, 412), (1, 1212)]);
    assert_eq!(bench.net.counters().errors, 1);

    // A queue that is all offered, and too small, will never be enough.
    let mut bench = bench_of(1, MRG_RXBUF, false, 4);
    for index in 0..4 {
        bench.queues[0].chain(&[(DATA + 0x1000 * index, if index == 2 { 0 } else { 100 }, true)]);
    }
    bench.arrive(0, &packet(1200));
    bench.arrive(0, &packet(200));
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used(), [(0, 100), (1, 100), (2, 0), (3, 12)]);
    assert_eq!(bench.net.counters().errors, 1);
    assert_eq!(peek(&bench.memory, DATA + 10, 2), [4, 0]);

    // Too short and too long.
    let mut bench = self::bench(1, MRG_RXBUF);
    for _ in 0..2 {
        bench.queues[0].chain(&[(DATA, 0x2_0000, true)]);
    }
    bench.arrive(0, &packet(FRAME_BYTES_MIN - 1));
    bench.arrive(0, &packet(FRAME_BYTES_MAX + 1));
    bench.arrive(0, &packet(FRAME_BYTES_MIN));
    bench.arrive(0, &packet(FRAME_BYTES_MAX));
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done);
    let lengths: Vec<_> = bench.queues[0].used().iter().map(|used| used.1 as usize).collect();
    assert_eq!(lengths, [HEADER_BYTES + FRAME_BYTES_MIN, HEADER_BYTES + FRAME_BYTES_MAX]);
    assert_eq!(bench.net.counters().errors, 2);
}

#[test]
fn receive_buffers_of_no_sense_break_the_device() {
    let nonsense: [fn(&mut Driver); 4] = [
        |rx| {
            rx.chain(&[(DATA, 2000, false)]);
        },
        |rx| {
            rx.chain(&[(END, 2000, true)]);
        },
        |rx| {
            rx.table(0, DATA, 10, WRITE | NEXT, 0);
            rx.offer(0);
        },
        |rx| rx.jump(65),
    ];
    for offer in nonsense {
        let mut bench = bench(1, MRG_RXBUF);
        offer(&mut bench.queues[0]);
        bench.arrive(0, &packet(100));
        bench.net.on_source(0).unwrap_err();
        assert_eq!(bench.queues[0].used(), []);
    }
}

#[test]
fn buffers_of_many_descriptors_are_not_counted_over_and_over() {
    let mut bench = bench_of(1, MRG_RXBUF, false, 64);
    // 64 chains over the same table of 1024 descriptors that cover nothing.
    for slot in 0..1024 {
        let next = if slot == 1023 { 0 } else { NEXT };
        bench.queues[0].indirect(DATA, slot, DATA, 0, WRITE | next, slot + 1);
    }
    for slot in 0..64 {
        bench.queues[0].table(slot, DATA, 16 * 1024, crate::driver::INDIRECT, 0);
        bench.queues[0].offer(slot);
    }
    for _ in 0..10 {
        bench.arrive(0, &packet(100));
    }
    let mut turns = 1;
    while bench.net.on_source(0).unwrap() == Turn::More {
        turns += 1;
    }
    assert_eq!((turns, bench.net.counters().errors), (11, 10), "one packet is all that a turn may look for");
    assert_eq!(bench.queues[0].used(), []);
    // Nor is the room found that is behind them.
    bench.queues[0].table(10, DATA + 0x8000, 2000, WRITE, 0);
    bench.arrive(0, &packet(100));
    while bench.net.on_source(0).unwrap() == Turn::More {}
    assert_eq!(bench.net.counters().errors, 11);
    bench.queues[0].table(4, DATA + 0x8000, 2000, WRITE, 0);
    bench.arrive(0, &packet(100));
    while bench.net.on_source(0).unwrap() == Turn::More {}
    assert_eq!(bench.queues[0].used().last(), Some(&(4, 112)));
}

#[test]
fn the_tap_is_told_what_the_driver_copes_with() {
    ASKED.take();
    bench(1, 0);
    bench(1, 1 << 1 | 1 << 7);
    bench(1, 1 << 1 | 1 << 7 | 1 << 8);
    // Segmentation without checksums is none.
    bench(1, 1 << 7 | 1 << 8);
    let offloads = [0, 1 | 2, 1 | 2 | 4, 0];
    let expected: Vec<_> =
        offloads.into_iter().flat_map(|flags| [Request::HeaderBytes(12), Request::Offload(flags)]).collect();
    assert_eq!(ASKED.take(), expected);
}

#[test]
fn what_it_needs_to_run() {
    let memory = memory();
    let queues: Vec<_> = (0..5).map(|index| Driver::new(&memory, index, 64)).collect();
    let activate = |pairs: usize, features: u64, enabled: &[usize]| -> Result<(), Broken> {
        let (taps, _peers): (Vec<_>, Vec<_>) = (0..pairs).map(|_| link()).unzip();
        let mut net = Net::with(taps, MAC, ask).unwrap();
        let rings =
            (0..net.queue_sizes().len()).map(|index| enabled.contains(&index).then(|| queues[index].ring(false)));
        net.activate(activation(&memory, features, rings.collect()))
    };
    activate(1, 0, &[0, 1]).unwrap();
    activate(1, 0, &[0]).unwrap_err();
    activate(1, 0, &[1]).unwrap_err();
    activate(1, 0, &[]).unwrap_err();
    activate(2, 0, &[0, 1]).unwrap();
    activate(2, CTRL_VQ, &[0, 1, 2]).unwrap();
    activate(2, CTRL_VQ, &[0, 1, 4]).unwrap_err();
    activate(2, CTRL_VQ | MQ, &[0, 1, 4]).unwrap();
    activate(2, CTRL_VQ | MQ, &[0, 1, 2, 4]).unwrap_err();
    activate(2, CTRL_VQ | MQ, &[0, 1, 2, 3]).unwrap_err();
    activate(2, MQ, &[0, 1, 2, 3, 4]).unwrap_err();
    for request in [Request::HeaderBytes(12), Request::Offload(0), Request::Attach(false)] {
        REFUSED.set(Some(request));
        activate(2, 0, &[0, 1]).unwrap_err();
    }
    REFUSED.take();
    assert!(Net::with(vec![], MAC, ask).is_err());
    assert!(Net::with((0..65).map(|_| link().0).collect(), MAC, ask).is_err());
}

#[test]
fn what_the_driver_reads() {
    let one = Net::with(vec![link().0], MAC, ask).unwrap();
    assert_eq!(one.config(), [2, 0, 0, 0, 0, 1, 1, 0, 1, 0]);
    assert_eq!(one.queue_sizes(), [256, 256]);
    assert_eq!(one.features() & (CTRL_VQ | MQ), 0);
    let three = Net::with((0..3).map(|_| link().0).collect(), MAC, ask).unwrap();
    assert_eq!(three.config(), [2, 0, 0, 0, 0, 1, 1, 0, 3, 0]);
    assert_eq!(three.queue_sizes(), [256, 256, 256, 256, 256, 256, 64]);
    assert_eq!(three.features() & (CTRL_VQ | MQ), CTRL_VQ | MQ);
    assert_eq!(
        three.sources().iter().map(|source| (source.token, source.edge)).collect::<Vec<_>>(),
        [(0, true), (1, true), (2, true), (u16::MAX, false)]
    );
}

#[test]
fn nothing_is_touched_after_a_reset() {
    let mut bench = bench(2, MRG_RXBUF | CTRL_VQ | MQ);
    bench.arrive(0, &packet(100));
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done, "it waits for buffers");
    bench.net.reset();
    bench.queues[0].chain(&[(DATA, 2000, true)]);
    bench.queues[1].chain(&[(DATA, 200, false)]);
    bench.queues[4].chain(&[(DATA, 4, false), (DATA, 1, true)]);
    for queue in 0..8 {
        assert_eq!(bench.net.on_queue(queue).unwrap(), Turn::Done);
    }
    for source in 0..4 {
        assert_eq!(bench.net.on_source(source).unwrap(), Turn::Done);
    }
    for queue in &mut bench.queues {
        assert_eq!(queue.used(), []);
    }
    // Nor is the old guest's packet the new one's.
    let queues: Vec<_> = (0..5).map(|index| Driver::new(&bench.memory, index, 64)).collect();
    let rings = queues.iter().map(|queue| Some(queue.ring(false))).collect();
    bench.net.activate(activation(&bench.memory, 0, rings)).unwrap();
    bench.queues = queues;
    bench.queues[0].chain(&[(DATA, 2000, true)]);
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used(), []);
}

impl Bench {
    /// Sends a command to the queue of that index, and returns what is written for an answer.
    fn command(&mut self, queue: u16, command: &[u8]) -> u8 {
        poke(&self.memory, DATA, command);
        poke(&self.memory, DATA + 0x100, &[0xff]);
        let driver = &mut self.queues[usize::from(queue)];
        driver.chain(&[(DATA, 2, false), (DATA + 2, command.len() as u32 - 2, false), (DATA + 0x100, 1, true)]);
        assert_eq!(self.net.on_queue(queue).unwrap(), Turn::Done);
        assert_eq!(self.queues[usize::from(queue)].used().iter().map(|used| used.1).collect::<Vec<_>>(), [1]);
        peek(&self.memory, DATA + 0x100, 1)[0]
    }
}

#[test]
fn the_driver_says_how_many_pairs_it_uses() {
    ASKED.take();
    let mut bench = bench(3, CTRL_VQ | MQ);
    let [attach, detach] = [Request::Attach(true), Request::Attach(false)];
    assert_eq!(ASKED.take(), [detach, detach, Request::HeaderBytes(12), Request::Offload(0)]);
    for pair in 0..3 {
        bench.queues[2 * pair].chain(&[(DATA + 0x1000, 2000, true)]);
        bench.arrive(pair, &packet(100));
        assert_eq!(bench.net.on_source(pair as u16).unwrap(), Turn::Done);
        assert_eq!(bench.queues[2 * pair].used().len(), usize::from(pair == 0), "only the first is in use");
    }
    assert_eq!(bench.command(6, &[4, 0, 2, 0]), 0);
    assert_eq!(ASKED.take(), [attach]);
    assert_eq!(bench.queues[2].used().len(), 1, "what was there is passed on");
    assert_eq!(bench.queues[4].used(), []);
    bench.queues[3].chain(&[(DATA, 100, false)]);
    bench.queues[5].chain(&[(DATA, 100, false)]);
    assert_eq!(bench.net.on_queue(3).unwrap(), Turn::Done);
    assert_eq!(bench.net.on_queue(5).unwrap(), Turn::Done);
    assert!(bench.departed(1).is_some() && bench.departed(2).is_none());
    // What can't be.
    let commands: [&[u8]; 7] =
        [&[4, 0, 0, 0], &[4, 0, 4, 0], &[4, 0, 0, 1], &[4, 1, 2, 0], &[0, 0, 1, 0], &[4, 0, 1], &[4, 0, 1, 0, 0]];
    for command in commands {
        assert_eq!(bench.command(6, command), 1, "{command:?}");
    }
    assert_eq!(bench.command(6, &[4, 0, 1, 0]), 0);
    assert_eq!(ASKED.take(), [detach]);
    // Without a place for the answer, or in a chain that makes no sense.
    bench.queues[6].chain(&[(DATA, 4, false)]);
    bench.queues[6].chain(&[(DATA, 4, false), (END, 1, true)]);
    assert_eq!(bench.net.on_queue(6).unwrap(), Turn::Done);
    assert_eq!(bench.queues[6].used().iter().map(|used| used.1).collect::<Vec<_>>(), [0, 0]);
    assert_eq!(ASKED.take(), []);
    assert_eq!(bench.net.counters().errors, 9);
    REFUSED.set(Some(attach));
    assert_eq!(bench.command(6, &[4, 0, 3, 0]), 1);
    REFUSED.take();
    assert_eq!(bench.command(6, &[4, 0, 3, 0]), 0);
}

#[test]
fn each_way_of_a_link_has_its_limit() {
    use crate::limit::{Limits, Rate};
    let mut bench = bench(1, 0);
    let one = Rate { bytes_per_second: 0, operations_per_second: 1 };
    bench.net.limit(Limits { to_guest: one, ..Limits::default() }).unwrap();
    let timer = u16::MAX;
    assert_eq!(bench.net.on_source(timer).unwrap(), Turn::Done);
    for _ in 0..3 {
        bench.queues[0].chain(&[(DATA + 0x1000, 2000, true)]);
        bench.queues[1].chain(&[(DATA, 100, false)]);
        bench.arrive(0, &packet(100));
    }
    assert_eq!(bench.net.on_source(0).unwrap(), Turn::More);
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done, "the timer tells when there is more to do");
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
    assert_eq!((bench.queues[0].used().len(), bench.queues[1].used().len()), (1, 3), "one way is slow");
    bench.net.limit(Limits { from_guest: one, ..Limits::default() }).unwrap();
    assert_eq!(bench.net.on_source(timer).unwrap(), Turn::Done);
    assert_eq!(bench.net.on_queue(RX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[0].used().len(), 2);
    bench.queues[1].chain(&[(DATA, 100, false)]);
    bench.queues[1].chain(&[(DATA, 100, false)]);
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::More);
    assert_eq!(bench.net.on_queue(TX).unwrap(), Turn::Done);
    assert_eq!(bench.queues[1].used().len(), 1, "now the other");
}

#[test]
fn another_device_goes_on_with_as_many_pairs() {
    let mut first = bench(3, CTRL_VQ | MQ);
    assert_eq!(first.command(6, &[4, 0, 2, 0]), 0);
    let saved = first.net.save().unwrap();
    let mut second = bench(3, CTRL_VQ | MQ);
    second.net.restore(&saved).unwrap();
    second.net.resumed().unwrap();
    second.queues[2].chain(&[(DATA + 0x1000, 2000, true)]);
    second.arrive(1, &packet(100));
    assert_eq!(second.net.on_source(1).unwrap(), Turn::Done);
    assert_eq!(second.queues[2].used().len(), 1, "the second pair is in use");
    let (taps, _peers): (Vec<_>, Vec<_>) = (0..3).map(|_| link()).unzip();
    let mut other = Net::with(taps, [2, 0, 0, 0, 0, 2], ask).unwrap();
    assert!(other.restore(&saved).is_err() && other.restore(&[]).is_err(), "another address");
    assert!(bench(2, CTRL_VQ | MQ).net.restore(&saved).is_err(), "other queues");
    let mut more = saved.clone();
    more[10] = 4;
    second.net.restore(&more).unwrap();
    assert!(second.net.resumed().is_err(), "it has three");
}

#[test]
fn pairs_that_the_driver_has_not_set_up_can_not_be_used() {
    let mut bench = bench(2, CTRL_VQ | MQ);
    let rings =
        bench.queues.iter().zip(0..).map(|(queue, index)| (index != 2 && index != 3).then(|| queue.ring(false)));
    let rings = rings.collect();
    bench.net.activate(activation(&bench.memory, CTRL_VQ | MQ, rings)).unwrap();
    assert_eq!(bench.command(4, &[4, 0, 2, 0]), 1);
    assert_eq!(bench.command(4, &[4, 0, 1, 0]), 0);
}

#[test]
fn the_control_queue_is_elsewhere_for_one_pair() {
    let mut bench = bench(3, CTRL_VQ);
    assert_eq!(bench.command(2, &[4, 0, 1, 0]), 0);
    assert_eq!(bench.command(2, &[4, 0, 2, 0]), 1);
}

/// What the guest sends: a header of the device's or of the control queue's.
fn header(random: &mut Random) -> Vec<u8> {
    if random.once_in(3) {
        return vec![random.of(&[4, 4, 4, 0, 1]), random.of(&[0, 0, 0, 1]), random.of(&[0, 1, 2, 3, 4]), 0];
    }
    let mut bytes = packet(60);
    bytes[..2].copy_from_slice(&[random.next() as u8, random.next() as u8]);
    bytes
}

fn torment(work: impl FnOnce(Victim<'_>)) {
    let (taps, peers): (Vec<_>, Vec<_>) = (0..3).map(|_| link()).unzip();
    let mut drained = vec![0; 1 << 17];
    let longest = packet(FRAME_BYTES_MAX + 1);
    work(Victim {
        device: Box::new(Net::with(taps, MAC, ask).unwrap()),
        features: MRG_RXBUF | CTRL_VQ | MQ | 1 << 1 | 1 << 7,
        shape: |queue| match queue {
            0 | 2 | 4 => Shape::Device,
            1 | 3 | 5 => Shape::Driver,
            _ => Shape::Both,
        },
        lengths: &[12, 60, 1500, 2048],
        header: &header,
        host: &mut |random| {
            for peer in &peers {
                while recv(peer, drained.as_mut_slice(), RecvFlags::empty()).is_ok() {}
            }
            let peer = &peers[random.within(0..3) as usize];
            let length = if random.once_in(64) {
                random.of(&[65550, 65551])
            } else {
                random.of(&[13, 14, 60, 60, 600, 1500, 9000])
            };
            for _ in 0..random.of(&[0, 1, 2, 8]) {
                let _ = send(peer, &longest[..HEADER_BYTES + length], SendFlags::empty());
            }
        },
        memory_max: 1 << 20,
        moved_max: 66 * 65562,
    });
}

#[test]
fn a_hostile_driver_gets_nowhere() {
    torment(|victim| victim.torment(1, 20_000));
}

#[test]
fn a_driver_that_changes_its_rings_gets_nowhere() {
    torment(|victim| victim.torment_while_it_changes(1, 5_000));
}

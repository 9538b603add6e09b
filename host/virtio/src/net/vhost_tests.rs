//! The device that the kernel serves: what can be seen without the kernel's side, and all of it where that is there.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vmm_sys_util::eventfd::EventFd;

use super::HEADER_BYTES;
use super::kernel_tests::{EXPERIMENT, GUEST_CSUM, GUEST_TSO4, IPV4, alone, frame, host, segment, taps};
use super::vhost::{Vhost, VhostNet, agreed, offered};
use super::virtio::{MRG_RXBUF, OFFERED};
use crate::device::{Counters, Device, EVENT_IDX, INDIRECT_DESC, Memory, Turn, VERSION_1};
use crate::driver::{DATA, Driver, SEAM, activation, memory, peek, poke};

/// `VHOST_NET_F_VIRTIO_NET_HDR` and `VHOST_F_LOG_ALL`, and one of virtio's that this device does not have.
const NET_HDR: u64 = 1 << 27;
const LOG_ALL: u64 = 1 << 26;
const IN_ORDER: u64 = 1 << 35;
const RINGS: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC;
const RX: usize = 0;
const TX: usize = 1;

#[test]
fn the_driver_is_offered_what_both_can_do() {
    let kernel = RINGS | MRG_RXBUF | NET_HDR | LOG_ALL | IN_ORDER;
    assert_eq!(offered(kernel), OFFERED);
    assert_eq!(offered(kernel & !MRG_RXBUF), OFFERED & !MRG_RXBUF);
    assert_eq!(offered(0) & (NET_HDR | LOG_ALL | IN_ORDER | RINGS), 0);
}

#[test]
fn the_kernel_is_told_what_it_has_a_part_in() {
    let kernel = RINGS | MRG_RXBUF | NET_HDR | LOG_ALL | IN_ORDER;
    assert_eq!(agreed(u64::MAX, kernel), RINGS | MRG_RXBUF);
    assert_eq!(agreed(VERSION_1 | GUEST_CSUM | GUEST_TSO4, kernel), VERSION_1);
    assert_eq!(agreed(OFFERED | RINGS, VERSION_1), VERSION_1);
}

#[test]
fn what_is_not_vhost_net_is_refused() {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).unwrap();
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    for fd in [null, reader, writer, event] {
        assert!(Vhost::new(fd).is_err());
    }
}

/// The kernel's side, where the host has it.
fn open() -> Option<OwnedFd> {
    let opened = rustix::fs::open("/dev/vhost-net", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    opened.inspect_err(|error| eprintln!("skipped: no /dev/vhost-net here: {error}")).ok()
}

struct Bench {
    net: VhostNet,
    memory: Memory,
    queues: [Driver; 2],
    bells: Vec<EventFd>,
    host: OwnedFd,
}

impl Bench {
    fn new(features: u64, with_header: bool) -> Option<Self> {
        let vhost = Vhost::new(open()?).unwrap();
        let net = VhostNet::new(vec![(vhost, taps(1).remove(0))], [2, 0, 0, 0, 0, 1]).unwrap();
        let memory = memory();
        let queues = [Driver::new(&memory, 0, 64), Driver::new(&memory, 1, 64)];
        let mut bench = Self { net, memory, queues, bells: Vec::new(), host: host(with_header) };
        bench.activate(features);
        Some(bench)
    }

    fn activate(&mut self, features: u64) {
        let rings: Vec<_> = self.queues.iter().map(|queue| queue.ring(features & EVENT_IDX != 0)).collect();
        self.bells = rings.iter().map(|ring| ring.doorbell().try_clone().unwrap()).collect();
        let rings = rings.into_iter().map(Some).collect();
        self.net.activate(activation(&self.memory, features, rings)).unwrap();
    }

    fn restart(&mut self, features: u64) {
        self.queues = [Driver::new(&self.memory, 0, 64), Driver::new(&self.memory, 1, 64)];
        self.activate(features);
    }

    fn offer(&mut self, buffers: u32) {
        for index in 0..buffers {
            self.queues[RX].chain(&[(address(index), 2048, true)]);
        }
        self.bells[RX].write(1).unwrap();
    }

    fn send(&mut self, packet: &[u8]) {
        poke(&self.memory, DATA + 0x8_0000, packet);
        self.queues[TX].chain(&[(DATA + 0x8_0000, packet.len() as u32, false)]);
        self.bells[TX].write(1).unwrap();
    }

    /// The next packets that the guest gets, with their headers; those of that type. Nothing within a second is none.
    fn received(&mut self, kind: [u8; 2]) -> Vec<Vec<u8>> {
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(1) {
            let mut all = Vec::new();
            let mut used = self.queues[RX].used().into_iter();
            while let Some((head, length)) = used.next() {
                let buffer = |head: u32, length: u32| peek(&self.memory, address(head), length as usize);
                let mut packet = buffer(head, length);
                for _ in 1..packet[10] {
                    let (head, length) = used.next().unwrap();
                    packet.extend(buffer(head, length));
                }
                all.push(packet);
            }
            all.retain(|packet| packet[24..26] == kind);
            if !all.is_empty() {
                return all;
            }
            // The kernel's own thread works beside this one; the test looks again.
            std::thread::sleep(Duration::from_millis(5));
        }
        Vec::new()
    }

    /// What the host sees of the guest's frames of that type.
    fn seen(&self, kind: [u8; 2]) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        while ready(&self.host) {
            let (count, _) = recv(&self.host, bytes.as_mut_slice(), RecvFlags::empty()).ok()?;
            if bytes[12..14] == kind {
                return Some(bytes[..count].to_vec());
            }
        }
        None
    }

    /// Whether the kernel has found something wrong within a moment.
    fn wrong(&self) -> bool {
        let sources = self.net.sources();
        ready(sources[0].fd)
    }
}

fn ready(fd: impl AsFd) -> bool {
    let mut wanted = [PollFd::new(&fd, PollFlags::IN)];
    let patience = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
    poll(&mut wanted, Some(&patience)).unwrap() > 0
}

fn address(buffer: u32) -> u64 {
    DATA + 2048 * u64::from(buffer)
}

fn both_ways(bench: &mut Bench) {
    let out = frame(EXPERIMENT, &[7; 100]);
    bench.send(&[&[0; HEADER_BYTES], &out[..]].concat());
    assert_eq!(bench.seen(EXPERIMENT).unwrap(), out);
    bench.offer(8);
    for size in [46, 1400] {
        bench.queues[RX].want_interrupt_after(8 - bench.queues[RX].outstanding().0);
        let into = frame(EXPERIMENT, &vec![size as u8; size]);
        send(&bench.host, &into, SendFlags::empty()).unwrap();
        assert_eq!(bench.received(EXPERIMENT), [[&[0; 10], &[1, 0][..], &into].concat()]);
        // The buffer is given back first.
        let started = Instant::now();
        while !bench.queues[RX].interrupted() {
            assert!(started.elapsed() < Duration::from_secs(1), "no interrupt");
            // The kernel's own thread works beside this one; the test looks again.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn frames_pass_both_ways_and_again_after_a_reset() {
    alone(|| {
        for features in [VERSION_1 | MRG_RXBUF, VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT_DESC] {
            let Some(mut bench) = Bench::new(features, false) else { return };
            for _ in 0..3 {
                both_ways(&mut bench);
                bench.net.reset();
                let used = bench.queues[RX].used().len();
                // Nothing of the guest's memory is touched now, whatever comes.
                send(&bench.host, &frame(EXPERIMENT, &[1; 100]), SendFlags::empty()).unwrap();
                bench.send(&[0; 100]);
                // Time for a kernel that were still at work to show it: that nothing happens is no event.
                std::thread::sleep(Duration::from_millis(50));
                assert_eq!((bench.queues[RX].used().len(), used), (0, 0));
                assert_eq!(bench.seen(EXPERIMENT), None);
                bench.restart(features);
                // What waited in the tap meanwhile.
                bench.offer(1);
                assert_eq!(bench.received(EXPERIMENT).len(), 1);
                bench.net.reset();
                bench.restart(features);
            }
            assert_eq!(bench.net.counters(), Counters::default(), "the kernel counts nothing for us");
        }
    });
}

#[test]
fn what_was_offered_before_the_driver_was_ready_is_used() {
    alone(|| {
        let Some(mut bench) = Bench::new(VERSION_1 | MRG_RXBUF, false) else { return };
        bench.net.reset();
        bench.queues = [Driver::new(&bench.memory, 0, 64), Driver::new(&bench.memory, 1, 64)];
        let out = frame(EXPERIMENT, &[9; 100]);
        poke(&bench.memory, DATA + 0x8_0000, &[&[0; HEADER_BYTES], &out[..]].concat());
        bench.queues[TX].chain(&[(DATA + 0x8_0000, (HEADER_BYTES + out.len()) as u32, false)]);
        bench.activate(VERSION_1 | MRG_RXBUF);
        assert_eq!(bench.seen(EXPERIMENT).unwrap(), out);
    });
}

#[test]
fn segmentation_is_left_to_both_ends() {
    alone(|| {
        let features = VERSION_1 | MRG_RXBUF | GUEST_CSUM | GUEST_TSO4;
        let Some(mut bench) = Bench::new(features, true) else { return };
        let (header, whole) = segment(1000, 8000);
        bench.offer(20);
        send(&bench.host, &[&header[..], &whole].concat(), SendFlags::empty()).unwrap();
        let got = bench.received(IPV4);
        assert_eq!((got.len(), got[0].len()), (1, HEADER_BYTES + whole.len()));
        assert_eq!((got[0][1], got[0][10]), (1, 4), "VIRTIO_NET_HDR_GSO_TCPV4, num_buffers");
        assert_eq!(got[0][HEADER_BYTES..], whole);
    });
    alone(|| {
        let Some(mut bench) = Bench::new(VERSION_1 | MRG_RXBUF, false) else { return };
        let (header, whole) = segment(1000, 60_000);
        bench.send(&[&header[..], &[0, 0], &whole].concat());
        assert_eq!(bench.seen(IPV4).unwrap().len(), whole.len());
    });
}

#[test]
fn queues_of_no_sense_break_the_device_until_it_is_reset() {
    alone(|| {
        let features = VERSION_1 | MRG_RXBUF;
        let Some(mut bench) = Bench::new(features, false) else { return };
        assert!(!bench.wrong());
        assert_eq!(bench.net.on_source(0).unwrap(), Turn::Done);
        // The index of what is available has moved by more than there are entries.
        bench.queues[TX].jump(1000);
        bench.bells[TX].write(1).unwrap();
        assert!(bench.wrong());
        let broken = bench.net.on_source(0).unwrap_err();
        assert!(broken.to_string().contains("make no sense"), "{broken}");
        bench.net.reset();
        bench.restart(features);
        assert!(!bench.wrong());
        both_ways(&mut bench);
    });
}

#[test]
fn a_ring_across_two_mappings_is_not_given_to_the_kernel() {
    alone(|| {
        let Some(mut bench) = Bench::new(VERSION_1, false) else { return };
        bench.net.reset();
        let mut rings: Vec<_> = bench.queues.iter().map(|queue| queue.ring(false)).collect();
        let across = vm_memory::GuestAddress(SEAM - 64);
        // The regions adjoin for the guest, so the ring is a sound one. In this process they need not.
        rings[TX].queue().try_set_used_ring_address(across).unwrap();
        let rings = rings.into_iter().map(Some).collect();
        let refused = bench.net.activate(activation(&bench.memory, VERSION_1, rings)).unwrap_err();
        assert!(refused.to_string().contains("place a queue"), "{refused}");
        bench.restart(VERSION_1 | MRG_RXBUF);
        both_ways(&mut bench);
    });
}

#[test]
fn a_driver_without_one_of_its_queues_is_refused() {
    alone(|| {
        let Some(mut bench) = Bench::new(VERSION_1, false) else { return };
        let rings = vec![Some(bench.queues[RX].ring(false)), None];
        assert!(bench.net.activate(activation(&bench.memory, VERSION_1, rings)).is_err());
        bench.restart(VERSION_1 | MRG_RXBUF);
        both_ways(&mut bench);
    });
}

#[test]
fn a_descriptor_serves_one_device() {
    let Some(fd) = open() else { return };
    let _first = Vhost::new(fd.try_clone().unwrap()).unwrap();
    assert!(Vhost::new(fd).is_err());
}

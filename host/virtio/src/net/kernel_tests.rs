//! The device over real taps, where the host lets a test have a network namespace and `/dev/net/tun`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::HEADER_BYTES;
use super::virtio::Net;
use crate::device::{Device, Memory, Turn};
use crate::driver::{DATA, Driver, activation, memory, peek, poke};

pub(super) const GUEST_CSUM: u64 = 1 << 1;
pub(super) const GUEST_TSO4: u64 = 1 << 7;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;
/// A type of frame for local experiments, which the kernel sends none of.
pub(super) const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
pub(super) const IPV4: [u8; 2] = [8, 0];
const PACKET_VNET_HDR: libc::c_int = 15;

/// Runs a test in a network of its own, where that can be had.
pub(super) fn alone(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: it changes the network of this thread only, which holds no sockets yet.
            #[expect(unsafe_code, reason = "a system call")]
            let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
            if result < 0 || std::fs::File::open("/dev/net/tun").is_err() {
                eprintln!("skipped: no network namespace or no /dev/net/tun here");
                return;
            }
            // The kernel's own chatter is not wanted here.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            work();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[expect(unsafe_code, reason = "a C structure with a union")]
fn interface(name: &str) -> libc::ifreq {
    // SAFETY: an all-zero ifreq is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    request
}

#[expect(unsafe_code, reason = "ioctl")]
fn ioctl(fd: &OwnedFd, number: libc::Ioctl, request: &mut libc::ifreq) {
    // SAFETY: all the requests of these tests take such a structure.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut *request) };
    assert!(result >= 0, "{}", io::Error::last_os_error());
}

pub(super) fn taps(count: usize) -> Vec<OwnedFd> {
    let multiple = if count > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let open = || {
        let tap = rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut request = interface("tap");
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multiple) as libc::c_short;
        ioctl(&tap, libc::TUNSETIFF, &mut request);
        tap
    };
    (0..count).map(|_| open()).collect()
}

/// The host's end of the link: a socket of all its frames, with headers before them if so asked. The link is up then.
#[expect(unsafe_code, reason = "sockets of a family that no safe wrapper has")]
pub(super) fn host(with_header: bool) -> OwnedFd {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the descriptor is new, and nobody else's.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, i32::from(protocol));
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = interface("tap");
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut request);
    let mut request = interface("tap");
    ioctl(&socket, libc::SIOCGIFINDEX, &mut request);
    // SAFETY: an all-zero address is a valid value; the request above has written the union's index.
    let (mut address, index) = unsafe { (std::mem::zeroed::<libc::sockaddr_ll>(), request.ifr_ifru.ifru_ifindex) };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index;
    let one: libc::c_int = 1;
    // SAFETY: the pointers are to values that live during the calls, with their sizes.
    unsafe {
        let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        assert_eq!(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size), 0);
        if with_header {
            let size = size_of::<libc::c_int>() as libc::socklen_t;
            let level = libc::SOL_PACKET;
            assert_eq!(libc::setsockopt(socket.as_raw_fd(), level, PACKET_VNET_HDR, (&raw const one).cast(), size), 0);
        }
    }
    socket
}

struct Bench {
    net: Net,
    memory: Memory,
    queues: Vec<Driver>,
    host: OwnedFd,
}

fn bench(count: usize, features: u64, with_header: bool) -> Bench {
    let memory = memory();
    let mut net = Net::new(taps(count), [2, 0, 0, 0, 0, 1]).unwrap();
    let queues: Vec<_> = (0..net.queue_sizes().len() as u16).map(|index| Driver::new(&memory, index, 64)).collect();
    let rings = queues.iter().map(|queue| Some(queue.ring(false))).collect();
    net.activate(activation(&memory, features, rings)).unwrap();
    Bench { net, memory, queues, host: host(with_header) }
}

pub(super) fn frame(kind: [u8; 2], rest: &[u8]) -> Vec<u8> {
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2], &kind[..], rest].concat()
}

/// A segment of TCP from that port, and before it the header of the device which says that it is to be cut into many.
pub(super) fn segment(port: u16, bytes: usize) -> (Vec<u8>, Vec<u8>) {
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1];
    ip[2..4].copy_from_slice(&(40 + bytes as u16).to_be_bytes());
    let mut tcp = vec![0, 0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x20, 0, 0, 0, 0, 0];
    tcp[..2].copy_from_slice(&port.to_be_bytes());
    let payload: Vec<_> = (0..bytes).map(|index| index as u8).collect();
    // NEEDS_CSUM, TCPV4, header bytes, segment bytes, where the sum starts and where it goes.
    let header = vec![1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0];
    (header, frame(IPV4, &[ip, tcp, payload].concat()))
}

impl Bench {
    fn wait(&self, source: usize) -> bool {
        let sources = self.net.sources();
        let mut wanted = [PollFd::from_borrowed_fd(sources[source].fd, PollFlags::IN)];
        let patience = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
        poll(&mut wanted, Some(&patience)).unwrap() > 0
    }

    /// What the guest gets from the queue: frames of that type with their headers.
    fn received(&mut self, pair: u16, kind: [u8; 2]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while self.wait(usize::from(pair)) {
            while self.net.on_source(pair).unwrap() == Turn::More {}
            let mut used = self.queues[usize::from(2 * pair)].used().into_iter();
            while let Some((head, length)) = used.next() {
                let buffer = |head: u32, length: u32| peek(&self.memory, address(pair, head), length as usize);
                let mut packet = buffer(head, length);
                for _ in 1..packet[10] {
                    let (head, length) = used.next().unwrap();
                    packet.extend(buffer(head, length));
                }
                all.push(packet);
            }
        }
        all.retain(|packet| packet[24..26] == kind);
        all
    }

    fn offer(&mut self, pair: u16, buffers: u32) {
        for index in 0..buffers {
            assert_eq!(self.queues[usize::from(2 * pair)].chain(&[(address(pair, index), 2048, true)]), index as u16);
        }
    }

    fn send(&mut self, pair: u16, packet: &[u8]) {
        poke(&self.memory, DATA + 0x10_0000, packet);
        let queue = 2 * pair + 1;
        self.queues[usize::from(queue)].chain(&[(DATA + 0x10_0000, packet.len() as u32, false)]);
        assert_eq!(self.net.on_queue(queue).unwrap(), Turn::Done);
    }

    /// What the host sees of the guest's frames of that type.
    fn seen(&self, kind: [u8; 2]) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        loop {
            let mut wanted = [PollFd::from_borrowed_fd(self.host.as_fd(), PollFlags::IN)];
            let patience = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
            poll(&mut wanted, Some(&patience)).unwrap();
            let (count, _) = recv(&self.host, bytes.as_mut_slice(), RecvFlags::empty()).ok()?;
            if bytes[12..14] == kind {
                return Some(bytes[..count].to_vec());
            }
        }
    }
}

fn address(pair: u16, buffer: u32) -> u64 {
    DATA + 0x4_0000 * u64::from(pair) + 2048 * u64::from(buffer)
}

#[test]
fn frames_pass_both_ways() {
    alone(|| {
        let mut bench = bench(1, MRG_RXBUF, false);
        let out = frame(EXPERIMENT, &[7; 100]);
        bench.send(0, &[&[0; HEADER_BYTES], &out[..]].concat());
        assert_eq!(bench.seen(EXPERIMENT).unwrap(), out);
        // A header that makes no sense to the kernel: the sum would lie behind the frame.
        bench.send(0, &[&[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], &out[..]].concat());
        assert_eq!(bench.seen(EXPERIMENT), None);
        assert_eq!((bench.net.counters().operations_out, bench.net.counters().errors), (1, 1));

        bench.offer(0, 8);
        for size in [46, 1400] {
            let into = frame(EXPERIMENT, &vec![size as u8; size]);
            send(&bench.host, &into, SendFlags::empty()).unwrap();
            let got = bench.received(0, EXPERIMENT);
            assert_eq!(got, [[&[0; 10], &[1, 0][..], &into].concat()]);
        }
    });
}

#[test]
fn segmentation_is_left_to_a_guest_that_copes_with_it() {
    alone(|| {
        let (header, whole) = segment(1000, 8000);
        let sent = [&header[..], &whole].concat();
        let mut capable = bench(1, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4, true);
        capable.offer(0, 20);
        send(&capable.host, &sent, SendFlags::empty()).unwrap();
        let got = capable.received(0, IPV4);
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].len(), HEADER_BYTES + whole.len());
        assert_eq!(got[0][1], 1, "VIRTIO_NET_HDR_GSO_TCPV4");
        assert_eq!(got[0][10], 4, "num_buffers");
        assert_eq!(got[0][HEADER_BYTES..], whole);
    });
    alone(|| {
        let (header, whole) = segment(1000, 8000);
        let sent = [&header[..], &whole].concat();
        let mut plain = bench(1, MRG_RXBUF, true);
        plain.offer(0, 20);
        send(&plain.host, &sent, SendFlags::empty()).unwrap();
        let got = plain.received(0, IPV4);
        assert_eq!(got.len(), 6, "8000 bytes in segments of 1448");
        assert!(got.iter().all(|packet| packet[..2] == [0, 0] && packet.len() <= HEADER_BYTES + 54 + 1448));
    });
}

#[test]
fn a_guest_sends_what_is_to_be_segmented() {
    alone(|| {
        let mut bench = bench(1, MRG_RXBUF, false);
        let (header, whole) = segment(1000, 60_000);
        bench.send(0, &[&header[..], &[0, 0], &whole].concat());
        assert_eq!(bench.seen(IPV4).unwrap().len(), whole.len());
        assert_eq!(bench.net.counters().errors, 0);
    });
}

#[test]
fn frames_come_to_the_queues_that_are_in_use() {
    alone(|| {
        let mut bench = bench(2, MRG_RXBUF | CTRL_VQ | MQ, false);
        bench.offer(0, 60);
        bench.offer(1, 60);
        let flows = |bench: &mut Bench| {
            for port in 0..20 {
                let (_, whole) = segment(1000 + 37 * port, 100);
                send(&bench.host, &whole, SendFlags::empty()).unwrap();
            }
            // What the host has sent passes its own queues, which tell nobody when.
            std::thread::sleep(Duration::from_millis(20));
            (bench.received(0, IPV4).len(), bench.queues[2].outstanding().0)
        };
        assert_eq!(flows(&mut bench), (20, 60), "all to the only one");
        poke(&bench.memory, DATA + 0x10_0000, &[4, 0, 2, 0, 0xff]);
        bench.queues[4].chain(&[(DATA + 0x10_0000, 4, false), (DATA + 0x10_0004, 1, true)]);
        assert_eq!(bench.net.on_queue(4).unwrap(), Turn::Done);
        assert_eq!(peek(&bench.memory, DATA + 0x10_0004, 1), [0]);
        let first = flows(&mut bench).0;
        let second = bench.received(1, IPV4).len();
        assert!(first > 0 && second > 0 && first + second == 20, "{first} and {second}");
        // A new driver starts with one again.
        bench.net.reset();
        bench.queues = (0..5).map(|index| Driver::new(&bench.memory, index, 64)).collect();
        let rings = bench.queues.iter().map(|queue| Some(queue.ring(false))).collect();
        bench.net.activate(activation(&bench.memory, MRG_RXBUF | CTRL_VQ | MQ, rings)).unwrap();
        bench.offer(0, 60);
        bench.offer(1, 60);
        assert_eq!(flows(&mut bench), (20, 60));
    });
}

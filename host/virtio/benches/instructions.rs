//! `instructions CASE COUNT` serves so many requests of one kind, one a doorbell, over guest memory and queues in this process.
//! Under a tool that counts instructions, what twice the count takes more is what the requests cost, set-up left out: the
//! device's part, and that of the driver and of the host's end here, which the case `driver` tells.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::Arc;

use coracle_virtio::block::{Block, BlockConfig};
use coracle_virtio::device::{Activation, Device, EVENT_IDX, Memory, Turn};
use coracle_virtio::net::Net;
use coracle_virtio::ring::{Interrupts, Ring};
use coracle_virtio::vsock::Vsock;
use coracle_virtio::vsock::muxer::Muxer;
use coracle_virtio::vsock::packet::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Entries of a queue.
const SIZE: u16 = 16;
/// Between the rings of two queues, and from a table of descriptors to the other rings.
const QUEUE_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const DATA: u64 = 0x1_0000;
const MEMORY_BYTES: usize = 1 << 20;

const BLOCK_BYTES: u32 = 4096;
const PACKET_BYTES: u32 = 4096;
/// A frame, and the header before it.
const FRAME_BYTES: u32 = 1500;
const NET_HEADER_BYTES: u32 = 12;

const GUEST: u64 = 3;
const PORT: u32 = 5000;

/// The guest's side of a queue, which offers the same chain again and again.
struct Driver {
    memory: Arc<GuestMemoryMmap>,
    base: u64,
    available: u16,
    used: u16,
}

impl Driver {
    fn new(memory: &Memory, index: u16) -> Self {
        let base = u64::from(index) * QUEUE_BYTES;
        Self { memory: memory.memory().into_inner(), base, available: 0, used: 0 }
    }

    /// The device's side.
    fn ring(&self, memory: &Memory, index: u16) -> Ring {
        let mut queue: Queue = QueueT::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + AVAILABLE)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + USED)).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupts = Interrupts::new(vec![event()], usize::from(index) + 1);
        interrupts.set(Some(index), 0);
        Ring::new(index, queue, memory.clone(), Arc::new(interrupts), event()).unwrap()
    }

    /// Writes the chain (address, length, whether the device writes).
    fn write(&self, chain: &[(u64, u32, bool)]) {
        for (at, (address, length, writable)) in (0_u16..).zip(chain) {
            let more = if usize::from(at) + 1 < chain.len() { NEXT } else { 0 };
            let flags = more | if *writable { WRITE } else { 0 };
            let mut bytes = Vec::from(address.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend((at + 1).to_le_bytes());
            self.memory.write_slice(&bytes, GuestAddress(self.base + 16 * u64::from(at))).unwrap();
        }
    }

    /// Makes the chain available, and asks for an interrupt once it is used.
    fn offer(&mut self) {
        let store =
            |at: u64, value: u16| self.memory.write_obj(value, GuestAddress(self.base + AVAILABLE + at)).unwrap();
        store(4 + 2 * u64::from(self.available % SIZE), 0);
        store(4 + 2 * u64::from(SIZE), self.used);
        self.available = self.available.wrapping_add(1);
        store(2, self.available);
    }

    /// How many chains were given back.
    fn given(&mut self) -> u16 {
        let used: u16 = self.memory.read_obj(GuestAddress(self.base + USED + 2)).unwrap();
        used.wrapping_sub(std::mem::replace(&mut self.used, used))
    }

    /// The length of the chain that was given back last.
    fn length(&self) -> u32 {
        let place = u64::from(self.used.wrapping_sub(1) % SIZE);
        self.memory.read_obj(GuestAddress(self.base + USED + 8 + 8 * place)).unwrap()
    }
}

/// A device with so many queues in use.
fn running(mut device: impl Device, features: u64, queues: u16) -> (impl Device, Memory, Vec<Driver>) {
    let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap());
    let drivers: Vec<_> = (0..queues).map(|index| Driver::new(&memory, index)).collect();
    let rings = (0..).zip(&drivers).map(|(index, driver)| Some(driver.ring(&memory, index))).collect();
    device.activate(Activation { features: features | EVENT_IDX, memory: memory.clone(), rings }).unwrap();
    (device, memory, drivers)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [case, count] = arguments.as_slice() else { return usage() };
    let Ok(count) = count.parse() else { return usage() };
    match case.as_str() {
        "driver" => driver(count),
        "block-read" => block_read(count),
        "vsock-out" => vsock(count, true),
        "vsock-in" => vsock(count, false),
        "net-out" => net_out(count),
        "net-in" => net_in(count),
        _ => return usage(),
    }
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    println!("instructions driver|block-read|vsock-out|vsock-in|net-out|net-in COUNT");
    ExitCode::SUCCESS
}

/// A driver alone: what it does for each request.
fn driver(count: u64) {
    let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap());
    let mut driver = Driver::new(&memory, 0);
    for _ in 0..count {
        driver.offer();
        assert_eq!(driver.given(), 0);
    }
}

fn block_read(count: u64) {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(u64::from(BLOCK_BYTES)).unwrap();
    let config = BlockConfig { file: file.into(), read_only: false, direct: false, serial: String::new(), queues: 1 };
    let (mut device, memory, mut drivers) = running(Block::new(config).unwrap(), 0, 1);
    let queue = &mut drivers[0];
    // A header of zeroes is a read of the first sectors.
    memory.memory().write_slice(&[0; 16], GuestAddress(DATA)).unwrap();
    queue.write(&[(DATA, 16, false), (DATA + 0x1000, BLOCK_BYTES, true), (DATA + 0x100, 1, true)]);
    for _ in 0..count {
        queue.offer();
        assert_eq!(device.on_queue(0).unwrap(), Turn::Done);
        assert_eq!(queue.given(), 1);
    }
    assert_eq!(queue.length(), BLOCK_BYTES + 1);
}

fn packet(op: Op, len: u32) -> [u8; HEADER_BYTES] {
    let header = Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: 7,
        dst_port: PORT,
        len,
        kind: TYPE_STREAM,
        op: Some(op),
        flags: 0,
        buf_alloc: u32::MAX,
        fwd_cnt: 0,
    };
    header.encode()
}

/// Packets from the guest to the host, or the other way.
fn vsock(count: u64, out: bool) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("v");
    let service = UnixListener::bind(folder.path().join(format!("v_{PORT}"))).unwrap();
    let (mut device, memory, mut drivers) = running(Vsock::new(Muxer::new(GUEST, &path).unwrap()), 0, 2);
    let memory = memory.memory();
    let [rx, tx] = drivers.as_mut_slice() else { return };
    let header_bytes = HEADER_BYTES as u32;
    rx.write(&[(DATA + 0x4000, header_bytes + PACKET_BYTES, true)]);
    tx.write(&[(DATA, header_bytes, false), (DATA + 0x1000, PACKET_BYTES, false)]);
    memory.write_slice(&packet(Op::Request, 0), GuestAddress(DATA)).unwrap();
    tx.offer();
    rx.offer();
    assert_eq!(device.on_queue(1).unwrap(), Turn::Done);
    assert_eq!((tx.given(), rx.given()), (1, 1));
    let mut program: UnixStream = service.accept().unwrap().0;
    memory.write_slice(&packet(Op::Data, PACKET_BYTES), GuestAddress(DATA)).unwrap();
    let mut bytes = [0; PACKET_BYTES as usize];
    rx.offer();
    for _ in 0..count {
        if out {
            tx.offer();
            assert_eq!(device.on_queue(1).unwrap(), Turn::Done);
            assert_eq!(tx.given(), 1);
            program.read_exact(&mut bytes).unwrap();
            // A credit update, once in a while.
            (0..rx.given()).for_each(|_| rx.offer());
        } else {
            program.write_all(&bytes).unwrap();
            assert_eq!(device.on_source(0).unwrap(), Turn::Done);
            assert_eq!(rx.given(), 1);
            rx.offer();
        }
    }
    assert!(out || rx.length() == header_bytes + PACKET_BYTES);
}

/// A device whose tap is a socket, and the other end of that.
fn net() -> (impl Device, Memory, Vec<Driver>, OwnedFd) {
    let kind = SocketType::SEQPACKET;
    let (tap, peer) = socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None).unwrap();
    let device = Net::over_sockets(vec![tap], [2, 0, 0, 0, 0, 1]).unwrap();
    // `VIRTIO_NET_F_MRG_RXBUF`.
    let (device, memory, drivers) = running(device, 1 << 15, 2);
    (device, memory, drivers, peer)
}

fn net_out(count: u64) {
    let (mut device, _, mut drivers, peer) = net();
    let tx = &mut drivers[1];
    tx.write(&[(DATA, NET_HEADER_BYTES, false), (DATA + 0x100, FRAME_BYTES, false)]);
    let mut frame = vec![0; 2048];
    for _ in 0..count {
        tx.offer();
        assert_eq!(device.on_queue(1).unwrap(), Turn::Done);
        assert_eq!(tx.given(), 1);
        let (length, _) = recv(&peer, frame.as_mut_slice(), RecvFlags::empty()).unwrap();
        assert_eq!(length, (NET_HEADER_BYTES + FRAME_BYTES) as usize);
    }
}

fn net_in(count: u64) {
    let (mut device, _, mut drivers, peer) = net();
    let rx = &mut drivers[0];
    rx.write(&[(DATA, 2048, true)]);
    let frame = vec![0; (NET_HEADER_BYTES + FRAME_BYTES) as usize];
    rx.offer();
    for _ in 0..count {
        send(&peer, &frame, SendFlags::empty()).unwrap();
        assert_eq!(device.on_source(0).unwrap(), Turn::Done);
        assert_eq!(rx.given(), 1);
        rx.offer();
    }
    assert_eq!(rx.length(), NET_HEADER_BYTES + FRAME_BYTES);
}

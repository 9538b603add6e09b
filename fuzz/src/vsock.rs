//! The socket device, with programs of the host that come and go.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use coracle_virtio::vsock::Vsock;
use coracle_virtio::vsock::muxer::Muxer;
use tempfile::TempDir;

use crate::guest::DATA;
use crate::input::Input;
use crate::rig::{Event, Rig, Shape, Spec};

/// The guest's context identifier.
pub const GUEST: u64 = 3;
/// A port of the host where somebody listens.
pub const PORT: u32 = 5000;
/// The first port that a program of the host gets.
pub const FIRST_LOCAL_PORT: u32 = 1 << 30;
/// The most streams of one input.
const STREAMS_MAX: usize = 24;

const SPEC: Spec = Spec {
    shape: |queue| if queue == 1 { Shape::Driver } else { Shape::Device },
    lengths: &[44, 4096, 4096, 300, 1000],
    header,
    held_max: 2 << 20,
    // Each round of a turn moves what the queues hold, and what the host's streams hold.
    moved_max: 64 << 20,
    operations_max: 16 * 1024,
};

/// A packet's header, mostly of what makes sense.
pub fn header(input: &mut Input<'_>) -> Vec<u8> {
    let [how, ports, credit] = input.bytes();
    let op = match how & 15 {
        0..3 => 1,
        3 => 2,
        4 => 3,
        5 | 6 => 4,
        7..12 => 5,
        12 => 6,
        13 => 7,
        14 => 0,
        _ => input.word(),
    };
    let length = if op == 5 || how & 0x80 != 0 {
        match input.byte() {
            255 => input.double(),
            254 => 65535 + u32::from(input.byte() & 3),
            byte => [0, 1, 100, 300, 4096, 1000, 8192, 40000][usize::from(byte & 7)],
        }
    } else {
        0
    };
    let guest = [7, 7, 8, 1024][usize::from(ports & 3)];
    let host = match ports >> 2 & 15 {
        0..8 => PORT,
        8 => PORT + 1,
        9 => input.double(),
        nth => FIRST_LOCAL_PORT + u32::from(nth) - 10,
    };
    let (mut from, mut to, mut kind) = (GUEST, 2, 1_u16);
    match ports >> 6 {
        3 if how & 0x40 != 0 => match input.byte() & 3 {
            0 => from = input.quad(),
            1 => to = input.quad(),
            _ => kind = input.word(),
        },
        _ => {}
    }
    let flags = if how & 0x20 != 0 { input.double() } else { u32::from(how >> 4 & 1) + u32::from(credit >> 7) * 2 };
    let room = [1 << 18, 1 << 18, 4096, 0, 1, u32::MAX, 64, 1 << 31][usize::from(credit & 7)];
    let taken = match credit >> 3 & 7 {
        0..4 => 0,
        4 => 64,
        5 => 4096,
        6 => u32::MAX,
        _ => input.double(),
    };
    let mut bytes = Vec::with_capacity(44);
    bytes.extend(from.to_le_bytes());
    bytes.extend(u64::to_le_bytes(to));
    bytes.extend(u32::to_le_bytes(guest));
    bytes.extend(u32::to_le_bytes(host));
    bytes.extend(u32::to_le_bytes(length));
    bytes.extend(kind.to_le_bytes());
    bytes.extend(u16::to_le_bytes(op));
    bytes.extend(flags.to_le_bytes());
    bytes.extend(u32::to_le_bytes(room));
    bytes.extend(taken.to_le_bytes());
    bytes
}

/// The host's side: sockets that stay, and the streams of one input.
pub struct Host {
    folder: TempDir,
    listener: UnixListener,
    service: UnixListener,
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Host {
    /// With its sockets.
    #[must_use]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("v")).unwrap();
        let service = UnixListener::bind(folder.path().join(format!("v_{PORT}"))).unwrap();
        listener.set_nonblocking(true).unwrap();
        service.set_nonblocking(true).unwrap();
        Self { folder, listener, service }
    }

    /// A muxer behind the sockets, of which nobody waits.
    #[must_use]
    pub fn muxer(&self) -> Muxer {
        while self.listener.accept().is_ok() || self.service.accept().is_ok() {}
        let listener = self.listener.try_clone().unwrap();
        Muxer::with_listener(GUEST, &self.folder.path().join("v"), listener).unwrap()
    }

    /// A connection that the guest has made.
    #[must_use]
    pub fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.service.accept().ok()?;
        stream.set_nonblocking(true).unwrap();
        Some(stream)
    }

    /// Something that programs of the host do.
    pub fn act(&self, streams: &mut Vec<UnixStream>, input: &mut Input<'_>) {
        let how = input.byte();
        let chosen = usize::from(how >> 4) % streams.len().max(1);
        let room = streams.len() < STREAMS_MAX;
        match (how & 15, streams.get_mut(chosen)) {
            (0..3, _) => streams.extend(self.accept().filter(|_| room)),
            (3..5, _) if room => {
                let Ok(mut stream) = UnixStream::connect(self.folder.path().join("v")) else { return };
                stream.set_nonblocking(true).unwrap();
                let line = match how >> 4 {
                    0..12 => &b"CONNECT 1024\n"[..],
                    12 => b"CONNECT 7\n",
                    13 => b"CONNECT 99999999999\n",
                    14 => b"CON",
                    _ => &[b'x'; 64],
                };
                let _ = stream.write_all(line);
                streams.push(stream);
            }
            (5..9, Some(stream)) => {
                let count = [1, 100, 5000, 60000][usize::from(how >> 6)];
                let _ = stream.write(&vec![0x33; count]);
            }
            (9..12, Some(stream)) => {
                let _ = stream.read(&mut vec![0; 1 << 17]);
            }
            (12, Some(stream)) => {
                let _ = stream.shutdown(Shutdown::Write);
            }
            (13, Some(stream)) => {
                let _ = stream.shutdown(Shutdown::Read);
            }
            (14 | 15, Some(_)) => drop(streams.swap_remove(chosen)),
            _ => {}
        }
    }
}

thread_local! {
    /// The sockets of this thread's inputs.
    pub static HOST: Host = Host::new();
}

/// Runs one input.
pub fn one(data: &[u8]) {
    HOST.with(|host| with(data, host));
}

fn with(data: &[u8], host: &Host) {
    let mut rig = Rig::new(Box::new(Vsock::new(host.muxer())), SPEC);
    let mut streams = Vec::new();
    rig.run(&mut Input::new(data), &mut |input| host.act(&mut streams, input));
    streams.clear();
    while host.accept().is_some() {}

    rig.recover();
    // Programs that are gone may have left lines behind, which the guest still gets requests for.
    let (packet, incoming) = (DATA, DATA + 0x4000);
    let buffer = |nth: u16| incoming + 0x1100 * u64::from(nth % 8);
    let offer = |rig: &mut Rig, nth| rig.guest.chain(0, &[(buffer(nth), 44, true), (buffer(nth) + 0x100, 4096, true)]);
    for nth in 0..64 {
        offer(&mut rig, nth);
        rig.turn(Event::Source(0));
        if rig.guest.given(0) == nth {
            break;
        }
    }
    let given = rig.guest.given(0);
    (given + 1..given + 8).for_each(|nth| offer(&mut rig, nth));
    rig.guest.write(packet, &header(&mut Input::new(&[])));
    rig.request(1, &[(packet, 44, false)]);
    assert_eq!(rig.guest.last_used(0), Some(44), "a good request has no answer");
    assert_eq!(rig.guest.given(0), given + 1, "a good request has other answers");
    assert_eq!(rig.guest.read(buffer(given) + 30, 1), [2], "a good request is refused");
    let mut stream = host.accept().unwrap();
    rig.guest.write(packet, &header(&mut Input::new(&[7, 0, 0, 1])));
    rig.guest.write(packet + 44, b"!");
    rig.request(1, &[(packet, 45, false)]);
    let mut said = [0; 8];
    assert!(matches!(stream.read(&mut said), Ok(1)) && said[0] == b'!', "data does not come through");
    let before = rig.guest.given(0);
    stream.write_all(b"answer").unwrap();
    rig.turn(Event::Source(0));
    assert_eq!(rig.guest.given(0).wrapping_sub(before), 1);
    assert_eq!(rig.guest.last_used(0), Some(50), "data does not come back");
}

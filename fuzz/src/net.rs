//! The network device, over sockets in the place of taps.

use std::os::fd::OwnedFd;

use coracle_virtio::net::Net;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use crate::guest::DATA;
use crate::input::Input;
use crate::rig::{Rig, Shape, Spec};

/// The longest frame with its header (virtio 1.3, section 5.1.6.3.1).
const PACKET_BYTES_MAX: usize = 12 + 65550;
const PACKET_BYTES_MIN: usize = 12 + 14;

const SPEC: Spec = Spec {
    // There are two pairs and the control queue, or one pair.
    shape: |queue| match queue {
        0 | 2 => Shape::Device,
        1 | 3 => Shape::Driver,
        _ => Shape::Both,
    },
    lengths: &[12, 60, 1500, 2048, 26],
    header,
    held_max: 1 << 20,
    moved_max: 66 * PACKET_BYTES_MAX as u64,
    // Two pairs may be looked at for one command, each with a turn's packets.
    operations_max: 3 * 64 + 16,
};

fn header(input: &mut Input<'_>) -> Vec<u8> {
    let how = input.byte();
    if how & 3 == 3 {
        // A command: how many pairs of queues.
        return vec![4 + (how >> 2 & 1), how >> 3 & 1, how >> 4 & 3, how >> 6];
    }
    let mut bytes = vec![how; 12 + 14 + usize::from(how >> 2)];
    bytes[..2].copy_from_slice(&[input.byte(), 0]);
    bytes
}

/// Runs one input.
///
/// # Panics
/// Where the device does what it must not.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    let pairs = 1 + usize::from(input.byte() & 1);
    let link = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    let (taps, peers): (Vec<_>, Vec<_>) = (0..pairs).map(|_| link()).unzip();
    let mut rig = Rig::new(Box::new(Net::over_sockets(taps, [2, 0, 0, 0, 0, 1]).unwrap()), SPEC);
    let mut scratch = vec![0x5a; PACKET_BYTES_MAX + 100];
    rig.run(&mut input, &mut |input| host(&peers, input, &mut scratch));
    drain(&peers, &mut scratch);

    rig.recover();
    // What the host has sent before is still on its way.
    for _ in 0..512 {
        rig.guest.chain(0, &[(DATA + 0x4000, 0x1_8000, true)]);
        let before = rig.guest.given(0);
        rig.ring(0);
        if rig.guest.given(0) == before {
            break;
        }
    }
    let packet: Vec<u8> = [0; 12].into_iter().chain(0..60).collect();
    rig.guest.write(DATA, &packet);
    rig.request(1, &[(DATA, 12, false), (DATA + 12, 60, false)]);
    assert_eq!(received(&peers[0], &mut scratch), Some(packet.len()));
    assert_eq!(&scratch[..packet.len()], packet);
    let before = rig.guest.given(0);
    send(&peers[0], &packet, SendFlags::empty()).unwrap();
    rig.turn(crate::rig::Event::Source(0));
    assert_eq!(rig.guest.given(0).wrapping_sub(before), 1, "no frame comes in");
    assert_eq!(rig.guest.read(DATA + 0x4000 + 12, 60), &packet[12..]);
}

/// What the host's end does: it takes frames, or sends some.
fn host(peers: &[OwnedFd], input: &mut Input<'_>, scratch: &mut [u8]) {
    let how = input.byte();
    if how & 1 == 0 {
        drain(peers, scratch);
    }
    let peer = &peers[usize::from(how >> 1 & 1) % peers.len()];
    let length = match how >> 2 & 15 {
        0..8 => 60,
        8 => 14,
        9 => 13,
        10 => 1500,
        11 => 9000,
        12 => 65550,
        13 => 65551,
        14 => 0,
        _ => usize::from(input.word()),
    };
    for _ in 0..[1, 2, 8, 100][usize::from(how >> 6)] {
        let _ = send(peer, &scratch[..(12 + length).min(PACKET_BYTES_MAX + 100)], SendFlags::empty());
    }
}

fn drain(peers: &[OwnedFd], scratch: &mut [u8]) {
    for peer in peers {
        while let Some(count) = received(peer, scratch) {
            assert!((PACKET_BYTES_MIN..=PACKET_BYTES_MAX).contains(&count), "a frame of {count} bytes leaves");
        }
    }
}

fn received(peer: &OwnedFd, scratch: &mut [u8]) -> Option<usize> {
    recv(peer, &mut *scratch, RecvFlags::empty()).ok().map(|(count, _)| count)
}

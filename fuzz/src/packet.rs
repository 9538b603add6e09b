//! Headers of the socket device, and what the connections make of them, without queues in between.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;

use coracle_virtio::vsock::packet::{HEADER_BYTES, HOST_CID, Header, Op, PAYLOAD_BYTES_MAX, TYPE_STREAM};

use crate::held::peak;
use crate::input::Input;
use crate::vsock::{GUEST, HOST, Host, header};

/// What a connection holds at most: its buffer, and some more for itself.
const CONNECTION_BYTES_MAX: usize = 512 << 10;

/// What the guest has said of a connection, and has got of it.
#[derive(Debug, Default)]
struct Credit {
    buffer: u32,
    taken: u32,
    sent: u32,
    /// More than one connection may have had these ports, so that what was said is not known to be of this one.
    unclear: bool,
}

/// Runs one input.
pub fn one(data: &[u8]) {
    raw(data);
    HOST.with(|host| with(data, host));
}

/// Any bytes are a header, and it is written as it was read, but for operations that are none.
fn raw(data: &[u8]) {
    let mut bytes: [u8; HEADER_BYTES] = Input::new(data).bytes();
    let header = Header::decode(&bytes);
    let number = u16::from_le_bytes([bytes[30], bytes[31]]);
    assert_eq!(header.op.is_some(), (1..8).contains(&number));
    if header.op.is_none() {
        bytes[30..32].fill(0);
    }
    assert_eq!(header.encode(), bytes);
    assert_eq!(Header::decode(&header.encode()), header);
}

fn with(data: &[u8], host: &Host) {
    let mut muxer = host.muxer();
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut credits: HashMap<(u32, u32), Credit> = HashMap::new();
    let payload = vec![0x44; PAYLOAD_BYTES_MAX];
    let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
    let mut input = Input::new(data);
    for _ in 0..256 {
        if input.is_empty() {
            break;
        }
        let how = input.byte();
        match how & 7 {
            0..4 => {
                let bytes: [u8; HEADER_BYTES] = header(&mut input).try_into().unwrap();
                let header = Header::decode(&bytes);
                let Some(data) = payload.get(..header.len as usize) else { continue };
                let ((), held) = peak(|| muxer.receive(&header, data));
                assert!(held <= CONNECTION_BYTES_MAX, "a packet holds {held} bytes");
                note(&mut credits, &header);
            }
            4 | 5 => host.act(&mut streams, &mut input),
            6 => muxer.handle_events(),
            _ => {}
        }
        if how & 8 == 0 {
            take(&mut muxer, &mut credits, &mut buffer, how);
        }
    }
    muxer.forget_all();
    assert!(muxer.accepts() && !muxer.has_pending());
}

fn note(credits: &mut HashMap<(u32, u32), Credit>, header: &Header) {
    if header.src_cid != GUEST || header.dst_cid != HOST_CID {
        return;
    }
    let known = credits.contains_key(&(header.src_port, header.dst_port));
    let credit = credits.entry((header.src_port, header.dst_port)).or_default();
    (credit.buffer, credit.taken) = (header.buf_alloc, header.fwd_cnt);
    let begins = header.op == Some(Op::Request);
    credit.unclear |= begins == known || header.kind != TYPE_STREAM || matches!(header.op, None | Some(Op::Reset));
}

/// Takes a packet of the device's, and checks it.
fn take(
    muxer: &mut coracle_virtio::vsock::muxer::Muxer,
    credits: &mut HashMap<(u32, u32), Credit>,
    buffer: &mut [u8],
    how: u8,
) {
    muxer.handle_events();
    let room = [PAYLOAD_BYTES_MAX, 4096, 1, 0][usize::from(how >> 4 & 3)];
    let Some((header, length)) = muxer.next(&mut buffer[..room]) else { return };
    assert!(length <= room);
    assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, GUEST, TYPE_STREAM));
    assert_eq!(header.len as usize, length);
    let ports = (header.dst_port, header.src_port);
    match header.op {
        Some(Op::Data) => {
            let credit = credits.get_mut(&ports).expect("data of a connection that the guest does not know");
            credit.sent = credit.sent.wrapping_add(header.len);
            let on_the_way = credit.sent.wrapping_sub(credit.taken);
            assert!(credit.unclear || on_the_way <= credit.buffer, "the guest has no room for so much: {credit:?}");
        }
        Some(Op::Reset) => credits.entry(ports).or_default().unclear = true,
        Some(Op::Request) => {
            let known = credits.contains_key(&ports);
            credits.entry(ports).or_default().unclear |= known;
        }
        Some(_) => {}
        None => panic!("a packet for nothing"),
    }
    assert!(header.op == Some(Op::Data) || length == 0);
}

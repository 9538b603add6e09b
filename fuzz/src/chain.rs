//! A ring, its chains, and what their descriptors cover, against a model of each that goes byte by byte.

use std::sync::Arc;

use coracle_virtio::chain::{Buffers, DESCRIPTORS_MAX, Slices, walk};
use coracle_virtio::ring::{Chain, Interrupts, Ring};
use virtio_queue::{Queue as VirtioQueue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{AVAILABLE, DATA, END, Guest, INDIRECT, NEXT, Queue, USED, WRITE};
use crate::held::peak;
use crate::input::Input;
use crate::rig::place;

/// The most bytes of a run that are followed one by one.
const FOLLOWED_MAX: usize = 1 << 16;
/// What a walk holds at most: its pieces, of less than 64 bytes each, while their lists grow.
const HELD_MAX: usize = 3 * 64 * (DESCRIPTORS_MAX + 2);

/// Runs one input.
///
/// # Panics
/// Where the ring does what it must not.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    let how = input.byte();
    let size = [256, 16, 4, 1][usize::from(how & 3)];
    let event_idx = how & 4 != 0;
    let mut guest = Guest::new();
    guest.add_queue(Some((size, [0, AVAILABLE, USED])));
    let mut ring = ring(&guest, size, event_idx);
    // The chains that were taken and not given back.
    let mut taken: Vec<Chain> = Vec::new();
    for _ in 0..64 {
        if input.is_empty() || guest.is_lost() {
            break;
        }
        let how = input.byte();
        match how & 15 {
            0..4 => offer(&mut guest, how >> 4, &mut input),
            4..8 => {
                let heads: Vec<_> = taken.iter().map(Chain::head_index).collect();
                let (popped, held) = peak(|| ring.pop());
                assert!(held < 4096);
                let Ok(popped) = popped else { return };
                let waiting = guest.outstanding(0).wrapping_sub(heads.len() as u16);
                assert_eq!(popped.is_some(), waiting > 0, "a ring gives what is not there, or keeps what is");
                if let Some(chain) = popped {
                    serve(&mut guest, &chain, &mut input);
                    taken.push(chain);
                }
            }
            8 => {
                if let Some(chain) = taken.pop() {
                    ring.unpop();
                    let again = ring.pop().unwrap().expect("what was put back is not there");
                    assert_eq!(again.head_index(), chain.head_index());
                    ring.unpop();
                }
            }
            9 | 10 => {
                let count = (usize::from(how >> 4) + 1).min(taken.len());
                let used: Vec<_> = taken.drain(..count).map(|chain| (chain.head_index(), 0)).collect();
                let before = guest.given(0);
                let done = guest.watch(true, || match used.as_slice() {
                    [(head, written)] => ring.push(*head, *written),
                    all => ring.push_all(all),
                });
                // A head that is none is popped, and can't be given back.
                if done.is_err() {
                    assert!(used.iter().any(|(head, _)| *head >= size), "a chain can't be given back: {done:?}");
                    return;
                }
                if guest.is_lost() {
                    break;
                }
                assert!(used.is_empty() || guest.given(0).wrapping_sub(before) == count as u16);
            }
            11 => guest.watch(true, || ring.signal()).unwrap(),
            12 => {
                let there = guest.watch(true, || ring.listen()).unwrap();
                assert_eq!(there, guest.outstanding(0) != taken.len() as u16);
            }
            13 => guest.watch(true, || ring.hush()).unwrap(),
            14 => {
                let at = u64::from(input.word()) % USED;
                let bytes: [u8; 2] = input.bytes();
                // As in `serve`.
                let Some(ring) = guest.queue(0).map(|queue| available(&queue)) else { return };
                if !ring.contains(&at) && !ring.contains(&(at + 1)) {
                    guest.write(at, &bytes);
                }
            }
            _ => guest.look(),
        }
    }
    guest.look();
}

fn ring(guest: &Guest, size: u16, event_idx: bool) -> Ring {
    let mut queue: VirtioQueue = QueueT::new(size).unwrap();
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let interrupts = Arc::new(Interrupts::new(vec![event()], 1));
    interrupts.set(Some(0), 0);
    Ring::new(0, queue, guest.memory().clone(), interrupts, event()).unwrap()
}

/// Writes a chain and makes it available.
fn offer(guest: &mut Guest, how: u8, input: &mut Input<'_>) {
    let Some(queue) = guest.queue(0) else { return };
    if guest.outstanding(0) >= queue.size {
        return;
    }
    let count = [1, 2, 3, 9][usize::from(how & 3)].min(queue.size);
    let (outside, odd) = (how & 4 != 0, how & 8 != 0);
    let readable = u16::from(input.byte()) % (count + 1);
    let table = if outside { DATA + 16 * u64::from(input.byte()) } else { queue.descriptors };
    let (head, mut slot) = (queue.slot, if outside { 0 } else { queue.slot });
    for nth in 0..count {
        let mut next = if outside { slot + 1 } else { (slot + 1) % queue.size };
        let mut flags = if nth + 1 < count { NEXT } else { 0 } | if nth < readable { 0 } else { WRITE };
        let mut address = place(input);
        let mut length = u32::from(input.byte()) * if flags & WRITE == 0 { 1 } else { 5 };
        if odd {
            match input.byte() {
                0..10 => length = input.double() & 0xf_ffff,
                10..20 => address = input.quad(),
                20..30 => flags ^= input.word() & 7,
                30..50 => next = input.word() % (2 * queue.size),
                50..55 => length = input.double(),
                _ => {}
            }
        } else {
            address = address.min(END - u64::from(length));
        }
        guest.descriptor(table, slot, address, length, flags, next);
        slot = if outside { slot + 1 } else { next % queue.size };
    }
    if outside {
        let entries = if odd { input.of(&[count.into(), 0, 1, 2, 0x1_0000, 0x2000]) } else { u32::from(count) };
        let flags = INDIRECT | if odd { input.of(&[0, NEXT, WRITE, INDIRECT]) } else { 0 };
        guest.descriptor(queue.descriptors, head, table, 16 * entries, flags, head);
        slot = (head + 1) % queue.size;
    }
    guest.set_slot(0, slot);
    guest.offer(0, head);
}

/// Walks a chain, and takes apart what it covers.
fn serve(guest: &mut Guest, chain: &Chain, input: &mut Input<'_>) {
    let Some(queue) = guest.queue(0) else { return };
    let model = follow(guest, &queue, chain.head_index());
    let memory = chain.memory();
    let (walked, held) = peak(|| walk(chain, memory));
    assert!(held <= HELD_MAX, "a walk holds {held} bytes");
    let Ok(Buffers { mut readable, mut writable, descriptors }) = walked else {
        assert!(!model.sound, "a chain that is right is refused: {walked:?}");
        return;
    };
    assert!(model.ends, "a chain without an end is taken");
    assert!(!model.wrong, "a chain is taken that is out of order, or out of the guest's memory");
    assert_eq!(descriptors, model.descriptors);
    let length = |pieces: &[(u64, u64)]| pieces.iter().map(|(_, length)| *length).sum::<u64>();
    assert_eq!(readable.len() as u64, length(&model.readable));
    assert_eq!(writable.len() as u64, length(&model.writable));
    let (Some(from), Some(into)) = (bytes(&model.readable), bytes(&model.writable)) else { return };
    // What is written in between may be what is read afterwards.
    take_apart(guest, &mut readable, from, false, input);
    // Not where it would be written over what is available: the model looks there for what the device has taken out before.
    let ring = available(&queue);
    if model.writable.iter().all(|(at, length)| *at >= ring.end || at.saturating_add(*length) <= ring.start) {
        take_apart(guest, &mut writable, into, true, input);
    }
}

/// Where the ring of what is available lies: flags, index, entries (virtio 1.3, section 2.7.6).
fn available(queue: &Queue) -> std::ops::Range<u64> {
    queue.available..queue.available + 4 + 2 * u64::from(queue.size)
}

/// Does this and that with a run of bytes, whose addresses are `model`.
fn take_apart(guest: &mut Guest, slices: &mut Slices<'_>, mut model: Vec<u64>, write: bool, input: &mut Input<'_>) {
    for _ in 0..4 {
        let how = input.byte();
        let count = match how >> 4 {
            15 => usize::from(input.word()),
            nth => model.len() * usize::from(nth) / 8,
        };
        match how & 7 {
            0 | 1 if write => {
                let bytes: Vec<u8> = (0..count).map(|at| (at as u8) ^ how).collect();
                let put = slices.put(&bytes);
                assert_eq!(put, count.min(model.len()));
                for (address, byte) in model.drain(..put).zip(bytes) {
                    guest.write(address, &[byte]);
                }
            }
            0 | 1 => {
                let mut bytes = vec![0; count];
                let done = slices.take(&mut bytes);
                assert_eq!(done, count <= model.len());
                if done {
                    let there = model.drain(..count).map(|address| guest.read(address, 1)[0]);
                    assert!(bytes.iter().copied().eq(there), "other bytes than the guest's are read");
                }
            }
            2 | 3 => {
                slices.advance(count);
                model.drain(..count.min(model.len()));
            }
            4 | 5 => {
                slices.truncate(count);
                model.truncate(count);
            }
            6 => {
                let last = slices.split_last();
                assert_eq!(last.map(|last| last.len()), model.pop().map(|_| 1));
            }
            _ => {}
        }
        let pieces: usize = slices.pieces().iter().map(vm_memory::VolatileSlice::len).sum();
        assert_eq!((slices.len(), pieces), (model.len(), model.len()));
        assert_eq!(slices.is_empty(), model.is_empty());
        assert!(slices.pieces().iter().all(|piece| !piece.is_empty()), "a piece of nothing");
    }
}

/// The addresses of all bytes, where they are few.
fn bytes(pieces: &[(u64, u64)]) -> Option<Vec<u64>> {
    let total: u64 = pieces.iter().map(|(_, length)| *length).sum();
    (total <= FOLLOWED_MAX as u64).then(|| pieces.iter().flat_map(|(at, length)| *at..at + length).collect())
}

/// A chain as the specification has it.
struct Model {
    readable: Vec<(u64, u64)>,
    writable: Vec<(u64, u64)>,
    descriptors: usize,
    /// It has an end.
    ends: bool,
    /// A driver could have made it.
    sound: bool,
    /// It must not be served.
    wrong: bool,
}

fn follow(guest: &Guest, queue: &Queue, head: u16) -> Model {
    let mut model =
        Model { readable: vec![], writable: vec![], descriptors: 0, ends: false, sound: true, wrong: false };
    let (mut table, mut entries, mut slot) = (queue.descriptors, u64::from(queue.size), head);
    let mut outer = true;
    // One that goes on for longer goes round in circles.
    while model.descriptors <= 0x1_0000 && u64::from(slot) < entries {
        let at = table.saturating_add(16 * u64::from(slot));
        let bytes = guest.read(at, 16);
        let Some((address, rest)) = bytes.split_first_chunk::<8>() else { break };
        let address = u64::from_le_bytes(*address);
        let length = u64::from(u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]));
        let flags = u16::from_le_bytes([rest[4], rest[5]]);
        if flags & INDIRECT != 0 {
            // Only in the queue's own table, only last, and of whole entries (virtio 1.3, section 2.7.5.3).
            let entries_there = length / 16;
            model.sound &= outer && model.descriptors == 0 && flags == INDIRECT && length % 16 == 0;
            model.sound &= entries_there > 0 && entries_there <= u64::from(queue.size) && address % 16 == 0;
            if !outer {
                break;
            }
            (outer, table, entries, slot) = (false, address, entries_there, 0);
            continue;
        }
        model.descriptors += 1;
        let inside = address.checked_add(length).is_some_and(|end| end <= END);
        let ordered = flags & WRITE != 0 || model.writable.iter().all(|(_, length)| *length == 0);
        model.wrong |= !ordered || !inside && length > 0;
        model.sound &= ordered && inside;
        model.sound &= model.descriptors <= usize::from(queue.size);
        let list = if flags & WRITE == 0 { &mut model.readable } else { &mut model.writable };
        list.push((address, length));
        if flags & NEXT == 0 {
            model.ends = true;
            break;
        }
        slot = u16::from_le_bytes([rest[6], rest[7]]);
    }
    model.sound &= model.ends;
    model
}

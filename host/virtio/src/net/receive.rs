//! From a tap to the guest.

use std::sync::Arc;

use rustix::io::Errno;

use super::tap::Tap;
use super::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES};
use crate::chain::{Slices, walk};
use crate::device::{Broken, Counters, Turn};
use crate::drain::Budget;
use crate::ring::Ring;

/// The most of one turn.
pub(super) const BUDGET: Budget = Budget { chains: 64, bytes: 64 * PACKET_BYTES_MAX };
const PACKET_BYTES_MAX: usize = HEADER_BYTES + FRAME_BYTES_MAX;
/// The most descriptors that are looked at for one packet, and in one turn before its last packet. A driver has one or two a
/// chain; one that has many hundreds, and no room in them, is not to have them counted over and over.
const DESCRIPTORS_MAX: usize = 4096;
/// How often a queue is looked at again that has nothing, though its guest says that it has.
const RECHECKS_MAX: usize = 4;

/// One pair's receive queue.
#[derive(Debug)]
pub(super) struct Receiver {
    ring: Option<Ring>,
    /// A packet on its way, and one byte more: a longer one fills that too.
    packet: Vec<u8>,
    /// The packet's bytes with its header; 0 where there is none.
    length: usize,
    /// Whether the tap may have another packet. It tells only of changes, so this is false only once it has said that it has
    /// none.
    readable: bool,
    /// Whether a packet may be spread over several chains.
    mergeable: bool,
}

/// What became of a packet.
enum Delivery {
    Delivered,
    /// The guest has no room now.
    Starved,
    /// The guest will not have room for it.
    Dropped,
    /// The guest has got more memory meanwhile, and a buffer may lie there.
    Outdated,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self { ring: None, packet: vec![0; PACKET_BYTES_MAX + 1], length: 0, readable: false, mergeable: false }
    }

    pub(super) fn start(&mut self, ring: Ring, mergeable: bool) {
        (self.ring, self.mergeable, self.readable) = (Some(ring), mergeable, true);
    }

    pub(super) fn stop(&mut self) {
        (self.ring, self.length) = (None, 0);
    }

    /// The queue, while there is one.
    pub(super) fn ring(&self) -> Option<&Ring> {
        self.ring.as_ref()
    }

    /// The tap has something, or may have.
    pub(super) fn wake(&mut self) {
        self.readable = true;
    }

    /// Passes packets on until the tap has none, the guest has no room, or `budget` is spent.
    pub(super) fn pump(&mut self, tap: &Tap, counters: &mut Counters, budget: Budget) -> Result<Turn, Broken> {
        let Some(ring) = &mut self.ring else { return Ok(Turn::Done) };
        let (mut turn, mut delivered, mut looked, mut moved) = (Turn::More, false, 0, 0);
        for _ in 0..budget.chains {
            if looked > DESCRIPTORS_MAX || moved >= budget.bytes {
                break;
            }
            if self.length == 0 {
                if !self.readable {
                    turn = Turn::Done;
                    break;
                }
                match rustix::io::read(tap.fd(), self.packet.as_mut_slice()) {
                    Ok(length) if (HEADER_BYTES + FRAME_BYTES_MIN..=PACKET_BYTES_MAX).contains(&length) => {
                        self.length = length;
                    }
                    Ok(0) => self.readable = false,
                    Ok(_) => counters.errors += 1,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => self.readable = false,
                    // The link is gone, or its queue detached.
                    Err(_) => {
                        counters.errors += 1;
                        self.readable = false;
                    }
                }
                if self.length == 0 {
                    continue;
                }
            }
            let packet = self.packet.get_mut(..self.length).unwrap_or_default();
            match deliver(ring, packet, self.mergeable, &mut looked)? {
                Delivery::Delivered => {
                    counters.operations_in += 1;
                    counters.bytes_in += (self.length - HEADER_BYTES) as u64;
                    (delivered, moved) = (true, moved + self.length);
                }
                Delivery::Starved => {
                    turn = Turn::Done;
                    break;
                }
                Delivery::Dropped => counters.errors += 1,
                Delivery::Outdated => continue,
            }
            self.length = 0;
        }
        if delivered {
            ring.signal()?;
        }
        Ok(turn)
    }
}

/// Spreads a packet over the guest's chains. Those that it does not go into stay the guest's offer.
///
/// A chain that makes no sense breaks the device: it can't be given back before those that it came between. `looked` goes up
/// by the descriptors that were looked at.
fn deliver(ring: &mut Ring, packet: &mut [u8], mergeable: bool, looked: &mut usize) -> Result<Delivery, Broken> {
    let memory = ring.memory();
    let chains_max = if mergeable { usize::from(ring.size()) } else { 1 };
    let mut chains: Vec<(u16, Slices<'_>)> = Vec::new();
    let (mut room, mut rechecks, mut descriptors) = (0, 0, 0);
    let outcome = loop {
        if room >= packet.len() {
            break Delivery::Delivered;
        }
        // Whoever has offered the whole queue, or the only buffer that may be used, has no room to offer.
        if chains.len() >= chains_max || descriptors > DESCRIPTORS_MAX {
            break Delivery::Dropped;
        }
        let Some(chain) = ring.pop()? else {
            // Asked for while the chains are still taken: the doorbell is to tell of others than these.
            if rechecks < RECHECKS_MAX && ring.listen()? {
                rechecks += 1;
                continue;
            }
            break Delivery::Starved;
        };
        let buffers = match walk(&chain, &memory) {
            Ok(buffers) => buffers,
            Err(_) if !Arc::ptr_eq(&memory, &ring.memory()) => {
                ring.unpop();
                break Delivery::Outdated;
            }
            Err(error) => return Err(Broken(format!("a receive buffer: {error}"))),
        };
        if !buffers.readable.is_empty() {
            return Err(Broken::new("a receive buffer may not be written"));
        }
        room += buffers.writable.len();
        descriptors += buffers.descriptors;
        chains.push((chain.head_index(), buffers.writable));
    };
    *looked += descriptors;
    if !matches!(outcome, Delivery::Delivered) {
        for _ in &chains {
            ring.unpop();
        }
        return Ok(outcome);
    }
    // `num_buffers`, which the tap leaves to us (section 5.1.6.4.2).
    let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    if let Some(place) = packet.get_mut(HEADER_BYTES - 2..HEADER_BYTES) {
        place.copy_from_slice(&count.to_le_bytes());
    }
    let mut rest: &[u8] = packet;
    let mut used = Vec::with_capacity(chains.len());
    for (head, slices) in &mut chains {
        let written = slices.put(rest);
        rest = rest.get(written..).unwrap_or_default();
        used.push((*head, u32::try_from(written).unwrap_or(0)));
    }
    ring.push_all(&used)?;
    Ok(Delivery::Delivered)
}

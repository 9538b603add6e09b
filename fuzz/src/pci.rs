//! The bus: accesses to the configuration space and to the devices' registers, in any order and width and at any place, and what
//! KVM knows of doorbells and interrupts after each of them.

use std::collections::BTreeSet;

use coracle_virtio::device::Device;
use coracle_virtio::rng::Rng;
use coracle_vmm::fuzzing::{BAR_BYTES, Bench, ECAM, Known, NOTIFY, NOTIFY_BYTES, Place, WINDOW};

use crate::guest::Guest;
use crate::input::Input;

/// Devices on the bus, in slots 1 and up.
pub(crate) const DEVICES: u64 = 3;
/// Slots that are accessed, one without a device behind them.
const SLOTS: u64 = DEVICES + 2;
/// Accesses of one input.
const ACCESSES_MAX: usize = 256;

/// Registers of the header (PCI 3.0, section 6.1).
const COMMAND: u64 = 0x04;
const BAR: u64 = 0x10;
const CAPABILITIES: u64 = 0x34;
/// The number of the capability of message-signalled interrupts.
const MSIX: u8 = 0x11;
/// Where the table of interrupts and that of those that wait are in a BAR.
const TABLE: u64 = 0x4000;

/// Runs one input.
///
/// # Panics
/// Where the bus does what it must not.
pub fn one(data: &[u8]) {
    let guest = Guest::new();
    let devices = (0..DEVICES).map(|_| Box::new(Rng::new()) as Box<dyn Device>).collect();
    let bench = Bench::new(devices, guest.memory()).unwrap();
    let msix = msix(&bench);
    let fixed: Vec<_> = (0..SLOTS).map(|slot| fixed(&bench, slot)).collect();
    let mut input = Input::new(data);
    for _ in 0..ACCESSES_MAX {
        if input.is_empty() {
            break;
        }
        access(&bench, msix, &mut input);
        check(&bench, msix);
    }
    for (slot, before) in (0..SLOTS).zip(fixed) {
        assert_eq!(before, self::fixed(&bench, slot), "slot {slot}: what a device is has changed");
    }
    // A guest that does everything right finds its devices.
    for slot in 1..=DEVICES {
        let place = WINDOW + slot * BAR_BYTES;
        write(&bench, slot, COMMAND, &0_u16.to_le_bytes());
        write(&bench, slot, BAR, &(place as u32).to_le_bytes());
        write(&bench, slot, BAR + 4, &((place >> 32) as u32).to_le_bytes());
    }
    for slot in 1..=DEVICES {
        write(&bench, slot, COMMAND, &2_u16.to_le_bytes());
        write(&bench, slot, msix + 2, &(1_u16 << 15).to_le_bytes());
        let entry = WINDOW + slot * BAR_BYTES + TABLE;
        for (offset, value) in [(0, 0xfee0_0000_u32), (4, 0), (8, 0x30 + slot as u32), (12, 0)] {
            let _ = bench.write(entry + offset, &value.to_le_bytes());
        }
    }
    let known = check(&bench, msix);
    for (slot, place) in (1..).zip(&bench.places()) {
        let (bar, interrupt) = (WINDOW + slot * BAR_BYTES, place.interrupts[0]);
        assert_eq!((place.bar, interrupt.message), (bar, (0xfee0_0000, 0x30 + slot as u32)));
        assert!(known.watched.contains(&(interrupt.event, interrupt.number)), "slot {slot} has no interrupt");
        let first = known.doorbells.get(&(bar + NOTIFY));
        assert!(first == place.doorbells.first() || known.contested > 0, "slot {slot} has no doorbell");
    }
}

/// Where the capability of message-signalled interrupts is, in each device.
pub(crate) fn msix(bench: &Bench) -> u64 {
    capabilities(bench, 1).into_iter().find(|(number, _)| *number == MSIX).unwrap().1
}

/// One access of the guest's.
pub(crate) fn access(bench: &Bench, msix: u64, input: &mut Input<'_>) {
    let kind = input.byte();
    let slot = u64::from(kind >> 5) % SLOTS;
    let width = input.of(&[4_usize, 1, 2, 8, 3]);
    let bytes: [u8; 8] = match kind & 7 {
        0 => [0; 8],
        1 => [0xff; 8],
        2 => (1_u64 << 15).to_le_bytes(),
        3 => 2_u64.to_le_bytes(),
        4 => (WINDOW + BAR_BYTES * input.below(4)).to_le_bytes(),
        _ => input.bytes(),
    };
    let bytes = &bytes[..width];
    let config = ECAM + (slot << 15);
    let place = bench.places().get(slot.wrapping_sub(1) as usize).map_or(0, |place| place.bar);
    let (address, reads) = match kind >> 3 & 3 {
        0 => (config + input.of(&[COMMAND, BAR, BAR + 4, msix, msix + 2, BAR + 2, COMMAND - 1, msix - 1]), false),
        1 => (place + TABLE + 16 * (input.below(4)) + input.of(&[0_u64, 4, 8, 12, 2, 5]), false),
        2 => (config + input.below(0x110), input.rare(64)),
        _ => match input.byte() & 7 {
            0 => (place + NOTIFY + input.below(16), input.rare(64)),
            1 => (place + input.below(BAR_BYTES), input.rare(64)),
            2 => (ECAM + u64::from(input.double()), input.rare(128)),
            3 => (input.quad(), input.rare(128)),
            _ => (place + input.below(64), input.rare(64)),
        },
    };
    if reads {
        let mut data = [0xa5; 8];
        bench.read(address, &mut data[..width]);
    } else {
        let _ = bench.write(address, bytes);
    }
}

/// What KVM knows is what the guest has set.
pub(crate) fn check(bench: &Bench, msix: u64) -> Known {
    let (places, known) = (bench.places(), bench.known());
    assert_eq!(known.refused, 0, "KVM was asked for what it never grants");
    let mut watched = BTreeSet::new();
    for (slot, place) in (1..).zip(&places) {
        // Enabled, and not all masked (PCI 3.0, section 6.8.2.3).
        let open = u16::from_le_bytes(read(bench, slot, msix + 2)) >> 14 == 2;
        for interrupt in place.interrupts.iter().filter(|interrupt| open && interrupt.control & 1 == 0) {
            watched.insert((interrupt.event, interrupt.number));
            let number = interrupt.number;
            assert_eq!(known.routes.get(&number), Some(&interrupt.message), "the message of {number}");
        }
    }
    assert_eq!(known.watched, watched, "the interrupts that come");
    check_doorbells(&places, &known);
    known
}

fn check_doorbells(places: &[Place], known: &Known) {
    let mut wanted = BTreeSet::new();
    for place in places.iter().filter(|place| place.bar != 0) {
        for (doorbell, queue) in place.doorbells.iter().zip(0..) {
            let address = place.bar + NOTIFY + queue * NOTIFY_BYTES;
            let is_there = known.doorbells.get(&address) == Some(doorbell);
            assert!(is_there || known.contested > 0, "no doorbell at {address:#x}");
            wanted.insert((address, *doorbell));
        }
    }
    for (address, doorbell) in &known.doorbells {
        assert!(wanted.contains(&(*address, *doorbell)), "a doorbell at {address:#x} that nobody has put there");
    }
}

/// What no guest may change: identity, class, and where the capabilities are.
fn fixed(bench: &Bench, slot: u64) -> ([u8; 4], [u8; 4], Vec<(u8, u64)>) {
    (read(bench, slot, 0), read(bench, slot, 8), capabilities(bench, slot))
}

/// Numbers and places of the capabilities.
fn capabilities(bench: &Bench, slot: u64) -> Vec<(u8, u64)> {
    let mut found = Vec::new();
    let [mut next] = read(bench, slot, CAPABILITIES);
    while next != 0 && next != 0xff {
        assert!(found.len() < 48, "the capabilities have no end");
        let [number, after] = read(bench, slot, u64::from(next));
        found.push((number, u64::from(next)));
        next = after;
    }
    found
}

fn read<const N: usize>(bench: &Bench, slot: u64, register: u64) -> [u8; N] {
    let mut data = [0; N];
    bench.read(ECAM + (slot << 15) + register, &mut data);
    data
}

fn write(bench: &Bench, slot: u64, register: u64, data: &[u8]) {
    let _ = bench.write(ECAM + (slot << 15) + register, data);
}

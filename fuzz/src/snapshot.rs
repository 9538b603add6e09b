//! A machine that is saved: devices and their bus take the place of others, as these were or as somebody has edited what was saved of them;
//! and the reader of the whole state.

use std::sync::Arc;

use coracle_virtio::balloon::Balloon;
use coracle_virtio::device::Device;
use coracle_virtio::mem::{BLOCK_BYTES, Mem, Observer};
use coracle_virtio::rng::Rng;
use coracle_vmm::fuzzing::{Bench, is_state};

use crate::guest::{DATA, Guest};
use crate::input::Input;
use crate::pci;
use crate::rig::{Rig, Shape, Spec};

/// Accesses of a guest on each of both buses.
const ACCESSES_MAX: usize = 64;
/// Edits of what was saved.
const EDITS_MAX: u8 = 8;

const SPEC: Spec = Spec {
    shape: |_| Shape::Device,
    lengths: &[16, 64, 1024, 4096],
    header: |_| vec![1; 16],
    held_max: 256 << 10,
    moved_max: 256 << 20,
    operations_max: 128,
};

/// Runs one input.
///
/// # Panics
/// Where a device or the bus does what it must not.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    match input.byte() & 3 {
        0 => drop(is_state(data)),
        1 => bus(&mut input),
        _ => device(&mut input),
    }
}

/// Changes bytes of a text, mostly so that it stays one of its kind. How many.
pub(crate) fn edit(saved: &mut Vec<u8>, input: &mut Input<'_>) -> u8 {
    let edits = input.byte() % EDITS_MAX;
    for _ in 0..edits {
        let at = usize::from(input.word()) % saved.len().max(1);
        let digit = b'0' + input.byte() % 10;
        // The next number.
        let number = saved.iter().skip(at).position(u8::is_ascii_digit).map(|offset| at + offset);
        match (input.byte() % 16, number) {
            (0..10, Some(place)) => saved[place] = digit,
            (10 | 11, Some(place)) => saved.insert(place, digit),
            (12 | 13, Some(place)) => drop(saved.remove(place)),
            _ if saved.is_empty() => {}
            _ => saved[at] = input.byte(),
        }
    }
    edits
}

fn bus(input: &mut Input<'_>) {
    let guest = Guest::new();
    let bench = || {
        let devices = (0..pci::DEVICES).map(|_| Box::new(Rng::new()) as Box<dyn Device>).collect();
        Bench::new(devices, guest.memory()).unwrap()
    };
    let first = bench();
    let msix = pci::msix(&first);
    for _ in 0..ACCESSES_MAX.min(usize::from(input.byte())) {
        pci::access(&first, msix, input);
    }
    let mut saved = first.save();
    // Their descriptors are others, and their numbers may be.
    drop(first);
    let second = bench();
    let before = saved.clone();
    let edits = edit(&mut saved, input);
    let restored = second.restore(&saved);
    assert!(restored || edits > 0, "devices can't take the place of their like");
    if edits == 0 {
        assert_eq!(String::from_utf8(second.save()), String::from_utf8(before), "what was saved is not what is there");
    }
    if restored {
        pci::check(&second, msix);
    }
    for _ in 0..ACCESSES_MAX {
        if input.is_empty() {
            break;
        }
        pci::access(&second, msix, input);
        if restored {
            pci::check(&second, msix);
        }
    }
}

struct Nobody;

impl Observer for Nobody {
    fn gains(&mut self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn loses(&mut self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn uses(&mut self, _: u64) {}
}

fn device(input: &mut Input<'_>) {
    let kind = input.byte() % 3;
    let make = || -> Box<dyn Device> {
        match kind {
            0 => Box::new(Rng::new()),
            1 => Box::new(Balloon::new(Arc::default())),
            // Over memory that the guest does not have: what it does to blocks fails, and is refused.
            _ => Box::new(Mem::new(1 << 40, 16 * BLOCK_BYTES, BLOCK_BYTES, Box::new(Nobody)).unwrap()),
        }
    };
    let mut rig = Rig::new(make(), SPEC);
    if kind == 1 {
        rig.guest.let_pages_go(0..crate::guest::END);
        rig.guest.let_chains_be_kept(2);
    }
    let actions = usize::from(input.byte() & 31);
    rig.set_up(input);
    rig.act(input, actions);
    rig.go_on(make(), input);
    rig.act(input, usize::MAX);
    rig.recover();
    if kind == 0 {
        assert_eq!(rig.request(0, &[(DATA, 64, true)]), 64);
    }
}

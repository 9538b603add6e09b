//! The memory device, over a part of the guest's memory in small blocks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use coracle_virtio::device::Device;
use coracle_virtio::mem::{Mem, Observer};

use crate::guest::{DATA, END, SEAM};
use crate::input::Input;
use crate::rig::{Rig, Shape, Spec};

const BLOCK: u64 = 4096;
/// What the device has: behind what the rig writes mostly, over the border of two regions.
const START: u64 = SEAM - 8 * BLOCK;
const BLOCKS: u64 = 16;

const SPEC: Spec = Spec {
    shape: |_| Shape::Both,
    lengths: &[24, 24, 10, 16, 64],
    header,
    held_max: 256 << 10,
    // A turn's budget is more than all of it, again and again.
    moved_max: 64 * BLOCKS * BLOCK,
    operations_max: 128,
};

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = Vec::from(kind.to_le_bytes());
    bytes.extend([0; 6]);
    bytes.extend(address.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.extend([0; 6]);
    bytes
}

fn header(input: &mut Input<'_>) -> Vec<u8> {
    let [how, block, count] = input.bytes();
    let address = match how >> 4 {
        15 => input.quad(),
        14 => START + u64::from(block),
        13 => START.wrapping_sub(BLOCK),
        _ => START + u64::from(block % 18) * BLOCK,
    };
    let count = if how & 8 != 0 { u16::from(count) << 8 | 1 } else { u16::from(count % 18) + 1 };
    request(u16::from(how & 7), address, count)
}

/// Runs one input.
///
/// # Panics
/// Where the device does what it must not.
pub fn one(data: &[u8]) {
    const { assert!(START + BLOCKS * BLOCK <= END) };
    let told = Arc::new(AtomicU64::new(0));
    let observer = Told { uses: Arc::clone(&told), blocks: BTreeSet::new() };
    let mem = Mem::new(START, BLOCKS * BLOCK, BLOCK, Box::new(observer)).unwrap();
    let mut rig = Rig::new(Box::new(mem), SPEC);
    rig.guest.let_pages_go(START..START + BLOCKS * BLOCK);
    let mut input = Input::new(data);
    let offered = u64::from(input.byte() % 17) * BLOCK;
    rig.transport.device().resize(offered).unwrap();
    rig.run(&mut input, &mut |_| {});
    let plugged = field(rig.transport.device(), 40);
    assert!(
        plugged <= offered && told.load(Ordering::Relaxed) == plugged,
        "the guest has {plugged} bytes of {offered}"
    );
    rig.recover();
    let (ask, answer) = (DATA, DATA + 0x100);
    let mut asked = |kind, address, count| {
        rig.guest.write(ask, &request(kind, address, count));
        assert_eq!(rig.request(0, &[(ask, 24, false), (answer, 10, true)]), 10);
        u16::from_le_bytes(rig.guest.read(answer, 2).try_into().unwrap())
    };
    assert_eq!(asked(2, 0, 0), 0, "all of it can be given back");
    assert_eq!(asked(0, START, 16), u16::from(offered < 16 * BLOCK), "and taken where it is offered");
}

fn field(device: &dyn Device, at: usize) -> u64 {
    u64::from_le_bytes(*device.config()[at..].first_chunk().unwrap())
}

/// What the guest uses, as it is told.
struct Told {
    uses: Arc<AtomicU64>,
    blocks: BTreeSet<u64>,
}

impl Observer for Told {
    fn gains(&mut self, start: u64, bytes: u64) -> std::io::Result<()> {
        assert!(bytes == BLOCK && self.blocks.insert(start), "a block is gained twice");
        Ok(())
    }

    fn loses(&mut self, start: u64, _: u64) -> std::io::Result<()> {
        assert!(self.blocks.remove(&start), "a block is lost that was not gained");
        Ok(())
    }

    fn uses(&mut self, bytes: u64) {
        assert_eq!(bytes, self.blocks.len() as u64 * BLOCK);
        self.uses.store(bytes, Ordering::Relaxed);
    }
}

//! Files as memory: the device, which answers requests, and never reaches the file.

use coracle_virtio::pmem::Pmem;

use crate::guest::DATA;
use crate::input::Input;
use crate::rig::{Rig, Shape, Spec};

const SPEC: Spec = Spec {
    shape: |_| Shape::Both,
    lengths: &[4, 8, 64],
    header: |input| input.of(&[0_u32, 0, 1, u32::MAX]).to_le_bytes().to_vec(),
    held_max: 128 << 10,
    moved_max: 65 * 4,
    operations_max: 128,
};

/// Runs one input.
pub fn one(data: &[u8]) {
    let mut rig = Rig::new(Box::new(Pmem::new(5 << 30, 6 << 20)), SPEC);
    rig.run(&mut Input::new(data), &mut |_| {});
    rig.recover();
    rig.guest.write(DATA, &0_u32.to_le_bytes());
    rig.guest.write(DATA + 8, &[7; 4]);
    assert_eq!(rig.request(0, &[(DATA, 4, false), (DATA + 8, 4, true)]), 4);
    assert_eq!(rig.guest.read(DATA + 8, 4), [0; 4], "a flush fails");
}

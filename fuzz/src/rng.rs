//! The entropy device.

use coracle_virtio::rng::Rng;

use crate::guest::DATA;
use crate::input::Input;
use crate::rig::{Rig, Shape, Spec};

const SPEC: Spec = Spec {
    shape: |_| Shape::Device,
    lengths: &[16, 64, 1024, 4096],
    header: |_| vec![1; 16],
    held_max: 128 << 10,
    moved_max: 5 * (64 << 10),
    operations_max: 128,
};

/// Runs one input.
pub fn one(data: &[u8]) {
    let mut rig = Rig::new(Box::new(Rng::new()), SPEC);
    rig.run(&mut Input::new(data), &mut |_| {});
    rig.recover();
    assert_eq!(rig.request(0, &[(DATA, 64, true)]), 64);
}

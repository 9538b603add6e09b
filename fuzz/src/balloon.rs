//! The balloon, which may take any page of the guest's.

use std::sync::Arc;

use coracle_virtio::balloon::Balloon;

use crate::guest::{DATA, END};
use crate::input::Input;
use crate::rig::{Event, Rig, Shape, Spec};

const SPEC: Spec = Spec {
    shape: |queue| if queue == 3 { Shape::Device } else { Shape::Driver },
    lengths: &[4, 40, 1024, 4096, 0x8000],
    header,
    held_max: 256 << 10,
    // A turn's budget, and a chain over all of the memory that is the last in it, again and again.
    moved_max: (256 << 20) + 1024 * END,
    operations_max: 64,
};

/// Numbers of pages, or figures.
fn header(input: &mut Input<'_>) -> Vec<u8> {
    let how = input.byte();
    if how & 0xc0 == 0xc0 {
        let mut figure = Vec::from(u16::from(how & 15).to_le_bytes());
        figure.extend(input.quad().to_le_bytes());
        return figure;
    }
    let first = u32::from(input.byte() & 63);
    let number = |nth: u32| match how >> 4 & 3 {
        0 => first + nth,
        1 => first.saturating_sub(nth),
        2 => first,
        _ => u32::MAX - nth,
    };
    (0..u32::from(how & 15)).flat_map(|nth| number(nth).to_le_bytes()).collect()
}

/// Runs one input.
///
/// # Panics
/// Where the device does what it must not.
pub fn one(data: &[u8]) {
    let mut rig = Rig::new(Box::new(Balloon::new(Arc::default())), SPEC);
    rig.guest.let_pages_go(0..END);
    rig.guest.let_chains_be_kept(2);
    rig.run(&mut Input::new(data), &mut |_| {});
    rig.recover();
    // The last page goes, by its number.
    let page = END / 4096 - 1;
    rig.guest.write(page * 4096, &[7; 4096]);
    rig.guest.write(DATA, &u32::try_from(page).unwrap().to_le_bytes());
    rig.request(0, &[(DATA, 4, false)]);
    rig.turn(Event::Doorbell(0));
    assert!(rig.guest.read(page * 4096, 4096).iter().all(|byte| *byte == 0), "a page is kept");
}

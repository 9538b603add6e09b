//! The console.

use std::os::fd::OwnedFd;

use coracle_virtio::console::Console;
use rustix::fs::{OFlags, fcntl_setfl};

use crate::guest::DATA;
use crate::input::Input;
use crate::rig::{Rig, Shape, Spec};

const SPEC: Spec = Spec {
    shape: |queue| if queue == 1 { Shape::Driver } else { Shape::Device },
    lengths: &[1, 80, 1024, 4096],
    header: |input| vec![input.byte(); 4],
    held_max: 256 << 10,
    moved_max: 5 * (64 << 10),
    operations_max: 128,
};

/// Runs one input.
pub fn one(data: &[u8]) {
    let (reader, writer) = std::io::pipe().unwrap();
    let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
    fcntl_setfl(&reader, OFlags::NONBLOCK).unwrap();
    let mut rig = Rig::new(Box::new(Console::new(writer).unwrap()), SPEC);
    let mut said = vec![0; 1 << 16];
    rig.run(&mut Input::new(data), &mut |input| {
        let count = usize::from(input.word()) + 1;
        let _ = rustix::io::read(&reader, &mut said[..count]);
    });
    while rustix::io::read(&reader, said.as_mut_slice()).is_ok() {}
    rig.recover();
    rig.guest.write(DATA, b"still here");
    rig.request(1, &[(DATA, 6, false), (DATA + 6, 4, false)]);
    let count = rustix::io::read(&reader, said.as_mut_slice()).unwrap();
    assert_eq!(&said[..count], b"still here");
}

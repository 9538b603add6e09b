//! The block device, over a disk in memory.

use std::os::fd::OwnedFd;

use coracle_virtio::block::{Block, BlockConfig};
use coracle_virtio::limit::{Limits, Rate};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};

use crate::guest::DATA;
use crate::input::Input;
use crate::rig::{Event, Rig, Shape, Spec};

const SECTORS: u64 = 128;
const DISK_BYTES: usize = SECTORS as usize * 512;

const SPEC: Spec = Spec {
    shape: |_| Shape::Both,
    lengths: &[512, 512, 1024, 4096, 20, 16],
    header,
    held_max: 1 << 20,
    // A turn's budget, and a request that is the last in it.
    moved_max: (16 << 20) + (254 * (256 << 10)),
    operations_max: 64,
};

fn header(input: &mut Input<'_>) -> Vec<u8> {
    let how = input.byte();
    let kind = match how & 15 {
        0..5 => 0,
        5..9 => 1,
        9 => 4,
        10 => 8,
        11 | 12 => 11,
        13 | 14 => 13,
        _ => u32::from(input.byte()),
    };
    let sector = |input: &mut Input<'_>| match input.byte() {
        255 => u64::MAX - u64::from(input.byte()),
        254 => u64::from(input.byte()) << 55 | u64::from(input.byte()),
        // Around the disk's end.
        byte @ 230..254 => SECTORS - 12 + u64::from(byte - 230),
        byte => u64::from(byte),
    };
    let mut bytes = Vec::from(kind.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(sector(input).to_le_bytes());
    if matches!(kind, 11 | 13) {
        for _ in 0..[1, 1, 1, 2, 16, 17, 3, 0][usize::from(how >> 4 & 7)] {
            bytes.extend(sector(input).to_le_bytes());
            let sectors = match input.byte() {
                255 => input.double(),
                byte => u32::from(byte),
            };
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(u32::from(input.byte() & 3).to_le_bytes());
        }
        // A partial range.
        bytes.truncate(bytes.len() - usize::from(how >> 7));
    }
    bytes
}

fn content() -> Vec<u8> {
    (0..DISK_BYTES).map(|at| (at / 512 * 7 + at % 512) as u8).collect()
}

thread_local! {
    static DISK: OwnedFd = {
        let file = memfd_create("disk", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, DISK_BYTES as u64).unwrap();
        file
    };
    static CONTENT: Vec<u8> = content();
}

/// Runs one input.
///
/// # Panics
/// Where the device does what it must not.
pub fn one(data: &[u8]) {
    DISK.with(|disk| CONTENT.with(|content| with(data, disk, content)));
}

fn with(data: &[u8], disk: &OwnedFd, content: &[u8]) {
    assert_eq!(pwrite(disk, content, 0), Ok(DISK_BYTES));
    let mut input = Input::new(data);
    let kind = input.byte();
    let (read_only, queues) = (kind & 1 != 0, u16::from(kind >> 1 & 1) * 2 + 1);
    let file = disk.try_clone().unwrap();
    let config = BlockConfig { file, read_only, direct: false, serial: "serial".to_owned(), queues };
    let mut rig = Rig::new(Box::new(Block::new(config).unwrap()), SPEC);
    // So little that nothing passes but what is begun first.
    let rate = Rate { bytes_per_second: u64::from(kind >> 4 & 1), operations_per_second: u64::from(kind >> 5 & 1) };
    rig.transport.device().limit(Limits { to_guest: rate, from_guest: Rate::default() }).unwrap();
    rig.run(&mut input, &mut |_| {});
    rig.transport.device().limit(Limits::default()).unwrap();
    rig.turn(Event::Source(0));
    assert_eq!(fstat(disk).unwrap().st_size, DISK_BYTES as i64, "the disk's size has changed");
    let mut now = vec![0; DISK_BYTES];
    assert_eq!(pread(disk, now.as_mut_slice(), 0), Ok(DISK_BYTES));
    assert!(!read_only || now == content, "a disk that may only be read has changed");

    rig.recover();
    let (header, buffer, status) = (DATA, DATA + 0x1000, DATA + 0x100);
    rig.guest.write(header, &[&[0; 8][..], &3_u64.to_le_bytes()].concat());
    rig.guest.write(status, &[0xaa]);
    let used = rig.request(0, &[(header, 16, false), (buffer, 512, true), (status, 1, true)]);
    assert_eq!((used, rig.guest.read(status, 1)), (513, &[0][..]));
    assert!(rig.guest.read(buffer, 512) == &now[3 * 512..4 * 512], "a read gives what is not on the disk");
}

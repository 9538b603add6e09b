//! The device over a block device of the host, where the host lets a test have one.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use super::virtio::{Block, BlockConfig};
use crate::device::{Device, Turn};
use crate::driver::{DATA, Driver, activation, memory, peek, poke};

const MIB: u64 = 1 << 20;

/// A loop device over a new file of four MiB, which goes with its last descriptor. `None` where there can be none.
fn device(block_bytes: u32, flags: i32) -> Option<File> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 * MIB).unwrap();
    let losetup =
        |arguments: &[&str]| Command::new("losetup").args(arguments).output().ok().filter(|out| out.status.success());
    let block = block_bytes.to_string();
    let made = losetup(&["--find", "--show", "--sector-size", &block, file.path().to_str().unwrap()]);
    let Some(made) = made else {
        eprintln!("skipped: no loop devices here");
        return None;
    };
    let name = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let opened = File::options().read(true).write(true).custom_flags(flags).open(&name);
    // It is let go of when it is closed.
    losetup(&["--detach", &name]).unwrap();
    Some(opened.unwrap())
}

fn exercise(block_bytes: u32, flags: i32) {
    let Some(file) = device(block_bytes, flags) else { return };
    let config = BlockConfig {
        file: file.into(),
        read_only: false,
        direct: flags & libc::O_DIRECT != 0,
        serial: String::new(),
        queues: 1,
    };
    let mut block = Block::new(config).unwrap();
    assert_eq!(block.config()[..8], (4 * MIB / 512).to_le_bytes());
    assert_eq!(block.config()[20..24], block_bytes.to_le_bytes());
    let memory = memory();
    let mut queue = Driver::new(&memory, 0, 64);
    block.activate(activation(&memory, u64::MAX, vec![Some(queue.ring(false))])).unwrap();
    let data = DATA + 0x1000;
    let mut request = |kind: u32, sector: u64, length: u32, writable: bool| {
        poke(&memory, DATA, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xaa]].concat());
        queue.chain(&[(DATA, 16, false), (data, length, writable), (DATA + 16, 1, true)]);
        while block.on_queue(0).unwrap() == Turn::More {}
        assert_eq!(queue.used().len(), 1);
        peek(&memory, DATA + 16, 1)[0]
    };
    let pattern = vec![0x5a; 0x1_0000];
    let at = MIB / 512;
    for (kind, flags) in [(13, 0_u32), (13, 1), (11, 0)] {
        poke(&memory, data, &pattern);
        assert_eq!(request(1, at, 0x1_0000, false), 0);
        assert_eq!(request(4, 0, 0, false), 0);
        poke(&memory, data, &[0; 0x1_0000]);
        assert_eq!(request(0, at, 0x1_0000, true), 0);
        assert_eq!(peek(&memory, data, 0x1_0000), pattern);
        poke(&memory, data, &[&(at + 8).to_le_bytes()[..], &16_u32.to_le_bytes(), &flags.to_le_bytes()].concat());
        assert_eq!(request(kind, 0, 16, false), 0, "{kind} {flags}");
        assert_eq!(request(0, at, 0x1_0000, true), 0);
        let mut expected = pattern.clone();
        expected[8 * 512..24 * 512].fill(0);
        assert!(peek(&memory, data, 0x1_0000) == expected, "{kind} {flags}");
    }
    // The end, and beyond it.
    assert_eq!(request(0, 4 * MIB / 512 - 8, 4096, true), 0);
    assert_eq!(request(0, 4 * MIB / 512 - 7, 4096, true), 1);
    // Less than a block, where a block is more than a sector, is for the page cache only.
    let expected = u8::from(flags & libc::O_DIRECT != 0 && block_bytes > 512);
    assert_eq!(request(0, 1, 512, true), expected);
}

#[test]
fn a_block_device_is_a_disk() {
    exercise(512, 0);
    exercise(4096, 0);
}

#[test]
fn a_block_device_is_a_disk_past_the_page_cache() {
    exercise(512, libc::O_DIRECT);
    exercise(4096, libc::O_DIRECT);
}

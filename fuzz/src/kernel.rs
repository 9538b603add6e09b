//! A kernel and a RAM disk that are truncated, or something else.

use std::io::Write;

use crate::input::Input;

/// Runs one input: which form the kernel has, how long the RAM disk is, and the kernel's bytes, or what an ELF file is made of.
///
/// # Panics
/// Never, where nothing is wrong.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    let (form, initrd) = (input.byte(), usize::from(input.byte()) * 1024);
    let bytes = if form % 3 == 2 { elf(&mut input) } else { input.rest().to_vec() };
    let file = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("a file");
        file
    };
    let _ = coracle_vmm::fuzzing::load_kernel(&file(&bytes), form % 3 == 1, &file(&vec![0; initrd]));
}

/// An ELF file (System V ABI, chapters 4 and 5) of a few segments, whose numbers mean something, and notes behind them.
fn elf(input: &mut Input<'_>) -> Vec<u8> {
    const HEADER: u64 = 64;
    let count = u64::from(input.byte() % 5);
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    bytes.extend(number(input).to_le_bytes());
    let table = if input.byte() > 250 { number(input) } else { HEADER };
    bytes.extend(table.to_le_bytes());
    bytes.extend([0; 14]);
    bytes.extend([56, 0, count as u8, 0, 0, 0, 0, 0, 0, 0]);
    for _ in 0..count {
        // Loaded, or a note, or something else.
        bytes.extend(([1_u32, 4, 1, 6][usize::from(input.byte() % 4)]).to_le_bytes());
        bytes.extend([0; 4]);
        for _ in 0..6 {
            bytes.extend(number(input).to_le_bytes());
        }
    }
    bytes.extend(input.rest());
    bytes
}

/// A number that is small, an address that a kernel may have, one beside that, or one at the end of all.
fn number(input: &mut Input<'_>) -> u64 {
    let byte = u64::from(input.byte());
    match input.byte() % 5 {
        0 => byte,
        1 => byte << 20,
        2 => (byte << 12) + u64::from(input.byte()),
        3 => u64::MAX - byte,
        _ => byte << (input.byte() % 64),
    }
}

//! A kernel and a RAM disk that are truncated, or something else.

use std::io::Write;

use crate::input::Input;

/// Runs one input: which form the kernel has, how long the RAM disk is, and the kernel's bytes.
///
/// # Panics
/// Never, where nothing is wrong.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    let (is_bzimage, initrd) = (input.byte() % 2 == 1, usize::from(input.byte()) * 1024);
    let file = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(bytes).expect("a file");
        file
    };
    let _ = coracle_vmm::fuzzing::load_kernel(&file(input.rest()), is_bzimage, &file(&vec![0; initrd]));
}

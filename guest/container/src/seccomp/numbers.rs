//! Numbers of system calls by name (Linux: arch/x86/entry/syscalls/syscall_64.tbl and syscall_32.tbl).

use std::collections::BTreeMap;

/// x86-64: a name and a number a line.
const X86_64: &str = include_str!("x86_64.txt");

/// The 32-bit calls of the same processors.
const X86: &str = include_str!("x86.txt");

/// Calls of an architecture by name.
pub(super) type Numbers = BTreeMap<&'static str, u32>;

/// See [`X86_64`].
pub(super) fn x86_64() -> Numbers {
    read(X86_64)
}

/// See [`X86`].
pub(super) fn x86() -> Numbers {
    read(X86)
}

fn read(text: &'static str) -> Numbers {
    text.lines().filter_map(|line| line.split_once(' ')).filter_map(|(name, n)| Some((name, n.parse().ok()?))).collect()
}

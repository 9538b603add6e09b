//! Drivers that mean harm, made of bytes.
//!
//! A target turns bytes into what a guest does to a device, and panics where the device does what it must not. The same
//! functions run under a fuzzer that is guided by coverage and under one that needs nothing special: docs/fuzzing.md.

pub mod block;
pub mod chain;
pub mod console;
pub mod guest;
pub mod held;
pub mod input;
pub mod net;
pub mod packet;
pub mod registers;
pub mod rig;
pub mod rng;
pub mod vsock;

/// What runs one input.
pub type Target = fn(&[u8]);

/// All targets by their names.
pub const TARGETS: [(&str, Target); 8] = [
    ("block", block::one),
    ("chain", chain::one),
    ("console", console::one),
    ("net", net::one),
    ("packet", packet::one),
    ("registers", registers::one),
    ("rng", rng::one),
    ("vsock", vsock::one),
];

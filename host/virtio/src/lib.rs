//! Virtio devices (virtio 1.3).
//!
//! Guest bytes are hostile here: every length is bounded before it is used, and nothing of the guest's makes this code
//! panic.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod drain;
pub mod fs;
pub mod limit;
pub mod mem;
pub mod net;
pub mod pmem;
mod reclaim;
pub mod ring;
pub mod rng;
pub mod transport;
pub mod vectored;
pub mod vhost_user;
pub mod vsock;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod hostile;

//! Virtio devices (virtio 1.3).
//!
//! Guest bytes are hostile here: every length is bounded before it is used, and nothing of the guest's makes this code
//! panic.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod vhost_user;
pub mod vsock;

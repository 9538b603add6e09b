//! The built-in machine monitor: one process, one machine, under KVM.
//!
//! ```text
//! driver ── control socket ──▶ main thread ── one epoll ──▶ vsock, net, rng, console     (coracle-virtio)
//!                              block threads ── one epoll each ──▶ a disk
//!                              vcpu threads ── KVM_RUN ──▶ guest ──▶ ECAM, BARs, ports
//! ```
//!
//! A processor's thread answers what the guest does to registers; doorbells and interrupts go between KVM and the loops
//! by eventfds. The guest is hostile: what it writes can break its devices, and end its machine.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod arch;
mod control;
mod devices;
mod error;
mod events;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod irq;
mod jail;
mod machine;
mod memory;
mod pci;
mod ports;
mod vcpu;

pub use control::run;
pub use error::Error;

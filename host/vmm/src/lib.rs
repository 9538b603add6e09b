//! The built-in machine monitor: one process, one machine, under KVM.
//!
//! ```text
//! driver ── control socket ──▶ main thread ── one epoll ──▶ vsock, net, rng, console     (coracle-virtio)
//!                              block threads ── one epoll each ──▶ a disk, or all that came later
//!                              vcpu threads ── KVM_RUN ──▶ guest ──▶ ECAM, BARs, ports
//!                              nursery ── makes the vcpu threads of processors that come later
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
mod files;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod irq;
mod jail;
mod machine;
mod memory;
mod nursery;
mod pci;
mod plug;
mod ports;
mod snapshot;
mod vcpu;
mod vfio;

pub use control::run;
pub use error::Error;

/// What other threads tell the main one.
enum News {
    /// The machine has ended.
    Ended(coracle_monitor_api::Ended),
    /// The guest has let go of the device of this number, which is gone.
    Ejected(u8),
    /// It has let go of a processor, and has so many left.
    Processors { gone: u8, left: u32 },
}

//! The socket device (virtio 1.3, section 5.10), in the "hybrid" form: guest ports are reached through Unix sockets of the
//! host.
//!
//! ```text
//! host program ── connect, "CONNECT 1024\n" ─▶ <path> ─┐            ┌─ rx queue ─▶ guest
//!                                                      ├─ Muxer ────┤
//! host program ◀──────────────── <path>_<port> ────────┘            └─ tx queue ◀─ guest
//! ```
//!
//! [`device`] moves packets between queues and muxer, walking descriptor chains of any layout; [`muxer`] owns the
//! connections; [`connection`] is one of them with its credit; [`packet`] is the header.

pub mod connection;
pub mod device;
pub mod muxer;
pub mod packet;
mod virtio;

pub use virtio::Vsock;

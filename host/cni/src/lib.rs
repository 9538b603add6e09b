//! Networks by CNI plugins (Container Network Interface, versions 0.4 and 1.0), without a daemon.
//!
//! ```text
//! --network NAME ──▶ Network ── plan ──▶ one Call a plugin ── call ──▶ plugin ──▶ links in the namespace
//! --publish ───────▶ Port                                         ◀── Outcome: addresses
//! ```
//!
//! A [`Network`] is a list of plugins. Making a container part of it calls each with ADD in their order; the end calls each with DEL
//! in the opposite one. What is planned ([`plan`]) has no effect of its own.

mod call;
pub mod namespace;
mod network;
pub mod plan;
mod port;

pub use call::{Error, add, check, del, programs};
pub use network::{BRIDGE, Invalid, Network};
pub use plan::{Attachment, Outcome, hosts, outcome, resolv_conf};
pub use port::{Port, Protocol};

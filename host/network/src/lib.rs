//! A pod's network: the links of a network namespace that somebody else has set up (CNI), as they become devices of the
//! machine and interfaces, routes and neighbours of the guest.
//!
//! ```text
//!            pod's network namespace                    │ guest
//! bridge ──▶ eth0 (veth) ──ingress, redirect──▶ tap ──▶ │ virtio-net, with eth0's hardware address,
//!                 ◀──────────redirect, ingress── tap ◀── │ addresses, routes, neighbours and MTU
//! ```
//!
//! [`Namespace`] reads and changes the namespace; what it reads ([`Link`]) is turned into the guest's messages by [`plan`],
//! which has no effect. Machine and agent are the sandbox's.

mod filter;
mod function;
mod limit;
mod link;
mod macvtap;
mod model;
mod namespace;
pub mod plan;
mod read;
mod routed;
mod steer;
mod switches;
mod tap;
pub mod user;

use coracle_machine::NETS_MAX;
pub use link::{Address, Contents, Link, Neighbour, Route, RouteKind};
pub use model::{Function, Hold, Model, Options, Switches};
pub use namespace::{Namespace, Taken, give_back, give_devices_back};
pub use steer::Steered;

/// What this crate gives back.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a network can't be taken over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The namespace is not there, or may not be entered.
    #[error("the network namespace {path}: {source}")]
    Namespace {
        /// Its path.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The namespace is the host's own.
    #[error(
        "the network namespace {path} is the host's own, which a machine can't take over: give the pod one of its own"
    )]
    Host {
        /// Its path.
        path: String,
    },
    /// Somebody lives in the namespace.
    #[error(
        "the network namespace {path} is in use by the process {pid} ({name}), which would lose links and ports to the machine: give the pod one of its own"
    )]
    Inhabited {
        /// Its path.
        path: String,
        /// Who.
        pid: u32,
        /// What that process is called.
        name: String,
    },
    /// A route that a guest can't be given.
    #[error("a route of the pod's network {0}, which is not supported: take it out of what the network's plugins set")]
    Route(&'static str),
    /// Two links that are not taken over together.
    #[error(
        "the network link {name} {why} {other}, which is not supported in one namespace: give the pod one of the two"
    )]
    Clash {
        /// The link.
        name: String,
        /// The other one.
        other: String,
        /// What it has to do with the other one.
        why: &'static str,
    },
    /// A link of a kind that is not taken over.
    #[error(
        "the network link {name} is of the kind {kind}, which is not supported: veth, macvlan, vlan and ipvlan in mode l2 are, and with `network.model = \"routed\"` all that carry IP"
    )]
    Unsupported {
        /// The link.
        name: String,
        /// Its kind.
        kind: String,
    },
    /// A link that can't be taken over in the way that was asked for.
    #[error(
        "the network link {name} is of the kind {kind}, which `network.model = \"{model}\"` does not take: tcfilter, the default, may, and routed does"
    )]
    Model {
        /// The link.
        name: String,
        /// Its kind.
        kind: String,
        /// The way.
        model: &'static str,
    },
    /// Limits where there can be none.
    #[error(
        "the network link {name} can't be limited with `network.model = \"macvtap\"`: with tcfilter, or routed, it can"
    )]
    Limits {
        /// The link.
        name: String,
    },
    /// A link that is a device which can't be handed to a machine.
    #[error("the network link {name} is a device of the host's, which goes to the machine as such: {why}")]
    Function {
        /// The link.
        name: String,
        /// Why it can't.
        why: String,
    },
    /// More links than a machine takes.
    #[error("the pod's network has {count} links with addresses, and a machine takes {NETS_MAX}: give the pod fewer")]
    TooMany {
        /// How many there are.
        count: usize,
    },
    /// The kernel refuses.
    #[error("{step}: {source}")]
    Kernel {
        /// What was being done.
        step: String,
        /// Its answer.
        source: rtnetlink::Error,
    },
    /// A device call fails.
    #[error("{step}: {source}")]
    System {
        /// What was being done.
        step: String,
        /// Why.
        source: std::io::Error,
    },
}

//! What crosses the trust boundary between host and guest.
//!
//! The agent interface is Kata's (packages `grpc` and `types`, the same field numbers), so each half can be tested
//! against Kata's own. The messages are generated from `proto/`; everything else here is a constant or a conversion
//! that both sides must agree on.

/// Generated messages and services, one module for each file in `proto/`.
mod rpc {
    #![expect(warnings, reason = "generated code")]
    include!(concat!(env!("OUT_DIR"), "/rpc_modules.rs"));
}

pub mod forward;
pub mod hello;
mod json;
pub mod management;
pub mod metrics;
pub mod names;
pub mod paths;
mod policy;
pub mod ports;
pub mod spans;

pub use json::{JsonError, from_json, to_json};
pub use policy::policy_json;
pub use protobuf;
pub use rpc::{agent, agent_ttrpc, csi, health, health_ttrpc, oci, types};
pub use ttrpc;

/// The version that shim, agent and guest image must share, in Cargo's form.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The most bytes of a process's stream that one request or reply carries. ttrpc refuses messages of over 4 MiB.
pub const STREAM_CHUNK_BYTES: u32 = 256 * 1024;

/// The largest request in bytes: what ttrpc's 4 MiB leaves when it has added the method's name and deadline.
pub const REQUEST_BYTES_MAX: u64 = (4 << 20) - 1024;

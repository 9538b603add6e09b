//! The agent.
//!
//! Every request takes one way: decoded by ttrpc, admitted by the [`gate`], handled by the file that bears its verb. What
//! leaves the guest leaves through the reply. The state is in [`state`]; the engine below is `coracle_container`.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod connections;
mod copy_file;
mod create;
mod debug_console;
mod details;
mod devices;
mod diagnostics;
mod error;
mod exec;
mod forward;
mod from_host;
mod gate;
pub mod guest;
mod hooks;
mod hotplug;
mod iptables;
mod kernel_events;
mod metrics;
mod mounts;
mod netlink;
mod network;
mod oom;
mod pause;
mod pci;
mod process;
mod program;
mod remove;
mod renewal;
mod sandbox;
mod service;
mod signal;
mod spans;
mod start;
mod state;
mod stats;
mod storage;
mod stream;
mod thread;
mod update;
mod volume;
mod wait;

use std::path::PathBuf;

pub use connections::{Connection, Incoming, Io};
pub use error::Error;
pub use gate::admit;
pub use service::{METHODS, Serving, serve};

/// What a handler gives back.
pub type Result<T> = std::result::Result<T, Error>;

/// Where the agent works. In a guest it is [`Config::guest`]; the flow tests give it folders of their own.
#[derive(Debug, Clone)]
pub struct Config {
    /// This program's file, which is started again for every container process.
    pub program: PathBuf,
    /// The folder for containers' cgroups, in a cgroup2 mount.
    pub cgroups: PathBuf,
    /// The guest's own name servers (resolv.conf(5)).
    pub resolv_conf: PathBuf,
    /// Where a shared file system comes from.
    pub shared: SharedSource,
}

/// Where the file system that the host shares comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SharedSource {
    /// A virtio-fs device; the storage names its tag.
    VirtioFs,
    /// A folder that is there already and is used in place: host and agent see the same files.
    InPlace,
}

impl Config {
    /// The configuration inside a guest.
    #[must_use]
    pub fn guest() -> Self {
        Self {
            program: "/proc/self/exe".into(),
            cgroups: "/sys/fs/cgroup/coracle".into(),
            resolv_conf: "/etc/resolv.conf".into(),
            shared: SharedSource::VirtioFs,
        }
    }
}

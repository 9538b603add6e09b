//! The guest's container engine.
//!
//! One container is a cgroup (version 2), a set of namespaces and the processes in them. A process is never forked from
//! the threaded agent: [`create`] and [`exec`] start this same program again as `agent init`, which is single-threaded,
//! reads its [`plan::Plan`] from a sealed memory file and does all the work ([`init`]). What it has to say (its pid, the
//! terminal, "ready", an error) it says over a [`channel`].
//!
//! The engine is synchronous: who calls it from an event loop gives it a thread.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

pub mod cgroup;
mod channel;
mod command;
mod create;
mod device;
mod device_cgroup;
mod error;
mod init;
mod label;
mod mount;
pub mod pause;
pub mod plan;
mod privilege;
mod rootfs;
mod seccomp;
mod terminal;
mod user;

pub use create::{Beside, New, Prepared, Stdio, create, exec};
pub use error::{CommandProblem, Error};
pub use init::run as run_init;

/// What the engine gives back.
pub type Result<T> = std::result::Result<T, Error>;

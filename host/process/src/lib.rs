//! Child processes of the host: monitors and the servers that their devices need.
//!
//! A [`Spawn`] describes one; [`Child`] is one that runs. Its end is an event on a pidfd: there is no SIGCHLD handler and
//! nobody reaps what is not theirs. A child dies with its parent (`PR_SET_PDEATHSIG`), so a shim that is killed leaves none.

mod affinity;
mod cgroup;
mod child;
mod children;
mod clock;
mod confine;
pub mod mountinfo;
mod privileges;
mod ring;
mod roles;
mod spawn;
mod syscalls;

pub use affinity::{run_on, run_thread_on};
pub use cgroup::Cgroup;
pub use child::{Child, ExitStatus, watched};
pub use children::{Running, children};
pub use clock::ClockWatch;
pub use confine::{Confinement, for_everybody, lock_memory, monitor_user, set_mount_attributes, threads_of};
pub use privileges::{keep_only, leave_no_core};
pub use ring::Ring;
pub use roles::{Bounds, Role};
/// Capabilities, as Linux has them (capabilities(7)).
pub use rustix::thread::CapabilitySet;
pub use spawn::{Output, Spawn};
pub use syscalls::{leave_vsock_calls, refuse_dangerous_calls};

/// Why a child could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The program's file is not there.
    #[error("{program} is missing")]
    Missing {
        /// The program.
        program: String,
    },
    /// The start failed.
    #[error("can't start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
}

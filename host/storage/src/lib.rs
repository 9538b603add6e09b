//! Storage, planned.
//!
//! Nothing here has an effect. A pod's shared file system becomes a server to start, a device for the machine and a storage
//! for the guest ([`shared_fs`]); a container's root and bind mounts become mounts on the host below the shared folder and
//! paths in the guest ([`container`]). The sandbox carries the plans out.

mod container;
mod shared_fs;
mod shm;

use std::path::PathBuf;

pub use container::{ContainerPlan, HostMount, IdMap, Owners, container};
pub use shared_fs::{SOCKET_FD, SharedFsPlan, Virtiofsd, find_virtiofsd, shared_fs};
pub use shm::shm;

/// Why something can't be planned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program or file is missing. The text names it and the mend.
    #[error("{0}")]
    Missing(String),
    /// The specification is malformed.
    #[error("{0}")]
    Invalid(String),
    /// A mount of a kind that this runtime does not do.
    #[error("the mount {destination} of type {kind} is not supported")]
    Unsupported {
        /// Where it should be.
        destination: PathBuf,
        /// Its type.
        kind: String,
    },
}

//! Storage, planned.
//!
//! Nothing here has an effect. A pod's shared file system becomes a server to start, a device for the machine and a storage
//! for the guest ([`shared_fs`]); a container's root and bind mounts become mounts on the host below the shared folder and
//! paths in the guest ([`container`]), or disks of the machine and files to copy ([`root_disks`]). The sandbox carries the plans
//! out.

mod container;
mod disks;
mod shared_fs;
mod shm;
mod volumes;

use std::path::PathBuf;

pub use container::{ContainerPlan, Copy, HostMount, IdMap, Mirror, Needs, Owners, Wanted, container};
pub use disks::{RootDisks, guest_name, read_as_memory, root_disks, serial};
pub use shared_fs::{SOCKET_FD, SharedFsPlan, Virtiofsd, find_virtiofsd, shared_fs};
pub use shm::shm;
pub use volumes::{EmptyDisk, volume_place};

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
    /// A container needs disks that the pod's machine has not.
    #[error(
        "the container needs disks such as {0}, which another container of the pod uses, or for which its machine, which runs already, has no place: QEMU's PC and the built-in monitor take disks while they run (`machine.monitor`, `machine.type`, not `machine.sealed`), and an emptyDir is one only where `storage.empty_dir` says so"
    )]
    OnlyDisks(PathBuf),
    /// A mount needs the host's files, and the pod's machine shares none.
    #[error(
        "the mount {0} needs files of the host, and the pod's machine shares none: its first container needed none, or `storage.shared_fs` or `machine.sealed` says so"
    )]
    NotShared(PathBuf),
}

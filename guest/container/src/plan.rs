//! What `agent init` is told: everything, before it starts.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use oci_spec::runtime::{LinuxPersonality, LinuxSeccomp, Process, Spec};
use serde::{Deserialize, Serialize};

use crate::error::Step;
use crate::{Error, Result};

/// The largest plan that is read back, in bytes: config.json may be 5 MB and more.
const PLAN_BYTES_MAX: u64 = 64 << 20;

/// A process to start, and where.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The cgroup to join: a folder below the cgroup file system's mount.
    pub cgroup: PathBuf,
    /// The process.
    pub process: Process,
    /// Its place.
    pub place: Place,
    /// What it may ask of the kernel.
    pub seccomp: Option<LinuxSeccomp>,
    /// The kernel that it takes this one for.
    pub personality: Option<LinuxPersonality>,
}

/// Where a process runs.
#[derive(Debug, Serialize, Deserialize)]
pub enum Place {
    /// In new namespaces, as the first process of a container.
    New {
        /// The container's specification.
        spec: Box<Spec>,
        /// The root file system: a folder in the guest.
        rootfs: PathBuf,
        /// The process whose pid namespace it joins, in the agent's; it gets one of its own where there is none.
        pids_of: Option<i32>,
    },
    /// In those of a container that runs.
    Join {
        /// The container's first process, in the agent's pid namespace.
        pid: i32,
    },
}

impl Plan {
    /// Writes the plan to a sealed memory file that a child can inherit, read from its start.
    ///
    /// # Errors
    /// [`Error::System`] where the kernel has no memory for it.
    pub(crate) fn seal(&self) -> Result<OwnedFd> {
        let bytes = serde_json::to_vec(self).map_err(|error| Error::Invalid(format!("plan: {error}")))?;
        let fd =
            rustix::fs::memfd_create("plan", rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING)
                .step(|| "create the plan's memory file".into())?;
        let mut file = std::fs::File::from(fd);
        file.write_all(&bytes).and_then(|()| file.seek(SeekFrom::Start(0))).step(|| "write the plan".into())?;
        let seals = SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals)).step(|| "seal the plan".into())?;
        Ok(file.into())
    }

    /// Reads a plan back.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is no plan.
    pub(crate) fn read(fd: OwnedFd) -> Result<Self> {
        let mut bytes = Vec::new();
        std::fs::File::from(fd).take(PLAN_BYTES_MAX).read_to_end(&mut bytes).step(|| "read the plan".into())?;
        serde_json::from_slice(&bytes).map_err(|error| Error::Invalid(format!("plan: {error}")))
    }
}

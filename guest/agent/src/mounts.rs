//! A container's mount namespace, held beyond the container's end.
//!
//! Each root and volume that the host's file server announces as a mount of its own is a superblock of its own in the guest, and
//! goes with the last process of its namespace. Linux 6.1 and 6.12 then look for files in use (`generic_shutdown_super`), but a
//! process that is killed while a page of its program is being read leaves that read, and the file's release after it, under
//! way. The kernel takes this for a fault of its own, and the process is stuck in its exit for ever. So the namespace is held
//! until the server has answered whatever came before.

use std::fs::File;

use coracle_protocol::paths;

use crate::{Error, Result};

/// More requests than can be under way in the background and in the queue behind them: the server answers in order, the
/// kernel sends so many beside each other (fuse's `max_background` is 12).
const ROUND_TRIPS: usize = 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct Mounts(File);

impl Mounts {
    /// The namespace of a process that has not ended.
    pub(crate) fn of(pid: i32) -> Result<Self> {
        File::open(format!("/proc/{pid}/ns/mnt")).map(Self).map_err(Error::system("open a container's mount namespace"))
    }

    /// Lets go of it, when nothing is under way any more. It blocks for as long as the server does.
    pub(crate) fn let_go(self) {
        for _ in 0..ROUND_TRIPS {
            // Only that there is an answer counts, and where nothing is shared there is nothing to wait for.
            let _ = rustix::fs::statfs(paths::SHARED);
        }
        drop(self.0);
    }
}

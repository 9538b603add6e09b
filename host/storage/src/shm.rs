//! A pod's shared memory file system, which all its containers see at `/dev/shm`.

use coracle_protocol::agent::Storage;
use coracle_protocol::paths;

/// Its size in bytes: what container runtimes give where nobody asks for more.
const SIZE_BYTES: u64 = 64 << 20;

/// Plans it: memory of the guest, and nothing of the host's.
#[must_use]
pub fn shm() -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: vec![
            "noexec".into(),
            "nosuid".into(),
            "nodev".into(),
            "mode=1777".into(),
            format!("size={SIZE_BYTES}"),
        ],
        mount_point: paths::SHM.into(),
        ..Default::default()
    }
}

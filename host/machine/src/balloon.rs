//! The memory that a guest leaves to its host.

use crate::{Device, Error, MachineSpec, Result};

/// The balloon of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Balloon {
    /// What the machine has from its start, in bytes.
    all_bytes: u64,
}

impl Balloon {
    /// That of a machine of this specification; none where it has no such device.
    #[must_use]
    pub fn of(spec: &MachineSpec) -> Option<Self> {
        spec.devices.contains(&Device::Balloon).then_some(Self { all_bytes: spec.memory.size_mib << 20 })
    }

    /// What is said where there is none.
    #[must_use]
    pub fn missing() -> Error {
        Error::Unsupported("a balloon, of which it has no device,".into())
    }

    /// What the guest would have left of its memory from the start, were it to leave so many bytes to the host.
    ///
    /// # Errors
    /// [`Error::Invalid`] where that is nothing.
    pub fn left(self, bytes: u64) -> Result<u64> {
        let left = self.all_bytes.checked_sub(bytes).filter(|left| *left > 0);
        let all = self.all_bytes;
        left.ok_or_else(|| Error::Invalid(format!("a balloon of {bytes} bytes: the machine has {all} from its start")))
    }

    /// What it has left to the host, of whose memory so much is left.
    #[must_use]
    pub fn given(self, left: u64) -> u64 {
        self.all_bytes.saturating_sub(left)
    }
}

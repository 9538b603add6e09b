//! Between which sizes a machine can be, and how long its guest may take.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::{Error, MachineSpec, Result};

/// The unit in which a guest of Linux plugs memory, in MiB: two of the pages in which its kernel keeps free memory.
const UNIT_MIB: u64 = 4;

/// The sizes that a specification allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    cpus: RangeInclusive<u32>,
    memory_mib: RangeInclusive<u64>,
}

impl Sizes {
    /// How long the guest may take to take memory without the size having changed.
    pub const PATIENCE: Duration = Duration::from_secs(10);
    /// How long it may take over all of it.
    pub const PATIENCE_OVER_ALL: Duration = Duration::from_secs(60);
    /// How long it may take to let go of a processor.
    pub const EJECT_PATIENCE: Duration = Duration::from_secs(5);

    /// Those of a specification; none where it has one size only.
    #[must_use]
    pub fn of(spec: &MachineSpec) -> Option<Self> {
        let cpus = spec.cpus.boot..=spec.cpus.max.max(spec.cpus.boot);
        let memory_mib = spec.memory.size_mib..=spec.memory.max_mib.max(spec.memory.size_mib);
        let changes = cpus.start() < cpus.end() || memory_mib.start() < memory_mib.end();
        changes.then_some(Self { cpus, memory_mib })
    }

    /// Processors from the start.
    #[must_use]
    pub fn least_cpus(&self) -> u32 {
        *self.cpus.start()
    }

    /// Memory from the start, in bytes.
    #[must_use]
    pub fn least_bytes(&self) -> u64 {
        self.memory_mib.start() << 20
    }

    /// What a guest of this size has above what it has from its start, in bytes: whole units, and no more than there is room for.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a size that the machine can't have.
    pub fn gained_bytes(&self, cpus: u32, memory_mib: u64) -> Result<u64> {
        if !self.cpus.contains(&cpus) {
            let (least, most) = (self.cpus.start(), self.cpus.end());
            return Err(Error::Invalid(format!("{cpus} processors: it has {least} at least and {most} at most")));
        }
        if !self.memory_mib.contains(&memory_mib) {
            let (least, most) = (self.memory_mib.start(), self.memory_mib.end());
            return Err(Error::Invalid(format!("{memory_mib} MiB: it has {least} at least and {most} at most")));
        }
        let room = (self.memory_mib.end() - self.memory_mib.start()) / UNIT_MIB * UNIT_MIB;
        Ok((memory_mib - self.memory_mib.start()).next_multiple_of(UNIT_MIB).min(room) << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_units_between_two_ends() {
        let sizes = Sizes { cpus: 1..=3, memory_mib: 255..=310 };
        let gained = |cpus, memory_mib| sizes.gained_bytes(cpus, memory_mib).map(|bytes| bytes >> 20);
        assert_eq!([255, 256, 259, 260, 300, 307, 310].map(|mib| gained(1, mib).unwrap()), [0, 4, 4, 8, 48, 52, 52]);
        for (cpus, memory_mib) in [(0, 255), (4, 255), (1, 254), (3, 311)] {
            assert!(matches!(gained(cpus, memory_mib), Err(Error::Invalid(_))), "{cpus} {memory_mib}");
        }
    }
}

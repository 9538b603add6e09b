//! Settings that can't go together.

use crate::error::Error;
use crate::{Accelerator, Monitor, Rootfs, Settings, reference};

/// What virtiofsd has open before a guest asks for anything, and some more.
const OPEN_FILES_MIN: u64 = 64;

/// Refuses what would have a pod start with something else than was asked for.
///
/// # Errors
/// [`Error::Contradiction`].
pub(crate) fn check(settings: &Settings) -> Result<(), Error> {
    let found = [
        (
            settings.machine_memory_mib > settings.machine_max_memory_mib,
            "machine.memory_mib is more than machine.max_memory_mib",
        ),
        (settings.machine_vcpus > settings.machine_max_vcpus, "machine.vcpus is more than machine.max_vcpus"),
        (
            settings.monitor == Monitor::Builtin && settings.accelerator == Accelerator::Emulation,
            "machine.monitor = \"builtin\" needs KVM, and machine.accelerator = \"emulation\" uses none",
        ),
        (
            settings.run_verity && settings.run_rootfs != Rootfs::Erofs,
            "run.verity verifies disks, and run.rootfs makes none",
        ),
        (
            settings.virtiofsd_open_files < OPEN_FILES_MIN,
            "virtiofsd.open_files is less than 64, which virtiofsd needs for itself",
        ),
    ];
    if let Some((_, text)) = found.into_iter().find(|(is_so, _)| *is_so) {
        return Err(Error::Contradiction(text.into()));
    }
    if settings.annotations_allow.is_empty() {
        return Ok(());
    }
    let allowed: Vec<_> = reference().into_iter().filter(|entry| entry.by_annotation).map(|entry| entry.key).collect();
    match settings.annotations_allow.iter().find(|key| !allowed.contains(&key.as_str())) {
        Some(key) => Err(Error::Contradiction(format!(
            "annotations.allow names {key}, which no annotation can set: {} can",
            allowed.join(", ")
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_contradicts_itself_is_refused() {
        assert!(check(&Settings::default()).is_ok());
        let refused = |change: fn(&mut Settings)| {
            let mut settings = Settings::default();
            change(&mut settings);
            check(&settings).unwrap_err().to_string()
        };
        assert!(refused(|settings| settings.machine_memory_mib = 1 << 20).contains("machine.max_memory_mib"));
        assert!(refused(|settings| settings.machine_vcpus = 9).contains("machine.max_vcpus"));
        let emulated = refused(|settings| {
            (settings.monitor, settings.accelerator) = (Monitor::Builtin, Accelerator::Emulation);
        });
        assert!(emulated.contains("KVM"));
        let verified = refused(|settings| (settings.run_verity, settings.run_rootfs) = (true, Rootfs::Virtiofs));
        assert!(verified.contains("run.verity"));
        assert!(refused(|settings| settings.virtiofsd_open_files = 63).contains("virtiofsd.open_files"));
        let named = refused(|settings| settings.annotations_allow = vec!["qemu.path".into()]);
        assert!(named.contains("qemu.path") && named.contains("machine.memory_mib"));
    }
}

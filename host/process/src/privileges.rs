//! What a process may, given up for good: by it and by all that it starts.

use rustix::process::{Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// The numbers that capabilities may have (capabilities(7)): a kernel knows those up to one of its own.
const NUMBERS: u32 = 64;

/// Gives up all capabilities but these, and what programs could give back: for this thread, and all that it starts from now on. Who has none
/// has none to give up.
///
/// It makes system calls only, and can be called between fork and exec.
///
/// # Errors
/// The kernel's.
pub fn keep_only(kept: CapabilitySet) -> std::io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    // First the set that bounds what a program of root's gains: this takes a capability itself.
    bound(kept)?;
    limit(kept)
}

/// Bounds what programs that are started can gain, as [`keep_only`] does.
pub(crate) fn bound(kept: CapabilitySet) -> std::io::Result<()> {
    if !rustix::thread::capabilities(None)?.effective.contains(CapabilitySet::SETPCAP) {
        return Ok(());
    }
    for number in 0..NUMBERS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(one) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // Those that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Gives up all capabilities but these, as [`keep_only`] does.
pub(crate) fn limit(kept: CapabilitySet) -> std::io::Result<()> {
    let own = rustix::thread::capabilities(None)?;
    let sets = CapabilitySets {
        effective: own.effective & kept,
        permitted: own.permitted & kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Keeps this process and all that it starts from leaving their memory in core files: neither a file, nor anything of their memory to a program
/// that takes cores (core(5): the limit does not hold for those, the filter does).
///
/// # Errors
/// The kernel's.
pub fn leave_no_core() -> std::io::Result<()> {
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    match std::fs::write("/proc/self/coredump_filter", "0") {
        // A kernel that writes no cores of ours (`CONFIG_ELF_CORE`).
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    use crate::Spawn;

    /// What a child says of itself.
    async fn status(kept: Option<CapabilitySet>) -> String {
        let mut file = std::fs::File::from(rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let mut spawn = Spawn::new("sh").arguments(["-c", "cat /proc/self/status >&5"]);
        spawn.capabilities = kept;
        spawn.descriptor(5, file.try_clone().unwrap().into()).start().unwrap().wait().await;
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn a_child_has_what_it_is_left_and_can_gain_no_more() {
        let is_root = rustix::process::geteuid().is_root();
        for (kept, bits) in [(CapabilitySet::empty(), 0_u64), (CapabilitySet::IPC_LOCK, 1 << 14)] {
            let text = status(Some(kept)).await;
            let bits = if is_root { bits } else { 0 };
            for set in ["CapEff", "CapPrm"].into_iter().chain(is_root.then_some("CapBnd")) {
                assert!(text.contains(&format!("{set}:\t{bits:016x}")), "{set} {text}");
            }
            assert!(text.contains("NoNewPrivs:\t1"), "{text}");
        }
        let text = status(None).await;
        assert!(!is_root || !text.contains("CapEff:\t0000000000000000"), "{text}");
    }
}

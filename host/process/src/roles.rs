//! What each process of a pod is for, and what it may have at most. The shim limits itself and what it starts to that, but for those that give
//! their own up (the built-in monitor in its jail, passt); `coracle check --jail` looks whether it is so.

use rustix::thread::CapabilitySet;

/// A process of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The pod's daemon.
    Shim,
    /// The built-in monitor.
    Monitor,
    /// QEMU.
    Qemu,
    /// The server of shared files.
    Virtiofsd,
    /// An ordinary user's network.
    Passt,
    /// Our server of the guest's sockets, beside QEMU.
    Vsock,
}

/// What a process is held to, but for what an administrator has taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// The capabilities that it has at most.
    pub capabilities: CapabilitySet,
    /// Whether it has a list of system calls.
    pub has_syscall_filter: bool,
    /// Whether it runs as another user where the shim is root.
    pub is_other_user: bool,
    /// The namespaces that are not the host's, by their names in `/proc/PID/ns`, where the shim is root.
    pub namespaces: &'static [&'static str],
}

impl Role {
    /// That of a process with this command line; none of one that is none of these.
    #[must_use]
    pub fn of(words: &[String]) -> Option<Self> {
        let mut words = words.iter().map(String::as_str);
        let program = words.next().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        match (program, words.next()) {
            (_, Some("vmm")) => Some(Self::Monitor),
            (program, _) if program.starts_with("qemu") => Some(Self::Qemu),
            (program, _) if program.starts_with("virtiofsd") => Some(Self::Virtiofsd),
            (program, _) if program.starts_with("passt") => Some(Self::Passt),
            (_, Some("vsock")) => Some(Self::Vsock),
            (program, _) if program.starts_with("containerd-shim") => Some(Self::Shim),
            _ => None,
        }
    }

    /// Its name, for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Shim => "the shim",
            Self::Monitor | Self::Qemu => "the monitor",
            Self::Virtiofsd => "virtiofsd",
            Self::Passt => "passt",
            Self::Vsock => "the vsock server",
        }
    }

    /// What it starts with, of which it keeps what [`Role::bounds`] says: the vsock server finds its program, which may be in another user's
    /// folder, and makes the pod's folder its root.
    #[must_use]
    pub fn capabilities_at_start(self) -> CapabilitySet {
        match self {
            Self::Vsock => CapabilitySet::DAC_READ_SEARCH | CapabilitySet::SYS_CHROOT,
            other => other.bounds().capabilities,
        }
    }

    /// What it is held to.
    #[must_use]
    pub fn bounds(self) -> Bounds {
        let none = CapabilitySet::empty();
        let (capabilities, has_syscall_filter, is_other_user, namespaces): (_, _, _, &[_]) = match self {
            Self::Shim => (shim(), true, false, &["mnt"]),
            Self::Monitor | Self::Qemu => (none, true, true, &["mnt", "pid", "net", "ipc", "uts", "cgroup"]),
            Self::Virtiofsd => (virtiofsd(), true, false, &["mnt", "pid", "net"]),
            Self::Passt => (none, true, false, &[]),
            Self::Vsock => (none, true, false, &["mnt", "pid", "net", "ipc", "uts", "cgroup"]),
        };
        Bounds { capabilities, has_syscall_filter, is_other_user, namespaces }
    }
}

/// Mounts, namespaces and links of pods; the jail of a monitor that runs as another user, is placed on processors, looked at and ended; memory
/// that is locked, low ports; and what virtiofsd has, which is enough to give a monitor away to a user of its own.
fn shim() -> CapabilitySet {
    CapabilitySet::NET_ADMIN
        | CapabilitySet::NET_RAW
        | CapabilitySet::SYS_NICE
        | CapabilitySet::SYS_PTRACE
        | CapabilitySet::IPC_LOCK
        | CapabilitySet::NET_BIND_SERVICE
        | virtiofsd()
}

/// It makes its own sandbox, in which it does to files what root of the guest does; it gives up most of it by itself then.
fn virtiofsd() -> CapabilitySet {
    CapabilitySet::SYS_ADMIN
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::SYS_RESOURCE
        | CapabilitySet::SETPCAP
        | CapabilitySet::KILL
        | CapabilitySet::CHOWN
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH
        | CapabilitySet::FOWNER
        | CapabilitySet::FSETID
        | CapabilitySet::SETUID
        | CapabilitySet::SETGID
        | CapabilitySet::SETFCAP
        | CapabilitySet::MKNOD
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_known_by_their_words() {
        let of = |words: &[&str]| Role::of(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        assert_eq!(of(&["/usr/bin/qemu-system-x86_64", "-name"]), Some(Role::Qemu));
        assert_eq!(of(&["/proc/self/exe", "vmm", "/run/x"]), Some(Role::Monitor));
        assert_eq!(of(&["/usr/libexec/virtiofsd", "--fd=3"]), Some(Role::Virtiofsd));
        assert_eq!(of(&["/usr/bin/containerd-shim-coracle-v2", "vsock", "3"]), Some(Role::Vsock));
        assert_eq!(of(&["/usr/bin/containerd-shim-coracle-v2", "-namespace", "x", "serve"]), Some(Role::Shim));
        assert_eq!(of(&["sh"]), None);
    }

    #[test]
    fn nothing_has_what_its_shim_has_not() {
        for role in [Role::Monitor, Role::Qemu, Role::Virtiofsd, Role::Passt, Role::Vsock] {
            assert!(Role::Shim.bounds().capabilities.contains(role.bounds().capabilities), "{role:?}");
        }
        let all = CapabilitySet::from_bits_retain(u64::MAX);
        assert!(
            !Role::Shim.bounds().capabilities.contains(CapabilitySet::SYS_MODULE)
                && all != Role::Shim.bounds().capabilities
        );
    }
}

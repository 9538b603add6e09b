//! Limits, identity and capabilities, in the order that the kernel wants them.

use std::collections::HashSet;
use std::str::FromStr;

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::Gid;
use oci_spec::runtime::{Capabilities, PosixRlimitType, Process};

use crate::error::Step;
use crate::user::Identity;
use crate::{Error, Result};

/// How many descriptors a process may have where its specification says nothing, and up to how many it may have more.
const DESCRIPTORS: (u64, u64) = (1024, 524_288);

/// Sets the process's resource limits.
pub(crate) fn set_rlimits(process: &Process) -> Result<()> {
    // The agent's own is higher. This is what a process has on a host that says nothing of it.
    let (soft, hard) = DESCRIPTORS;
    // A container's first process may be started by somebody with less, who can't give more.
    let _ = setrlimit(Resource::RLIMIT_NOFILE, soft, hard);
    for limit in process.rlimits().iter().flatten() {
        let resource = resource(limit.typ());
        setrlimit(resource, limit.soft(), limit.hard()).step(|| format!("set {}", limit.typ()))?;
    }
    Ok(())
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
    }
}

/// Becomes `identity` with the capabilities of `process`; `enter_directory` runs with the new identity.
pub(crate) fn drop_to(
    process: &Process,
    identity: &Identity,
    enter_directory: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let empty = Capabilities::new();
    let listed = process.capabilities().as_ref();
    let set = |chosen: Option<&Capabilities>| convert(chosen.unwrap_or(&empty));
    let bounding = set(listed.and_then(|caps| caps.bounding().as_ref()));
    for capability in caps::all() {
        // A capability that the kernel does not know is not in the set either: the answer is an error, so no.
        let present = caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false);
        if present && !bounding.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).map_err(|error| capability_error(&error))?;
        }
    }
    rustix::thread::set_keep_capabilities(true).step(|| "keep capabilities".into())?;
    let groups: Vec<Gid> = identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    nix::unistd::setgroups(&groups).step(|| "set the supplementary groups".into())?;
    let gid = Gid::from_raw(identity.gid);
    nix::unistd::setresgid(gid, gid, gid).step(|| format!("become group {gid}"))?;
    let uid = nix::unistd::Uid::from_raw(identity.uid);
    nix::unistd::setresuid(uid, uid, uid).step(|| format!("become user {uid}"))?;
    rustix::thread::set_keep_capabilities(false).step(|| "drop capabilities".into())?;
    // Changing the identity has cleared this, and the agent's file must stay out of the container's sight.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .step(|| "turn off dumping".into())?;
    // As runc does: the directory is entered while the capabilities that override permissions are still there for root.
    enter_directory()?;
    let effective = set(listed.and_then(|caps| caps.effective().as_ref()));
    let permitted = set(listed.and_then(|caps| caps.permitted().as_ref()));
    let inheritable = set(listed.and_then(|caps| caps.inheritable().as_ref()));
    let ambient = set(listed.and_then(|caps| caps.ambient().as_ref()));
    let apply = |kind, value: &CapsHashSet| caps::set(None, kind, value).map_err(|error| capability_error(&error));
    apply(CapSet::Effective, &effective.intersection(&permitted).copied().collect())?;
    apply(CapSet::Permitted, &permitted)?;
    apply(CapSet::Inheritable, &inheritable)?;
    if identity.uid != 0 || !ambient.is_empty() {
        caps::clear(None, CapSet::Ambient).map_err(|error| capability_error(&error))?;
    }
    for capability in ambient {
        caps::raise(None, CapSet::Ambient, capability).map_err(|error| capability_error(&error))?;
    }
    if process.no_new_privileges().unwrap_or(false) {
        rustix::thread::set_no_new_privs(true).step(|| "set no_new_privs".into())?;
    }
    Ok(())
}

fn capability_error(error: &caps::errors::CapsError) -> Error {
    Error::Invalid(format!("set capabilities: {error}"))
}

/// A name that this kernel or library does not know grants nothing, so it is left out.
fn convert(names: &Capabilities) -> CapsHashSet {
    names.iter().filter_map(|name| Capability::from_str(&format!("CAP_{name}")).ok()).collect::<HashSet<_>>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_specification_become_the_librarys() {
        let names: Capabilities =
            [oci_spec::runtime::Capability::NetBindService, oci_spec::runtime::Capability::SysAdmin].into();
        let expected: CapsHashSet = [Capability::CAP_NET_BIND_SERVICE, Capability::CAP_SYS_ADMIN].into();
        assert_eq!(convert(&names), expected);
    }
}

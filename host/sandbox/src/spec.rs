//! The one hop of a specification from the bundle to the guest.

use coracle_protocol::oci;
use coracle_storage::ContainerPlan;

/// The specification for the guest: paths of the guest, and nothing that names the host.
pub(crate) fn for_guest(mut spec: oci::Spec, plan: &ContainerPlan, terminal: bool) -> oci::Spec {
    spec.Mounts.clone_from(&plan.guest_mounts);
    spec.Root.mut_or_insert_default().Path.clone_from(&plan.guest_root);
    // Hooks are the host's programs.
    spec.Hooks.clear();
    if let Some(process) = spec.Process.as_mut() {
        for_guest_process(process, terminal);
    }
    if let Some(linux) = spec.Linux.as_mut() {
        // The pod's network is the machine's; a path names a namespace of the host.
        linux.Namespaces.retain(|namespace| namespace.Type != "network");
        for namespace in &mut linux.Namespaces {
            namespace.Path.clear();
        }
        linux.CgroupsPath.clear();
        linux.MountLabel.clear();
        linux.IntelRdt.clear();
        if let Some(resources) = linux.Resources.as_mut() {
            // Numbers of host devices; and processors of the host, which the guest has not.
            resources.Devices.clear();
            resources.BlockIO.clear();
            if let Some(cpu) = resources.CPU.as_mut() {
                cpu.Cpus.clear();
                cpu.Mems.clear();
            }
        }
    }
    spec
}

/// The same for a process alone.
pub(crate) fn for_guest_process(process: &mut oci::Process, terminal: bool) {
    process.Terminal = terminal;
    process.ApparmorProfile.clear();
    process.SelinuxLabel.clear();
    // The guest has no other pods: a score that was meant for the host's balance means nothing in it.
    process.OOMScoreAdj = 0;
}

/// Processors and memory that a container's limits ask for: whole processors, MiB.
pub(crate) fn size(spec: &oci::Spec) -> (Option<u32>, Option<u64>) {
    let resources = spec.Linux.as_ref().and_then(|linux| linux.Resources.as_ref());
    let cpus = resources.and_then(|resources| resources.CPU.as_ref()).and_then(|cpu| {
        let period = if cpu.Period == 0 { 100_000 } else { cpu.Period };
        let quota = u64::try_from(cpu.Quota).ok().filter(|quota| *quota > 0)?;
        u32::try_from(quota.div_ceil(period)).ok()
    });
    let memory = resources.and_then(|resources| resources.Memory.as_ref()).and_then(|memory| {
        let limit = u64::try_from(memory.Limit).ok().filter(|limit| *limit > 0)?;
        Some(limit.div_ceil(1 << 20))
    });
    (cpus, memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> ContainerPlan {
        ContainerPlan { folder: "/s/c".into(), mounts: vec![], guest_mounts: vec![], guest_root: "/g/c/rootfs".into() }
    }

    #[test]
    fn nothing_of_the_host_goes_to_the_guest() {
        let json = r#"{"root":{"path":"rootfs","readonly":true},"hooks":{"prestart":[{"path":"/bin/x"}]},
            "process":{"args":["a"],"apparmorProfile":"p","oomScoreAdj":-900},
            "linux":{"cgroupsPath":"/host","namespaces":[{"type":"network","path":"/run/netns/x"},{"type":"ipc","path":"/p"}],
            "resources":{"devices":[{"allow":false}],"cpu":{"cpus":"7","shares":5}}}}"#;
        let spec = for_guest(coracle_protocol::from_json(json).unwrap(), &plan(), true);
        assert_eq!(spec.Root.Path, "/g/c/rootfs");
        assert!(spec.Root.Readonly && spec.Hooks.is_none() && spec.Process.Terminal);
        assert_eq!(spec.Linux.Namespaces.len(), 1);
        assert!(spec.Linux.Namespaces[0].Path.is_empty() && spec.Linux.CgroupsPath.is_empty());
        assert!(spec.Linux.Resources.CPU.Cpus.is_empty() && spec.Linux.Resources.CPU.Shares == 5);
        assert_eq!((spec.Process.OOMScoreAdj, spec.Process.ApparmorProfile.as_str()), (0, ""));
    }

    #[test]
    fn limits_become_whole_units() {
        let size = |json: &str| size(&coracle_protocol::from_json(json).unwrap());
        assert_eq!(size("{}"), (None, None));
        let json = r#"{"linux":{"resources":{"cpu":{"quota":150000,"period":100000},"memory":{"limit":1048577}}}}"#;
        assert_eq!(size(json), (Some(2), Some(2)));
        assert_eq!(size(r#"{"linux":{"resources":{"cpu":{"quota":-1},"memory":{"limit":-1}}}}"#), (None, None));
    }
}

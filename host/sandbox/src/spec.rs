//! The one hop of a specification from the bundle to the guest.

use std::path::PathBuf;

use coracle_protocol::oci;
use coracle_storage::{ContainerPlan, Needs};

use crate::boot::Setup;
use crate::passthrough::{self, Passed};
use crate::{Error, Result, size};

/// The specification for the guest: paths of the guest, and nothing that names the host.
pub(crate) fn for_guest(mut spec: oci::Spec, plan: &ContainerPlan, terminal: bool, labels: bool) -> oci::Spec {
    let passed: Vec<&str> = plan.guest_devices.iter().map(|device| device.container_path.as_str()).collect();
    spec.Mounts.clone_from(&plan.guest_mounts);
    spec.Root.mut_or_insert_default().Path.clone_from(&plan.guest_root);
    if let Some(process) = spec.Process.as_mut() {
        for_guest_process(process, terminal, labels);
    }
    if let Some(linux) = spec.Linux.as_mut() {
        // The pod's network is the machine's. A path names a namespace that is shared: with the other containers of the
        // pod, and so with the guest itself.
        linux.Namespaces.retain(|namespace| namespace.Type != "network" && namespace.Path.is_empty());
        linux.CgroupsPath.clear();
        linux.MountLabel.clear();
        linux.IntelRdt.clear();
        linux.Devices.retain(|device| is_guests(device) || is_block(device) && passed.contains(&device.Path.as_str()));
        let numbers = linux.Devices.iter().filter(|device| is_block(device));
        // The guest has them by other numbers, and finds those of the host's in these rules.
        let numbers: Vec<(i64, i64)> = numbers.map(|device| (device.Major, device.Minor)).collect();
        if let Some(resources) = linux.Resources.as_mut() {
            let is_passed = |rule: &oci::LinuxDeviceCgroup| {
                let number = rule.Major.zip(rule.Minor);
                rule.Type == "b" && number.is_some_and(|number| numbers.contains(&number))
            };
            let kept: Vec<_> = resources.Devices.iter().filter(|rule| rule.Allow && is_passed(rule)).cloned().collect();
            for_guest_resources(resources);
            resources.Devices.extend(kept);
        }
    }
    spec
}

/// The same for limits: without the numbers of devices that are the host's, and without its processors, which the guest has not.
pub(crate) fn for_guest_resources(resources: &mut oci::LinuxResources) {
    // What closes a device stays in any case: it can only close another one of that number.
    resources.Devices.retain(|rule| !rule.Allow || is_open(rule) || allows_guests(rule));
    if let Some(io) = resources.BlockIO.as_mut() {
        for list in [
            &mut io.ThrottleReadBpsDevice,
            &mut io.ThrottleWriteBpsDevice,
            &mut io.ThrottleReadIOPSDevice,
            &mut io.ThrottleWriteIOPSDevice,
        ] {
            list.clear();
        }
        io.WeightDevice.clear();
    }
    if let Some(cpu) = resources.CPU.as_mut() {
        cpu.Cpus.clear();
        cpu.Mems.clear();
    }
}

/// Character devices that have the same number on every kernel (Linux: Documentation/admin-guide/devices.txt): memory, terminals, and
/// those of the miscellaneous ones whose number is fixed, such as fuse and tun. The guest's console is not for containers.
fn is_everywhere(major: i64, minor: i64) -> bool {
    match major {
        1 | 136..=143 => true,
        5 => minor != 1,
        10 => matches!(minor, 183 | 200 | 223 | 229 | 232 | 234 | 236..=239 | 241),
        _ => false,
    }
}

/// Whether a rule opens nothing but devices that the guest has by the same number.
fn allows_guests(rule: &oci::LinuxDeviceCgroup) -> bool {
    let characters = matches!(rule.Type.as_str(), "c" | "u");
    match (rule.Major, rule.Minor.filter(|minor| *minor >= 0)) {
        (Some(major), Some(minor)) => characters && is_everywhere(major, minor),
        (Some(136..=143), None) => characters,
        _ => false,
    }
}

/// Whether the guest has this device as well.
fn is_guests(device: &oci::LinuxDevice) -> bool {
    matches!(device.Type.as_str(), "c" | "u") && is_everywhere(device.Major, device.Minor) || device.Type == "p"
}

fn is_block(device: &oci::LinuxDevice) -> bool {
    device.Type == "b"
}

/// Block devices of the host's that the container is given. A privileged one is given all that the host has, which is none.
pub(crate) fn block_devices(spec: &oci::Spec) -> Vec<oci::LinuxDevice> {
    let Some(linux) = spec.Linux.as_ref().filter(|linux| !is_privileged(linux)) else { return Vec::new() };
    linux.Devices.iter().filter(|device| is_block(device)).cloned().collect()
}

/// The container's limits of huge pages: the size of a page and of all, in bytes (runtime-spec, config-linux.md, "Huge page limits": `2MB`
/// is 2 MiB).
pub(crate) fn huge_pages(spec: &oci::Spec) -> Vec<(u64, u64)> {
    let resources = spec.Linux.as_ref().and_then(|linux| linux.Resources.as_ref());
    let limits = resources.map(|resources| resources.HugepageLimits.as_slice()).unwrap_or_default();
    let page = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit())?;
        let shift = match text.get(end..)? {
            "KB" => 10,
            "MB" => 20,
            "GB" => 30,
            _ => return None,
        };
        text.get(..end)?.parse::<u64>().ok()?.checked_shl(shift)
    };
    limits.iter().filter_map(|limit| Some((page(&limit.Pagesize)?, limit.Limit))).collect()
}

/// Character devices of the host's that the container is given; a privileged one likewise.
pub(crate) fn character_devices(spec: &oci::Spec) -> Vec<oci::LinuxDevice> {
    let Some(linux) = spec.Linux.as_ref().filter(|linux| !is_privileged(linux)) else { return Vec::new() };
    linux.Devices.iter().filter(|device| !is_block(device) && !is_guests(device)).cloned().collect()
}

/// The container's rules for devices.
pub(crate) fn device_rules(spec: &oci::Spec) -> Vec<oci::LinuxDeviceCgroup> {
    let resources = spec.Linux.as_ref().and_then(|linux| linux.Resources.as_ref());
    resources.map(|resources| resources.Devices.clone()).unwrap_or_default()
}

/// A rule about all devices of a type, or all devices.
fn is_open(rule: &oci::LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    any(rule.Major) && any(rule.Minor)
}

/// Whether the container may use every device, as a privileged one: then the devices that are listed are all that the host has, and
/// not those that somebody wants in it.
fn is_privileged(linux: &oci::Linux) -> bool {
    let rules = linux.Resources.as_ref().map(|resources| resources.Devices.as_slice()).unwrap_or_default();
    rules.last().is_some_and(|rule| rule.Allow && is_open(rule) && matches!(rule.Type.as_str(), "" | "a"))
}

/// Refuses what a machine can't do, before anything is made for it.
pub(crate) fn check(spec: &oci::Spec) -> Result<()> {
    network(spec)?;
    if let Some(hooks) = spec.Hooks.as_ref().filter(|hooks| **hooks != oci::Hooks::default()) {
        let lists = [
            &hooks.Prestart,
            &hooks.CreateRuntime,
            &hooks.CreateContainer,
            &hooks.StartContainer,
            &hooks.Poststart,
            &hooks.Poststop,
        ];
        let first = lists.iter().find_map(|list| list.first()).map(|hook| hook.Path.as_str()).unwrap_or_default();
        return Err(Error::Unsupported(format!(
            "the hook {first}: hooks are programs of the host that act on a container's processes there, and a pod's are in a \
             machine. Programs of the guest image can be hooks (setting `guest.hook_folder`)"
        )));
    }
    let Some(linux) = spec.Linux.as_ref() else { return Ok(()) };
    if let Some(resources) = linux.Resources.as_ref() {
        size::check_host_cpus(resources)?;
    }
    let is_passed = |device: &oci::LinuxDevice| is_block(device) || passthrough::node(device).is_some();
    match linux.Devices.iter().find(|device| !is_guests(device) && !is_passed(device)) {
        Some(device) if !is_privileged(linux) => {
            let text = "of the host can't be passed to a pod, whose machine has devices of its own: block devices can, and PCI devices by \
                /dev/vfio";
            Err(Error::Unsupported(format!("the device {} {text}", device.Path)))
        }
        Some(_) => {
            log::info!("devices of the host are not passed to this privileged container");
            Ok(())
        }
        None => Ok(()),
    }
}

/// The same for a process alone.
pub(crate) fn for_guest_process(process: &mut oci::Process, terminal: bool, labels: bool) {
    process.Terminal = terminal;
    if !labels {
        // They name profiles of the host.
        process.ApparmorProfile.clear();
        process.SelinuxLabel.clear();
    }
    // The guest has no other pods: a score that was meant for the host's balance means nothing in it.
    process.OOMScoreAdj = 0;
}

/// Whether the container wants to see the processes of the others of its pod.
pub(crate) fn shares_pids(spec: &oci::Spec) -> bool {
    let namespaces = spec.Linux.as_ref().map(|linux| linux.Namespaces.as_slice()).unwrap_or_default();
    namespaces.iter().any(|namespace| namespace.Type == "pid" && !namespace.Path.is_empty())
}

/// What a pod of one container is set up with: the size that its limits ask for, and what its storage needs from the start.
pub(crate) fn setup(spec: &oci::Spec, needs: Needs, passed: &[Passed]) -> Result<Setup> {
    let resources = spec.Linux.as_ref().and_then(|linux| linux.Resources.as_ref());
    let cpu = resources.and_then(|resources| resources.CPU.as_ref());
    let memory = resources.and_then(|resources| resources.Memory.as_ref());
    let huge = resources.map(|resources| resources.HugepageLimits.as_slice()).unwrap_or_default();
    let huge_mib = huge.iter().map(|limit| limit.Limit).fold(0, u64::saturating_add).div_ceil(1 << 20);
    Ok(Setup {
        cpus: cpu.and_then(|cpu| processors(cpu.Quota, cpu.Period)),
        memory_mib: memory.and_then(|memory| mebibytes(memory.Limit)).map(|mib| mib.saturating_add(huge_mib)),
        network: network(spec)?,
        shares_files: needs.shares_files,
        layers: needs.layers,
        devices: needs.disks.into_iter().chain(passed.iter().flat_map(Passed::devices)).collect(),
        ..Default::default()
    })
}

/// The network namespace that somebody has made for the pod; none where it is to have no links. Namespaces of kinds that are not
/// made are refused here, before anything is booted.
pub(crate) fn network(spec: &oci::Spec) -> Result<Option<PathBuf>> {
    let namespaces = spec.Linux.as_ref().map(|linux| linux.Namespaces.as_slice()).unwrap_or_default();
    if namespaces.iter().any(|namespace| namespace.Type == "user") {
        return Err(Error::Unsupported("a user namespace is not supported".into()));
    }
    match namespaces.iter().find(|namespace| namespace.Type == "network") {
        Some(own) if own.Path.is_empty() => Ok(None),
        Some(own) => Ok(Some(own.Path.clone().into())),
        None => Err(Error::Unsupported(
            "the container asks for the host's own network, which a machine can't share: give it a network namespace"
                .into(),
        )),
    }
}

/// What a pod is set up with whose containers come later. Their size is in annotations: the sum of what they will ask for.
pub(crate) fn pod_setup(id: &str, spec: &oci::Spec) -> Result<Setup> {
    let number = |key: &str| -> i64 {
        let text = spec.Annotations.get(&format!("io.kubernetes.cri.sandbox-{key}"));
        text.and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    Ok(Setup {
        cpus: processors(number("cpu-quota"), u64::try_from(number("cpu-period")).unwrap_or(0)),
        memory_mib: mebibytes(number("memory")),
        hostname: spec.Hostname.clone(),
        sandbox_id: id.to_owned(),
        network: network(spec)?,
        sysctls: spec.Linux.as_ref().map(|linux| linux.Sysctl.clone()).unwrap_or_default(),
        // What its containers will need nobody has said.
        shares_files: true,
        devices: Vec::new(),
        layers: Vec::new(),
    })
}

/// Whole processors for a quota of microseconds in each period of as many; the kernel's period where there is none.
fn processors(quota: i64, period: u64) -> Option<u32> {
    let period = if period == 0 { 100_000 } else { period };
    let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0)?;
    u32::try_from(quota.div_ceil(period)).ok()
}

/// MiB for a limit in bytes, rounded up.
fn mebibytes(limit: i64) -> Option<u64> {
    u64::try_from(limit).ok().filter(|limit| *limit > 0).map(|limit| limit.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> ContainerPlan {
        ContainerPlan { guest_root: "/g/c/rootfs".into(), ..ContainerPlan::default() }
    }

    #[test]
    fn nothing_of_the_host_goes_to_the_guest() {
        let json = r#"{"root":{"path":"rootfs","readonly":true},
            "process":{"args":["a"],"apparmorProfile":"p","oomScoreAdj":-900},
            "linux":{"cgroupsPath":"/host","namespaces":[{"type":"network","path":"/run/netns/x"},{"type":"ipc","path":"/p"},{"type":"uts"}],
            "devices":[{"path":"/dev/fuse","type":"c","major":10,"minor":229},{"path":"/dev/sda","type":"b","major":8,"minor":0}],
            "resources":{"devices":[{"allow":false},{"allow":true,"type":"b","major":8,"minor":0},
            {"allow":true,"type":"c","major":10,"minor":229},{"allow":true,"type":"c","major":10,"minor":120},
            {"allow":true,"type":"c","major":5,"minor":1},{"allow":false,"type":"b","major":7}],"blockIO":{"weight":10,"throttleReadBpsDevice":[{"major":8,"rate":1}]},
            "cpu":{"cpus":"7","shares":5}}}}"#;
        let spec = for_guest(coracle_protocol::from_json(json).unwrap(), &plan(), true, false);
        assert_eq!(spec.Linux.Devices.len(), 1);
        let kept: Vec<(bool, Option<i64>, Option<i64>)> =
            spec.Linux.Resources.Devices.iter().map(|rule| (rule.Allow, rule.Major, rule.Minor)).collect();
        let expected = [(false, None, None), (true, Some(10), Some(229)), (false, Some(7), None)];
        assert_eq!(kept, expected, "nothing is opened by a number of the host's");
        let io = &spec.Linux.Resources.BlockIO;
        assert_eq!((io.Weight, io.ThrottleReadBpsDevice.len()), (10, 0));
        assert_eq!(spec.Root.Path, "/g/c/rootfs");
        assert!(spec.Root.Readonly && spec.Process.Terminal);
        let kinds: Vec<&str> = spec.Linux.Namespaces.iter().map(|namespace| namespace.Type.as_str()).collect();
        assert_eq!(kinds, ["uts"], "a namespace with a path is the pod's");
        assert!(spec.Linux.CgroupsPath.is_empty());
        assert!(spec.Linux.Resources.CPU.Cpus.is_empty() && spec.Linux.Resources.CPU.Shares == 5);
        assert_eq!((spec.Process.OOMScoreAdj, spec.Process.ApparmorProfile.as_str()), (0, ""));
    }

    #[test]
    fn what_a_machine_can_not_do_is_refused_by_name() {
        let check = |part: &str| {
            let json = format!(r#"{{"linux":{{"namespaces":[{{"type":"network"}}]{part}}}}}"#);
            check(&coracle_protocol::from_json(&json).unwrap()).map_err(|error| error.to_string())
        };
        check("").unwrap();
        check(r#","devices":[{"path":"/dev/sda","type":"b","major":8,"minor":0}]"#).unwrap();
        let disk = r#","devices":[{"path":"/dev/nvidia0","type":"c","major":195,"minor":0}]"#;
        assert!(check(disk).unwrap_err().contains("/dev/nvidia0"));
        let privileged =
            format!(r#"{disk},"resources":{{"devices":[{{"allow":false}},{{"allow":true,"access":"rwm"}}]}}"#);
        check(&privileged).unwrap();
        let hooks = r#"},"hooks":{"prestart":[{"path":"/bin/hook"}]"#;
        assert!(check(hooks).unwrap_err().contains("/bin/hook"));
        check(r#"},"hooks":{"prestart":[]"#).unwrap();
    }

    #[test]
    fn limits_become_whole_units() {
        let size = |json: &str| {
            let mut spec: oci::Spec = coracle_protocol::from_json(json).unwrap();
            let network = oci::LinuxNamespace { Type: "network".into(), ..Default::default() };
            spec.Linux.mut_or_insert_default().Namespaces.push(network);
            let setup = setup(&spec, Needs::default(), &[]).unwrap();
            (setup.cpus, setup.memory_mib)
        };
        assert_eq!(size("{}"), (None, None));
        let json = r#"{"linux":{"resources":{"cpu":{"quota":150000,"period":100000},"memory":{"limit":1048577}}}}"#;
        assert_eq!(size(json), (Some(2), Some(2)));
        assert_eq!(size(r#"{"linux":{"resources":{"cpu":{"quota":-1},"memory":{"limit":-1}}}}"#), (None, None));
    }

    #[test]
    fn a_pods_size_is_in_its_annotations() {
        let json = r#"{"hostname":"h","annotations":{"io.kubernetes.cri.sandbox-cpu-quota":"250000",
            "io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-memory":"134217728"},
            "linux":{"namespaces":[{"type":"network","path":"/run/netns/x"}]}}"#;
        let setup = pod_setup("p", &coracle_protocol::from_json(json).unwrap()).unwrap();
        assert_eq!(setup.network, Some("/run/netns/x".into()));
        let of_the_host = pod_setup("p", &coracle_protocol::from_json("{}").unwrap()).unwrap_err();
        assert!(of_the_host.to_string().contains("the host's own network"));
        assert_eq!((setup.cpus, setup.memory_mib), (Some(3), Some(128)));
        assert_eq!((setup.hostname.as_str(), setup.sandbox_id.as_str()), ("h", "p"));
    }
}

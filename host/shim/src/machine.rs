//! From the settings to a driver and a pod's configuration: the one place where a driver's name is matched.

use std::path::Path;
use std::sync::Arc;

use coracle_driver_builtin::{Builtin, Config as BuiltinConfig};
use coracle_driver_qemu::{Config as QemuConfig, KvmState, MachineType, Qemu, probe_kvm};
use coracle_machine::{Accelerator, Driver, Forward, Kernel, KernelForm, Limits, Rate};
use coracle_sandbox::{Config, Error, UserNetwork};
use coracle_settings::{self as settings, EmptyDir, Layers, Limit, NetworkModel, Settings, SharedFs};

/// What runs the guest, or why nothing may.
pub(crate) fn accelerator(settings: &Settings) -> Result<Accelerator, Error> {
    use settings::Accelerator as Wanted;
    let state = match settings.accelerator {
        Wanted::Emulation => return Ok(Accelerator::Emulation),
        Wanted::Kvm | Wanted::Any => probe_kvm(),
    };
    match (state, settings.accelerator) {
        (KvmState::Usable, _) => Ok(Accelerator::Kvm),
        (KvmState::Unusable(_), Wanted::Any) => Ok(Accelerator::Emulation),
        (KvmState::Unusable(reason), _) => Err(Error::Missing(format!(
            "KVM can't be used: {reason}. Emulation is no security boundary and is not used unless the administrator sets \
             `accelerator = \"any\"` in the table [machine] of {}",
            settings::FILE
        ))),
    }
}

/// The name of the monitor that runs the machine.
pub(crate) fn monitor(settings: &Settings) -> Result<&'static str, Error> {
    use settings::Monitor as Wanted;
    match (settings.monitor, accelerator(settings)?) {
        (Wanted::Builtin | Wanted::Auto, Accelerator::Kvm) => Ok(BUILTIN),
        (Wanted::Builtin, Accelerator::Emulation) => Err(Error::Missing(format!(
            "the built-in monitor needs KVM, and this machine would be emulated: run `coracle check`, or set \
             `monitor = \"qemu\"` in the table [machine] of {}",
            settings::FILE
        ))),
        (Wanted::Qemu, _) | (Wanted::Auto, Accelerator::Emulation) => Ok(QEMU),
    }
}

/// Names of monitors, as users see them.
const BUILTIN: &str = "builtin";
const QEMU: &str = "qemu";

/// The driver that the settings name.
pub(crate) fn driver(settings: &Settings) -> Result<Arc<dyn Driver>, Error> {
    let own = std::env::current_exe().map_err(|error| Error::Failed(format!("find this program: {error}")))?;
    if monitor(settings)? == BUILTIN {
        let monitor = vec![own.into(), "vmm".into()];
        return Ok(Arc::new(Builtin::new(BuiltinConfig { monitor, jail: settings.builtin_jail })));
    }
    Ok(Arc::new(Qemu::new(QemuConfig {
        program: settings.qemu_path.clone(),
        machine_type: match settings.machine_type {
            settings::MachineType::Q35 => MachineType::Q35,
            settings::MachineType::Microvm => MachineType::Microvm,
        },
        accelerator: accelerator(settings)?,
        vsock_server: vec![own.into(), "vsock".into()],
        kernel_vsock: settings.qemu_kernel_vsock,
        jail: settings.qemu_jail,
        extra_arguments: settings.qemu_arguments.clone(),
    })))
}

/// What each of a machine's disks may do, read and write alike.
fn disk_limits(settings: &Settings) -> Limits {
    let rate = Rate {
        bytes_per_second: settings.machine_disk_bytes_per_second.0.unwrap_or(0),
        operations_per_second: settings.machine_disk_operations_per_second.0.unwrap_or(0),
    };
    Limits { to_guest: rate, from_guest: rate }
}

/// Memory that a machine may have at most; 0 where it may not grow: the kernel would count all of it as taken.
fn host_memory_mib() -> u64 {
    let strict = std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|mode| mode.trim() == "2");
    let info = rustix::system::sysinfo();
    if strict { 0 } else { (u64::from(info.mem_unit) * info.totalram) >> 20 }
}

/// Processors of the host, whatever this process may use of them: its pod's control group may be given more later.
fn host_processors() -> u32 {
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    let of = |range: &str| -> Option<u32> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
    };
    online.trim().split(',').filter_map(of).sum::<u32>().max(1)
}

/// The network of a pod that has no namespace for one.
fn user_network(settings: &Settings) -> Result<Option<UserNetwork>, Error> {
    if !settings.network_user {
        return Ok(None);
    }
    let forwards = settings.network_user_ports.iter().map(|text| forward(text)).collect::<Result<_, _>>()?;
    Ok(Some(UserNetwork { forwards, passt: settings.network_passt_paths.clone() }))
}

/// `ADDRESS:PORT:PORT/tcp`.
fn forward(text: &str) -> Result<Forward, Error> {
    let parse = || {
        let (rest, protocol) = text.rsplit_once('/')?;
        let (host, guest) = rest.rsplit_once(':')?;
        let is_udp = match protocol {
            "udp" => true,
            "tcp" => false,
            _ => return None,
        };
        Some(Forward { is_udp, host: host.parse().ok()?, guest: guest.parse().ok()? })
    };
    parse().ok_or_else(|| Error::Invalid(format!("network.user_ports: {text:?} is not ADDRESS:PORT:PORT/tcp or /udp")))
}

/// The configuration of the pod `name` whose machine works in `folder`.
pub(crate) fn config(settings: &Settings, name: &str, folder: &Path) -> Result<Config, Error> {
    let guest = &settings.guest_folder;
    let manifest = coracle_guest_image::read_manifest(guest).map_err(|error| {
        Error::Missing(format!("the guest image: {error}: run `coracle image build`, or set `guest.folder`"))
    })?;
    if manifest.version != coracle_protocol::VERSION {
        return Err(Error::Missing(format!(
            "the guest image in {} is version {}, this shim is version {}: run `coracle image build` to make them the same",
            guest.display(),
            manifest.version,
            coracle_protocol::VERSION
        )));
    }
    Ok(Config {
        name: format!("coracle-{name}"),
        folder: folder.to_owned(),
        kernel: Kernel { path: guest.join(coracle_guest_image::KERNEL), form: KernelForm::PvhElf },
        initrd: guest.join(coracle_guest_image::INITRD),
        command_line: command_line(settings),
        memory_mib: settings.machine_memory_mib,
        memory_max_mib: settings.machine_max_memory_mib.min(host_memory_mib()),
        vcpus_max: settings.machine_max_vcpus.min(host_processors()),
        huge_pages: settings.machine_huge_pages,
        disk_limits: disk_limits(settings),
        vcpus: settings.machine_vcpus,
        virtiofsd: Some((settings.virtiofsd_path.clone(), settings.virtiofsd_open_files)),
        shares_files: settings.storage_shared_fs == SharedFs::VirtioFs && !settings.machine_sealed,
        layers_as_memory: settings.storage_layers == Layers::Memory,
        sealed: settings.machine_sealed,
        host_cpus: settings.machine_host_cpus.0.clone(),
        host_nodes: settings.machine_host_nodes.0.clone(),
        user_network: user_network(settings)?,
        labels: settings.guest_labels,
        hook_folder: settings.guest_hook_folder.clone(),
        direct_volumes: settings.storage_direct_volumes.clone(),
        swap_folder: settings.machine_guest_swap.then(|| settings.machine_swap_folder.clone()),
        empty_dir_mib: (settings.storage_empty_dir == EmptyDir::Disk).then_some(settings.storage_empty_dir_mib),
        network: network_options(settings),
        clock_period: std::time::Duration::from_secs(settings.guest_clock_seconds),
        boot_timeout: settings.boot_timeout(),
        agent_timeout: std::time::Duration::from_secs(settings.agent_timeout_seconds),
        trace: crate::trace::of_sandbox(),
        version: coracle_protocol::VERSION.to_owned(),
    })
}

/// The kernel's command line: the image's, and what a sealed machine has beside it.
fn command_line(settings: &Settings) -> String {
    let line = coracle_guest_image::command_line();
    // Every transfer goes through memory that is lent for it, of 32 MiB (Linux: admin-guide/kernel-parameters.txt, `swiotlb`).
    let line = if settings.machine_sealed { line + " swiotlb=16384,force" } else { line };
    if settings.debug_console { format!("{line} {}", coracle_protocol::ports::DEBUG_CONSOLE) } else { line }
}

/// How links of pods are taken over.
fn network_options(settings: &Settings) -> coracle_network::Options {
    let bits = |mbit: Limit| mbit.0.map(|mbit| mbit.saturating_mul(1_000_000));
    coracle_network::Options {
        model: match settings.network_model {
            NetworkModel::TcFilter => coracle_network::Model::TcFilter,
            NetworkModel::Macvtap => coracle_network::Model::Macvtap,
            NetworkModel::Routed => coracle_network::Model::Routed,
            NetworkModel::None => coracle_network::Model::None,
        },
        to_guest: bits(settings.network_limit_to_guest_mbit),
        from_guest: bits(settings.network_limit_from_guest_mbit),
        queues: settings.network_queues.0.unwrap_or(0),
    }
}

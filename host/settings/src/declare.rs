//! The declarations: what a setting is called, its type, default and text, and who may set it. All else comes from here.

use std::path::PathBuf;

use serde_json::Value as Json;

use crate::deprecation::{self, Kind as What};
use crate::kinds::{
    Accelerator, Collector, EmptyDir, Given, Kind, Layers, Limit, LogFormat, MachineType, Monitor, NetworkModel,
    Numbers, Queues, Rootfs, SharedFs,
};
use crate::levels::{Level, Levels};

/// How far something can be relied upon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// It is tested and kept, and goes only by the deprecation process.
    Supported,
    /// It goes only by the deprecation process, too, and is tested in parts, or not on each change.
    BestEffort,
    /// It may change or go with any release.
    Experimental,
    /// It goes, as the register says.
    Deprecated,
}

impl Support {
    /// Its name in the reference.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Supported => "supported",
            Self::BestEffort => "best effort",
            Self::Experimental => "experimental",
            Self::Deprecated => "deprecated",
        }
    }

    /// That of something that is no setting: what the register names is deprecated, what is not in the list below supported.
    #[must_use]
    pub fn of(kind: What, name: &str) -> Self {
        if deprecation::of(kind, name).is_some() {
            return Self::Deprecated;
        }
        let known = LEVELS.iter().find(|(of, known, ..)| *of == kind && *known == name);
        known.map_or(Self::Supported, |(_, _, level, _)| *level)
    }
}

/// What is less than supported, and why. Annotations have the level of their setting.
pub(crate) const LEVELS: &[(What, &str, Support, &str)] = &[
    (What::Driver, "builtin", Support::Experimental, "under containerd; by `coracle run` it is supported"),
    (What::Command, "coracle debug", Support::BestEffort, "it needs an image with a shell of the user's own"),
    (What::Command, "coracle iptables get", Support::BestEffort, "our guest image has no such tools"),
    (What::Command, "coracle iptables set", Support::BestEffort, "our guest image has no such tools"),
    (What::Command, "coracle install", Support::BestEffort, "packages of distributions are to come"),
    (What::Command, "coracle uninstall", Support::BestEffort, "as `coracle install`"),
    (What::Method, "GetIPTables", Support::BestEffort, "our guest image has no such tools"),
    (What::Method, "SetIPTables", Support::BestEffort, "our guest image has no such tools"),
];

/// One entry of the reference.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its key, with its table: `machine.memory_mib`.
    pub key: &'static str,
    /// What is expected.
    pub expected: &'static str,
    /// The default as TOML.
    pub default: String,
    /// What it does.
    pub text: &'static str,
    /// Whether a pod may set it by an annotation, where the administrator allows that.
    pub by_annotation: bool,
    /// The version that had it first.
    pub since: &'static str,
    /// How far it can be relied upon.
    pub support: Support,
    /// What JSON Schema says of a value.
    pub schema: fn() -> Json,
}

impl Entry {
    /// The annotation that sets it for a pod.
    #[must_use]
    pub fn annotation(&self) -> Option<String> {
        self.by_annotation.then(|| format!("{ANNOTATIONS}{}", self.key))
    }

    fn by_annotation(self) -> Self {
        Self { by_annotation: true, ..self }
    }

    fn experimental(self) -> Self {
        Self { support: Support::Experimental, ..self }
    }
}

/// What the annotations begin with by which a pod sets settings; the key is behind it.
pub const ANNOTATIONS: &str = "io.coracle.config.";

/// The first version.
const FIRST: &str = "0.1.0";

macro_rules! settings {
    ($($field:ident: $type:ty = $key:literal, $default:expr, $text:literal $(.$attribute:ident())*;)*) => {
        /// All settings.
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct Settings {
            $(#[doc = $text] pub $field: $type,)*
        }

        impl Default for Settings {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl Settings {
            /// Sets the setting `key`.
            pub(crate) fn set(&mut self, key: &str, value: &Given) -> Set {
                match key {
                    $($key => match <$type as Kind>::read(value) {
                        Some(value) => {
                            self.$field = value;
                            Set::Done($key)
                        }
                        None => Set::Expected(<$type as Kind>::EXPECTED),
                    },)*
                    _ => Set::Unknown,
                }
            }

            /// The value of each setting as TOML, by its key, in the order of their declaration.
            #[must_use]
            pub fn values(&self) -> Vec<(&'static str, String)> {
                vec![$(($key, self.$field.show()),)*]
            }
        }

        /// The reference of all settings, in the order of their declaration.
        #[must_use]
        pub fn reference() -> Vec<Entry> {
            let settings = Settings::default();
            vec![$(Entry {
                key: $key,
                expected: <$type as Kind>::EXPECTED,
                default: settings.$field.show(),
                text: $text,
                by_annotation: false,
                since: FIRST,
                support: Support::Supported,
                schema: <$type as Kind>::schema,
            }$(.$attribute())*,)*]
        }
    };
}

/// What has come of setting a setting.
pub(crate) enum Set {
    /// It is set; its key.
    Done(&'static str),
    /// There is none of that name.
    Unknown,
    /// Something else was expected.
    Expected(&'static str),
}

settings! {
    accelerator: Accelerator = "machine.accelerator", Accelerator::Kvm,
        "What runs the guest's instructions. \"kvm\" refuses to start where KVM does not work; \"any\" falls back to emulation, which is no security boundary.";
    monitor: Monitor = "machine.monitor", Monitor::Qemu,
        "The machine monitor. \"qemu\" is QEMU; \"builtin\" is Coracle's own, which needs KVM and is experimental under containerd; \"auto\" is the built-in one where KVM works, else QEMU: the default of `coracle run`.";
    builtin_jail: bool = "builtin.jail", true,
        "Whether the built-in monitor goes into its jail. Without it, a guest that takes the monitor over has taken over the shim's user: for measurements only.".experimental();
    machine_type: MachineType = "machine.type", MachineType::Q35,
        "QEMU's machine type.";
    machine_memory_mib: u64 = "machine.memory_mib", 256,
        "Memory of a pod's machine in MiB, before the memory limits of its containers are added.".by_annotation();
    machine_max_memory_mib: u64 = "machine.max_memory_mib", 65536,
        "Memory that a pod's machine can have at most in MiB, where it can grow, and never more than the host has. A machine grows and shrinks with the limits of its containers.".by_annotation();
    machine_max_vcpus: u32 = "machine.max_vcpus", 8,
        "Processors that a pod's machine can have at most, where it can grow, and never more than the host has.".by_annotation();
    machine_huge_pages: bool = "machine.huge_pages", false,
        "Whether a machine's memory is made of huge pages of 2 MiB. They must be reserved on the host (vm.nr_hugepages) and are taken whole; a machine for which there are too few fails to start or is killed.";
    machine_sealed: bool = "machine.sealed", false,
        "Whether a machine is made by the rules of confidential guests: all its devices are there from its start, its size is fixed, devices reach only memory that the guest lends them, no files are shared (as with `storage.shared_fs = \"none\"`), its console is not kept, and it gives back no memory. It protects from nobody by itself.";
    machine_host_cpus: Numbers = "machine.host_cpus", Numbers::default(),
        "Processors of the host on which a pod's machine runs: with QEMU each of its own processors is pinned to one of them, in turn, and its other threads run on all of them; all of the built-in monitor's run on all. \"\" is any; where containers have a `cpuset`, the machine runs on all of theirs.";
    machine_host_nodes: Numbers = "machine.host_nodes", Numbers::default(),
        "Nodes of the host (NUMA) whose memory a pod's machine has, and no other. \"\" is any.";
    machine_disk_bytes_per_second: Limit = "machine.disk_bytes_per_second", Limit(None),
        "The most bytes in a second that are read from each of a machine's disks, and as many again that are written to it; swap is not counted. 0 is no limit.".by_annotation();
    machine_disk_operations_per_second: Limit = "machine.disk_operations_per_second", Limit(None),
        "The most requests in a second by which each of a machine's disks is read, and as many again by which it is written to. 0 is no limit.".by_annotation();
    machine_guest_swap: bool = "machine.guest_swap", false,
        "Whether a guest gets swap where a container's annotations ask for it (`io.katacontainers.container.resource.swappiness` above 0, and `swap_in_bytes`). On machines that gain disks while they run.".by_annotation();
    machine_swap_folder: PathBuf = "machine.swap_folder", "/var/lib/coracle/swap".into(),
        "The folder for the guests' swap, of which the host's disk is used as they write it. Its files have no name while they are used.";
    machine_vcpus: u32 = "machine.vcpus", 1,
        "Processors of a pod's machine where its containers ask for none.".by_annotation();
    guest_folder: PathBuf = "guest.folder", "/var/lib/coracle/guest".into(),
        "The folder of the guest image, as `coracle image build` writes it.";
    guest_boot_timeout_seconds: u64 = "guest.boot_timeout_seconds", 60,
        "How long a guest may take to come up, in seconds.".by_annotation();
    guest_clock_seconds: u64 = "guest.clock_seconds", 300,
        "How often the guest's clock is set to the host's, in seconds. When the host's own clock is set, or goes on after a suspend, that is done at once.";
    guest_labels: bool = "guest.labels", false,
        "Whether AppArmor profiles and SELinux labels of containers are applied in the guest. They name profiles of the guest's kernel then; a missing one fails the start. Without this they are left out: the host's profiles mean nothing in the guest.";
    guest_hook_folder: String = "guest.hook_folder", String::new(),
        "A folder of the guest image with hooks for its containers: programs in its folders prestart, poststart and poststop. Empty is none.";
    agent_timeout_seconds: u64 = "agent.timeout_seconds", 120,
        "How long the agent may take to answer a request that is not a wait, in seconds.".by_annotation();
    qemu_path: PathBuf = "qemu.path", "/usr/bin/qemu-system-x86_64".into(),
        "QEMU's program.";
    qemu_arguments: Vec<String> = "qemu.arguments", Vec::new(),
        "More arguments for QEMU. What they name it opens as its own user (see `qemu.jail`).";
    qemu_jail: bool = "qemu.jail", true,
        "Whether QEMU, where root starts it, runs as a user of its own, one a pod, without a capability, in namespaces of its own, in which it sees neither processes nor what is in /home, /media, /mnt, /opt, /root, /run, /srv, /tmp and /var (but for the one that its program is in), has no sockets but local ones, and can write to nothing but devices that all may use. Everybody must be able to run its program. One that serves a container's network itself (`coracle run --network user` as root, without passt) stays as without it. Without it, a guest that takes QEMU over has taken over a root user of the host's, with few capabilities.";
    qemu_kernel_vsock: bool = "qemu.kernel_vsock", false,
        "Whether the host kernel's vhost-vsock is used where it is there, in the place of our own server. It saves a process a pod; but every program of the host, whoever runs it, in a container of another runtime too, can then speak to the guests' agents, for the kernel asks nobody who opens a connection.";
    virtiofsd_path: Vec<String> = "virtiofsd.paths", ["/usr/libexec/virtiofsd", "/usr/local/bin/virtiofsd", "/usr/lib/qemu/virtiofsd"].map(str::to_owned).into(),
        "Where virtiofsd is looked for; the first that is there is used, whether the Rust or the older C program.";
    virtiofsd_open_files: u64 = "virtiofsd.open_files", 1_000_000,
        "The most files that a pod's virtiofsd has open at once: those that its guest uses, and those that it remembers. A guest that wants more is told that there are too many. At least 64; an ordinary user's has no more than that user may have.";
    storage_shared_fs: SharedFs = "storage.shared_fs", SharedFs::VirtioFs,
        "How a guest has files of the host's that are not on disks. \"virtio-fs\": it sees them, by virtiofsd. \"none\": it gets copies of single files (64 MiB at most) and of what kubelet writes as a whole, `emptyDir` volumes are the guest's memory, the termination message comes back, and a mount of any other folder is refused.";
    storage_direct_volumes: PathBuf = "storage.direct_volumes", "/run/kata-containers/shared/direct-volumes".into(),
        "The folder in which a storage driver names volumes that are disks: below it, in the folder of a volume's path in URL-safe base64, `mountInfo.json` says which disk the guest mounts (Kata's direct-assigned volumes).";
    storage_empty_dir: EmptyDir = "storage.empty_dir", EmptyDir::Folder,
        "What kubelet's `emptyDir` volumes are that are no memory. \"folder\" is the host's folder, as far as `storage.shared_fs` shares folders; \"disk\" is a file in that folder, which is a disk of the guest's: what is freed in it is the host's again. Files that the host has put into the folder are not seen then.".by_annotation();
    storage_empty_dir_mib: u64 = "storage.empty_dir_mib", 16384,
        "The size of such a disk, in MiB. The host's disk is used as it is written to.";
    storage_layers: Layers = "storage.layers", Layers::Disk,
        "How a guest reads layers of an image that are read-only disks (EROFS). \"disk\": by blocks, into memory of its own. \"memory\": as memory of its machine (virtio-pmem), and keeps no copy of what the host has read; for the containers that have the layers of that which boots the machine, on the built-in monitor, where neither folders nor devices of the host are shared and nothing verifies them. Elsewhere as \"disk\". It takes 1/64 of the layers' size of the guest's memory.".by_annotation();
    network_model: NetworkModel = "network.model", NetworkModel::TcFilter,
        "How the links of a pod's network namespace and the guest's are one another's wire. \"tcfilter\" sends on each frame between a link and the machine's by a filter; \"macvtap\" puts the machine's device on the link (veth and vlan); \"routed\" makes the namespace a router, for IP alone, whatever the link is; \"none\" leaves the links alone, and the guest has none.";
    network_limit_to_guest_mbit: Limit = "network.limit_to_guest_mbit", Limit(None),
        "The most that goes to a guest by each of its links, in megabits a second; 0 is no limit. Not with `network.model = \"macvtap\"`.".by_annotation();
    network_limit_from_guest_mbit: Limit = "network.limit_from_guest_mbit", Limit(None),
        "The most that comes from a guest by each of its links, in megabits a second; 0 is no limit. Not with `network.model = \"macvtap\"`.".by_annotation();
    network_queues: Queues = "network.queues", Queues(None),
        "How many pairs of queues each link of a guest has, 8 at most: so many of its processors send and receive at once. 0 is as many as the machine has processors from the start.".by_annotation();
    network_default: String = "network.default", "bridge".into(),
        "The network of `coracle run` without --network: \"bridge\" is addresses behind the host's own, \"user\" is one that takes no privileges (an ordinary user's containers have it instead of another one), \"none\" is no network, any other word is the name of a CNI network.";
    network_plugin_folders: Vec<String> = "network.plugin_folders", ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"].map(str::to_owned).into(),
        "Where `coracle run` looks for CNI plugins. Under containerd they are containerd's.";
    network_configuration_folder: PathBuf = "network.configuration_folder", "/etc/cni/net.d".into(),
        "Where `coracle run --network NAME` looks for CNI networks: files *.conflist and *.conf.";
    network_subnets: Vec<String> = "network.subnets", vec!["10.89.0.0/24".into()],
        "The addresses of containers of `coracle run` on the network \"bridge\": of each subnet, of IPv4 or IPv6, a container has one. They must be nobody else's on this host.";
    network_user: bool = "network.user", false,
        "Whether a pod that has no network namespace gets a network that takes no privileges: by passt where it is installed, else by QEMU itself. `coracle run` sets it for its containers, as `--network` says.";
    network_user_ports: Vec<String> = "network.user_ports", Vec::new(),
        "Ports of the host that lead to such a pod: ADDRESS:PORT:PORT/tcp or /udp. `coracle run --publish` sets it.";
    network_passt_paths: Vec<String> = "network.passt_paths", ["/usr/bin/passt", "/usr/local/bin/passt"].map(str::to_owned).into(),
        "Where passt is looked for; where it is nowhere, QEMU's own network is used.";
    annotations_allow: Vec<String> = "annotations.allow", Vec::new(),
        "Settings that a pod may set for itself, by an annotation `io.coracle.config.` with the setting's name behind it, or by Kata's annotation that means the same. A pod with another one fails to start. The reference says which settings can be here.";
    run_rootfs: Rootfs = "run.rootfs", Rootfs::Erofs,
        "What the root of a container of `coracle run` is made of. \"erofs\" is read-only disks, one for each layer of the image and shared by all containers, and a disk of its own to write to; the host shares no files then but volumes. \"virtiofs\" is a folder of the host.";
    run_verity: bool = "run.verity", false,
        "Whether the guest verifies what it reads of an image's layers by their hashes (dm-verity), where `run.rootfs` is \"erofs\".";
    run_writable_mib: u64 = "run.writable_mib", 16384,
        "The most that a container of `coracle run` can have written to its root, in MiB, where `run.rootfs` is \"erofs\". The host's disk is used as it writes.";
    log_levels: Levels = "log.levels", Levels::new(Level::Info),
        "How much a shim logs: a level, and behind it others for components, such as \"info,console=debug\". Levels are off, error, warn, info and debug; components are shim, sandbox, plan (storage and network), driver, monitor (what the monitor and its servers say) and console (what the guest prints); the last two are written at debug. `coracle levels` changes it in a running pod.";
    log_format: LogFormat = "log.format", LogFormat::Text,
        "How a shim writes its log. \"text\": lines of key=value, to the pipe that containerd gives it, or to the file `log` of a container of `coracle run`. \"json\": there, too, an object a line. \"journal\": to systemd's journal.";
    tracing_endpoint: Collector = "tracing.endpoint", Collector(None),
        "Where a collector takes traces by OTLP over HTTP, such as \"http://127.0.0.1:4318\", on this host or near: it is not encrypted. Empty is nowhere, and nothing is traced. A collector that is away or slow loses spans, and holds up no pod.";
    debug_console: bool = "debug.console", false,
        "Whether `coracle debug` can open a shell in guests, where their image has one (`coracle image build --shell`). It is root's there, and sees all containers of the pod. It is said in the kernel's command line, which is measured where a guest is.";
    run_folder: PathBuf = "run.folder", "/run/coracle".into(),
        "The folder for what lives as long as a pod. Its path must be short: sockets are below it.";
}

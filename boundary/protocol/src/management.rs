//! The management interface of a running pod: a service of the shim beside containerd's, on the same socket, which nobody but its owner can reach.
//!
//! Requests and answers are JSON, but for the text of [`METRICS`].

/// The service of volumes: `Stats {"path"}`, `Resize {"path", "bytes"}`.
pub const VOLUMES: &str = "coracle.Volumes";

/// The service of the pod itself.
pub const POD: &str = "coracle.Pod";

/// What the pod is: [`Description`].
pub const DESCRIBE: &str = "Describe";

/// The pod's figures, as the text of [`crate::metrics`].
pub const METRICS: &str = "Metrics";

/// How much the shim logs: `{"levels"}` as the setting `log.levels` has it, or `{}` to ask. The answer is `{"levels"}` as they are now.
pub const LEVELS: &str = "Levels";

/// What the pod's containers have used: a list of [`Usage`].
pub const USAGE: &str = "Usage";

/// The guest's packet filter: `{"ipv6"}` gives `{"rules"}` in the form of iptables-save(8), and `{"ipv6", "rules"}` replaces them.
pub const IPTABLES: &str = "IpTables";

/// The last lines of the guest's console: `{"lines"}` gives that many at most, as a list.
pub const CONSOLE: &str = "Console";

/// What a container has used.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    /// The container.
    pub container: String,
    /// Processor time in nanoseconds.
    pub cpu_nanoseconds: u64,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// What it may have; none where it has no limit.
    pub memory_limit_bytes: Option<u64>,
    /// Processes.
    pub processes: u64,
    /// Bytes read from and written to disks.
    pub read_bytes: u64,
    /// See [`Self::read_bytes`].
    pub written_bytes: u64,
    /// Bytes that have come and gone by the pod's links, but its loopback; the same for all its containers.
    pub received_bytes: u64,
    /// See [`Self::received_bytes`].
    pub sent_bytes: u64,
}

/// The socket of a pod's shim, in the pod's folder.
pub const SOCKET: &str = "shim.sock";

/// What a pod is.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Description {
    /// containerd's namespace.
    pub namespace: String,
    /// Its name.
    pub id: String,
    /// The shim's version.
    pub version: String,
    /// The shim's process.
    pub pid: u32,
    /// When the shim has started, in seconds since 1970.
    pub started: u64,
    /// What runs the machine: `builtin`, `qemu`; empty before there is one.
    pub monitor: String,
    /// How the machine's instructions are run: `kvm`, `emulation`; empty before there is one.
    pub accelerator: String,
    /// Where the guest can be reached: `hvsock://PATH` of a socket that takes `CONNECT PORT`, `vsock://CID`; empty before there is one.
    #[serde(default)]
    pub agent: String,
    /// The containers that are made.
    pub containers: Vec<String>,
    /// The pod's name, namespace and identity in Kubernetes; empty where it is none of its pods.
    #[serde(default)]
    pub kubernetes: Kubernetes,
}

/// A pod's name in Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Kubernetes {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its identity.
    pub uid: String,
}

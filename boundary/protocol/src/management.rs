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

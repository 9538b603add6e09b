//! A pod whose machine runs: what the verbs act on.

use std::collections::HashMap;
use std::path::PathBuf;

use coracle_machine::{GuestStream, Machine};
use coracle_process::Child;
use tokio::sync::Mutex;

use crate::agent::Agent;
use crate::devices::Devices;
use crate::forward::Forward;
use crate::mirror::Mirrors;
use crate::network::Network;
use crate::size::{Place, Range, Size};
use crate::user_network::Served;

/// See the module. It is shared by the futures that act on it; it has no state of its own, but what is taken once.
pub(crate) struct Pod {
    pub(crate) machine: Box<dyn Machine>,
    pub(crate) agent: Agent,
    /// Between which sizes the machine can be; none where it can't change.
    pub(crate) range: Option<Range>,
    /// The machine's size, held by who changes it; none where a change was not through.
    pub(crate) size: Mutex<Option<Size>>,
    /// The guest's swap, held by who adds some.
    pub(crate) swap_bytes: Mutex<u64>,
    /// Where on the host the machine runs; none where a change was not through.
    pub(crate) placed: Mutex<Option<Place>>,
    /// Held by who updates a container's limits, or resizes a volume.
    pub(crate) updates: Mutex<()>,
    /// The host's side of the folder that the guest sees. None where the machine shares no files.
    pub(crate) shared: Option<PathBuf>,
    /// The machine's disks.
    pub(crate) devices: Devices,
    /// Folders of which the guest has copies that follow them.
    pub(crate) mirrors: Mirrors,
    pub(crate) virtiofsd: Option<Child>,
    /// Whether its containers share memory in the guest.
    pub(crate) has_shm: bool,
    pub(crate) network: Option<Network>,
    /// Whether the machine gains and loses links while it runs.
    pub(crate) gains_links: bool,
    /// What serves the network of the host's user, where the pod has that.
    pub(crate) served: Option<Served>,
    /// Ports of the guest's loopback on the host; it ends with the pod.
    pub(crate) _forward: Option<Forward>,
    /// Kernel settings of the namespaces that its containers share. The guest's kernel keeps them, so it does no harm that
    /// every container brings them along.
    pub(crate) sysctls: HashMap<String, String>,
    /// Series that the guest has said figures of, by their hashes; held for a look.
    pub(crate) series: std::sync::Mutex<std::collections::HashSet<u64>>,
    /// Open for as long as the agent lives; the agent ends when it is closed.
    pub(crate) _lifeline: Mutex<GuestStream>,
}

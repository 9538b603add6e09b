//! The driver for QEMU.
//!
//! QEMU runs as a child with three helpers' worth of plumbing: its control channel (QMP) is a socket pair that it inherits,
//! its console is its standard output, and the guest's vsock is either the kernel's (`/dev/vhost-vsock`) or a server of our
//! own that QEMU reaches by vhost-user. Nothing is polled: sockets listen before the process that uses them starts.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod boot;
mod clock;
mod command;
mod devices;
mod events;
mod handed;
mod hotplug;
mod machine;
mod net;
mod place;
mod probe;
pub mod qmp;
mod resize;
mod vfio;
mod vsock;

use std::ffi::OsString;
use std::path::PathBuf;

use coracle_machine::{Accelerator, Balloon, Capabilities, DeviceKind, Driver, Machine, MachineSpec, Result};
use futures::future::BoxFuture;

pub use probe::{KvmState, probe_kvm};

/// QEMU's machine types that this driver knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineType {
    /// A PC with PCI Express.
    Q35,
    /// A machine of virtio-mmio devices, without PCI.
    Microvm,
}

impl MachineType {
    /// QEMU's name for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        }
    }
}

/// What the driver needs to know of its host.
#[derive(Debug, Clone)]
pub struct Config {
    /// QEMU's program.
    pub program: PathBuf,
    /// The machine type.
    pub machine_type: MachineType,
    /// What runs the instructions.
    pub accelerator: Accelerator,
    /// Program and first arguments of the vsock server; the driver adds the context identifier and the socket's path, and
    /// gives it two listening sockets as descriptors 3 (the monitor's) and 4 (host programs').
    pub vsock_server: Vec<OsString>,
    /// Whether the host kernel's vsock is used where it is there.
    pub kernel_vsock: bool,
    /// Whether QEMU runs as a user of its own and in namespaces of its own, where this process is root.
    pub jail: bool,
    /// More arguments for QEMU, from the administrator.
    pub extra_arguments: Vec<String>,
}

/// The driver.
#[derive(Debug)]
pub struct Qemu {
    config: Config,
}

impl Qemu {
    /// A driver that works as `config` says.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config }
    }
}

/// What a machine with PCI can gain and lose.
const HOTPLUGGED: [DeviceKind; 3] = [DeviceKind::Block, DeviceKind::Net, DeviceKind::Vfio];

impl Driver for Qemu {
    fn capabilities(&self, spec: &MachineSpec) -> Capabilities {
        let mut coldplug = vec![
            DeviceKind::Vsock,
            DeviceKind::Rng,
            DeviceKind::Balloon,
            DeviceKind::SharedFs,
            DeviceKind::Block,
            DeviceKind::Net,
            DeviceKind::NetStream,
            DeviceKind::NetUser,
        ];
        if vfio::is_possible(&self.config, spec) {
            coldplug.push(DeviceKind::Vfio);
        }
        Capabilities {
            coldplug,
            hotplug: if devices::has_hotplug(&self.config, spec) { HOTPLUGGED.to_vec() } else { Vec::new() },
            limits: vec![DeviceKind::Block],
            resize: command::can_grow(&self.config, spec),
            balloon: Balloon::of(spec).is_some(),
            pause: true,
            snapshot: false,
        }
    }

    fn boot(&self, spec: MachineSpec) -> BoxFuture<'_, Result<Box<dyn Machine>>> {
        Box::pin(async move {
            let machine = boot::boot(&self.config, spec).await?;
            Ok(Box::new(machine) as Box<dyn Machine>)
        })
    }
}

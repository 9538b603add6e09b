//! The driver for the built-in monitor: a child process that runs one machine under KVM.
//!
//! The driver opens whatever the machine needs of the host, and hands the monitor descriptors and a description
//! (`coracle-monitor-api`). The monitor is told what to do over a socket pair; its end is the machine's.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod boot;
mod control;
mod describe;
mod hotplug;
mod machine;
mod resize;
mod snapshot;
mod vfio;

use std::ffi::OsString;
use std::path::PathBuf;

use coracle_machine::{Balloon, Capabilities, DeviceKind, Driver, Machine, MachineSpec, Result, Sizes};
use futures::future::BoxFuture;

/// What the driver needs to know of its host.
#[derive(Debug, Clone)]
pub struct Config {
    /// The monitor's program and its first arguments.
    pub monitor: Vec<OsString>,
    /// Whether the monitor goes into its jail. Without it is for measurements only.
    pub jail: bool,
}

/// The driver.
#[derive(Debug)]
pub struct Builtin {
    config: Config,
}

impl Builtin {
    /// A driver that works as `config` says.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self { config }
    }
}

impl Driver for Builtin {
    fn capabilities(&self, spec: &MachineSpec) -> Capabilities {
        let mut coldplug = vec![DeviceKind::Vsock, DeviceKind::Rng, DeviceKind::Block, DeviceKind::Net];
        // A file server, and a device of the host's, reach all of the guest's memory; Linux's balloon lends none.
        let is_sealed = spec.access_platform;
        if !is_sealed {
            coldplug.extend([DeviceKind::SharedFs, DeviceKind::Vfio, DeviceKind::Balloon]);
        }
        if describe::has_files_as_memory(spec) {
            coldplug.push(DeviceKind::Pmem);
        }
        Capabilities {
            coldplug,
            hotplug: machine::hotplugged(spec),
            limits: machine::limited(),
            resize: !is_sealed && Sizes::of(spec).is_some(),
            balloon: Balloon::of(spec).is_some(),
            pause: true,
            snapshot: snapshot::obstacle(spec).is_none(),
        }
    }

    fn boot(&self, spec: MachineSpec) -> BoxFuture<'_, Result<Box<dyn Machine>>> {
        Box::pin(async move {
            let machine = boot::boot(&self.config, spec, None).await?;
            Ok(Box::new(machine) as Box<dyn Machine>)
        })
    }

    fn restore(&self, spec: MachineSpec, folder: PathBuf) -> BoxFuture<'_, Result<Box<dyn Machine>>> {
        Box::pin(async move {
            if let Some(obstacle) = snapshot::obstacle(&spec) {
                return Err(obstacle);
            }
            let machine = boot::boot(&self.config, spec, Some(&folder)).await?;
            Ok(Box::new(machine) as Box<dyn Machine>)
        })
    }
}

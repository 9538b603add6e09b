//! A machine that grows and shrinks: memory by virtio-mem, processors by ACPI.

use coracle_machine::{Error, MachineSpec, Sizes};
use coracle_monitor_api::{Answer, Request, Stats};

use crate::control::Client;
use crate::hotplug::Outcome;

/// A machine's size; held while it is changed.
#[derive(Debug)]
pub(crate) struct Size(Option<Sizes>);

impl Size {
    pub(crate) fn of(spec: &MachineSpec) -> Self {
        Self(Sizes::of(spec))
    }

    /// Makes it so.
    pub(crate) async fn change(&mut self, control: &Client, cpus: u32, memory_mib: u64) -> Outcome<()> {
        let sizes = self.0.as_ref().ok_or_else(|| Error::Unsupported("resizing".into()))?;
        let bytes = sizes.least_bytes() + sizes.gained_bytes(cpus, memory_mib)?;
        let now = stats(control).await?;
        // The guest needs memory for what its processors keep each: that comes first, and goes last.
        if bytes > now.memory_bytes {
            change_memory(control, bytes, now.memory_bytes).await?;
        }
        for _ in now.cpus..cpus {
            control.ask(&Request::AddProcessor).await?;
        }
        for _ in cpus..now.cpus {
            match tokio::time::timeout(Sizes::EJECT_PATIENCE, control.take_processor()).await {
                Ok(taken) => taken?,
                // It keeps it, and can be asked again.
                Err(_) => break,
            }
        }
        // Also where it has less already: it may still have been asked for more.
        if bytes <= now.memory_bytes {
            control.ask(&Request::ResizeMemory { bytes }).await?;
        }
        Ok(())
    }
}

async fn stats(control: &Client) -> Outcome<Stats> {
    match control.ask(&Request::Stats).await? {
        Answer::Stats(stats) => Ok(*stats),
        _ => Err(Error::Monitor("the monitor has not answered what it was asked".into()).into()),
    }
}

/// Has the guest take memory. What it is to give it gives by itself, when it can: nobody waits for that.
async fn change_memory(control: &Client, bytes: u64, mut has: u64) -> Outcome<()> {
    control.ask(&Request::ResizeMemory { bytes }).await?;
    let take = async {
        while has < bytes {
            match tokio::time::timeout(Sizes::PATIENCE, control.other_memory(has)).await {
                Ok(told) => has = told?,
                Err(_) => break,
            }
        }
        Ok(())
    };
    // A guest that goes up and down for ever is left alone.
    tokio::time::timeout(Sizes::PATIENCE_OVER_ALL, take).await.unwrap_or(Ok(()))
}

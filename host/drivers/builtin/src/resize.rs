//! A machine that grows and shrinks: memory by virtio-mem, processors by ACPI.

use coracle_machine::{Error, MachineSpec, Sizes};
use coracle_monitor_api::{Answer, Request, Stats};

use crate::control::Client;
use crate::hotplug::Outcome;

/// A machine's size; held while it is changed.
#[derive(Debug)]
pub(crate) struct Size {
    /// Those that it can have; none where it has one.
    sizes: Option<Sizes>,
    /// What the guest was last asked to have above the least, in bytes; none where another process has asked it.
    wanted_bytes: Option<u64>,
}

impl Size {
    /// Of a machine that has begun with its kernel, or where another was saved.
    pub(crate) fn of(spec: &MachineSpec, is_restored: bool) -> Self {
        let sizes = Sizes::of(spec).filter(|_| !spec.access_platform);
        Self { sizes, wanted_bytes: (!is_restored).then_some(0) }
    }

    /// Makes it so.
    pub(crate) async fn change(&mut self, control: &Client, cpus: u32, memory_mib: u64) -> Outcome<()> {
        let sizes = self.sizes.as_ref().ok_or_else(|| Error::Unsupported("resizing".into()))?;
        let wanted = sizes.gained_bytes(cpus, memory_mib)?;
        let bytes = sizes.least_bytes() + wanted;
        // The guest needs memory for what its processors keep each: that comes first, and goes last.
        let before = match self.wanted_bytes {
            Some(bytes) => bytes,
            None => stats(control).await?.memory_bytes.saturating_sub(sizes.least_bytes()),
        };
        if wanted > before {
            control.ask(&Request::ResizeMemory { bytes }).await?;
            self.wanted_bytes = Some(wanted);
            memory_comes(control, bytes).await?;
        }
        let has = stats(control).await?.cpus;
        for _ in has..cpus {
            control.ask(&Request::AddProcessor).await?;
        }
        take_processors(control, has, cpus).await?;
        if wanted < before {
            // What is in use the guest can't give, and tries again by itself for as long as less is wanted: nobody waits for that.
            control.ask(&Request::ResizeMemory { bytes }).await?;
            self.wanted_bytes = Some(wanted);
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

/// Has the guest let go of processors, one after the other, until it keeps one or has as many as it is to have.
async fn take_processors(control: &Client, mut has: u32, cpus: u32) -> Outcome<()> {
    while has > cpus {
        match tokio::time::timeout(Sizes::EJECT_PATIENCE, control.take_processor()).await {
            // Fewer each time, whatever the monitor says.
            Ok(left) => has = left?.min(has - 1),
            // It keeps it, for good: who asks for so many later must not be taken one of them.
            Err(_) => {
                control.ask(&Request::KeepProcessors).await?;
                break;
            }
        }
    }
    Ok(())
}

/// Waits until the guest has so much memory, or takes no more.
async fn memory_comes(control: &Client, bytes: u64) -> Outcome<()> {
    let take = async {
        let mut has = stats(control).await?.memory_bytes;
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

//! The port: what the sandbox asks of a machine monitor, and what it may expect.
//!
//! A [`Driver`] boots a [`MachineSpec`] and gives a [`Machine`]. The specification holds all devices that the machine has
//! from its start, so no driver keeps a queue. What a machine can do is said by [`Capabilities`] before anything is planned;
//! what it can't is answered [`Error::Unsupported`], never Ok. The port knows no container, no setting and no protocol.

mod address;
mod balloon;
pub mod console;
pub mod contract;
mod ends;
mod error;
pub mod fake;
mod pci;
mod sizes;
mod spec;

use std::path::PathBuf;

use futures::future::BoxFuture;

pub use address::{AgentAddress, GuestListener, GuestStream};
pub use balloon::Balloon;
pub use ends::{Ends, unsupported};
pub use error::Error;
pub use pci::{NoAddress, PciAddress};
pub use sizes::Sizes;
pub use spec::{
    Accelerator, Architecture, Capabilities, Cpus, Descriptor, Device, DeviceKind, Forward, Kernel, KernelForm, Limits,
    MachineSpec, Memory, MemoryKind, NET_QUEUES_MAX, NETS_MAX, Platform, Rate, mac_text,
};

/// What the port gives back.
pub type Result<T> = std::result::Result<T, Error>;

/// Starts machines of one kind.
pub trait Driver: Send + Sync {
    /// What a machine of this driver with this specification can do.
    fn capabilities(&self, spec: &MachineSpec) -> Capabilities;

    /// Starts a machine. When the future is dropped, nothing of the machine is left.
    fn boot(&self, spec: MachineSpec) -> BoxFuture<'_, Result<Box<dyn Machine>>>;

    /// Starts a machine where another stood when it was saved into `folder` ([`Machine::save`]). The specification is that machine's, with a
    /// folder, disks, taps and places on the host of its own: disks have what the saved one's had when it was saved. Kernel and RAM disk
    /// are not looked at. The same folder serves any number of machines, at once too, and must stay as it is while one of them is there.
    ///
    /// The guest finds its connections reset, another generation of its machine, and its clock where it stood: whoever restores it sets
    /// the clock. It greets anew.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the specification is no machine's that can be saved; [`Error::Missing`] where the folder does not hold
    /// such a machine, is of another version or another host's processors, or was changed.
    fn restore(&self, spec: MachineSpec, folder: PathBuf) -> BoxFuture<'_, Result<Box<dyn Machine>>> {
        let _ = (spec, folder);
        unsupported("restoring a machine")
    }
}

/// A machine that was started.
///
/// Dropping it ends it. All verbs but `wait` are quick or bounded by the caller.
pub trait Machine: Send + Sync {
    /// Where the agent in the guest can be reached.
    fn agent_address(&self) -> &AgentAddress;

    /// The next connection that the guest opens to say that it serves. Only this machine's guest can open one.
    fn guest_connection(&self) -> BoxFuture<'_, Result<GuestStream>>;

    /// Adds a device to the running machine. It gives where the guest finds it on its PCI bus, where it is on one: the slot of each
    /// bridge on the way and then its own, from the root on, in hexadecimal: `1e/04`.
    fn attach(&self, device: Device) -> BoxFuture<'_, Result<Option<String>>>;

    /// Where the guest finds a device that the machine has from its start, as [`Self::attach`] gives it; none where that is not known.
    fn place_of(&self, device: &Device) -> Option<String> {
        let _ = device;
        None
    }

    /// Takes a device out.
    fn detach(&self, device: Device) -> BoxFuture<'_, Result<()>>;

    /// Gives a disk of the machine so many bytes, and no fewer than it has: the host's file grows with it, and the guest hears of it.
    fn resize_disk(&self, disk: Device, bytes: u64) -> BoxFuture<'_, Result<()>>;

    /// Holds a device of the machine to these rates from now on, in the place of those before.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a kind that the capabilities do not name; [`Error::Invalid`] where the machine has no such device.
    fn limit(&self, device: Device, limits: Limits) -> BoxFuture<'_, Result<()>>;

    /// Changes processors and memory, within what the specification has at most and not below what it has from the start. It ends
    /// when the guest has taken what was asked for, or takes no more of it. Memory that it is to give it gives by itself, when it can;
    /// what there is [`Self::stats`] says. The guest still has to turn new processors on.
    fn resize(&self, cpus: u32, memory_mib: u64) -> BoxFuture<'_, Result<()>>;

    /// Lets the machine run on these processors of the host alone; on any where there are none. A machine whose specification says where
    /// it runs stays there.
    fn place(&self, host_cpus: Vec<u32>) -> BoxFuture<'_, Result<()>>;

    /// Stops the processors.
    fn pause(&self) -> BoxFuture<'_, Result<()>>;

    /// Lets them go on.
    fn resume(&self) -> BoxFuture<'_, Result<()>>;

    /// Saves the machine into `folder`, which is made: processors, devices and memory, for [`Driver::restore`]. It stands still meanwhile
    /// and goes on after that, if it ran; what it has on disks stays with them, and is not copied. Whatever changes its size or its
    /// devices waits.
    ///
    /// # Errors
    /// [`Error::Unsupported`], before it is touched, of a machine that can't be saved, or whose devices are no more those of its start.
    /// Where it fails, as on a full disk, nothing is left in `folder`, and the machine goes on.
    fn save(&self, folder: PathBuf) -> BoxFuture<'_, Result<()>> {
        let _ = folder;
        unsupported("saving it")
    }

    /// Asks the guest to leave so many bytes of its memory to the host, with the device [`Device::Balloon`]; 0 gives all of it back. It is a
    /// wish: what the guest leaves is told by [`Stats::balloon_bytes`], and a guest that would have to kill a process for want of memory takes
    /// back what it needs. It is beside the machine's size, which stays.
    ///
    /// # Errors
    /// [`Error::Unsupported`] of a machine without that device, [`Error::Invalid`] where nothing would be left.
    fn balloon(&self, bytes: u64) -> BoxFuture<'_, Result<()>> {
        let _ = bytes;
        unsupported("a balloon")
    }

    /// What the machine has used.
    fn stats(&self) -> BoxFuture<'_, Result<Stats>>;

    /// Waits for the machine's end, whatever brings it. Any number of callers may wait.
    fn wait(&self) -> BoxFuture<'static, End>;

    /// Ends the machine, and waits until nothing of it is left.
    fn stop(&self) -> BoxFuture<'_, Result<()>>;

    /// The last lines of the guest's console.
    fn console(&self, lines: usize) -> Vec<String>;

    /// How the machine is run.
    fn accelerator(&self) -> Accelerator;
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// What happened, for people: "the guest's kernel panicked", "qemu was killed by signal 9".
    pub reason: String,
}

/// What a machine has used.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// Memory that the guest has, in bytes.
    pub memory_bytes: u64,
    /// Of it, what the guest has left to the host, by its own words ([`Machine::balloon`]).
    pub balloon_bytes: u64,
    /// Processors that the guest has.
    pub cpus: u32,
    /// Figures that the monitor counts itself, by name: `exits_mmio_read`, `vsock_bytes_in`, `cpu0_nanoseconds`. Counts since
    /// its start. Empty where it counts none.
    pub monitor: std::collections::BTreeMap<String, u64>,
}

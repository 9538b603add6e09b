//! What a device is to whoever runs it: a transport that shows it to the guest, and a loop that tells it of events.
//!
//! A device never waits. The loop calls it when a queue's doorbell was rung or one of its descriptors has something, and it
//! does a bounded piece of work each time, so that no device can hold up another.

use std::os::fd::BorrowedFd;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::limit::Limits;
use crate::ring::Ring;

/// The guest's memory as devices see it: it may grow.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// `VIRTIO_F_VERSION_1`.
pub const VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_ACCESS_PLATFORM`: the device reaches no more of the guest's memory than what the guest lends it.
pub const ACCESS_PLATFORM: u64 = 1 << 33;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub const EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub const INDIRECT_DESC: u64 = 1 << 28;

/// Why a device works no more until the guest resets it (`DEVICE_NEEDS_RESET`, virtio 1.3, section 2.1): the guest has
/// written nonsense, or what is behind the device has failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub String);

impl Broken {
    /// With a text that says what broke.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl From<virtio_queue::Error> for Broken {
    fn from(error: virtio_queue::Error) -> Self {
        Self(format!("the guest's queue is not usable: {error}"))
    }
}

/// What a turn of work has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Turn {
    /// Nothing: the next event will tell.
    Done,
    /// More than one turn may do. The loop comes back without another event.
    More,
}

/// A descriptor that a device wants watched.
#[derive(Debug)]
pub struct Source<'a> {
    /// What [`Device::on_source`] is told.
    pub token: u16,
    /// The descriptor.
    pub fd: BorrowedFd<'a>,
    /// Whether only changes wake (edge-triggered): for a descriptor that stays readable while the guest has no buffers.
    pub edge: bool,
}

/// What a device gets when the guest's driver is ready.
#[derive(Debug)]
pub struct Activation {
    /// The features that the driver has taken.
    pub features: u64,
    /// The guest's memory.
    pub memory: Memory,
    /// The queues by their index; `None` for one that the driver has not enabled.
    pub rings: Vec<Option<Ring>>,
}

impl Activation {
    /// The queue of a device that has one.
    ///
    /// # Errors
    /// [`Broken`] where the driver has not enabled it.
    pub(crate) fn only_ring(&mut self) -> Result<Ring, Broken> {
        let ring = std::mem::take(&mut self.rings).into_iter().next().flatten();
        ring.ok_or_else(|| Broken::new("the driver runs without its queue"))
    }
}

/// What has passed through a device since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Requests or packets from the guest.
    pub operations_out: u64,
    /// Their bytes.
    pub bytes_out: u64,
    /// Answers or packets to the guest.
    pub operations_in: u64,
    /// Their bytes.
    pub bytes_in: u64,
    /// What was refused or dropped.
    pub errors: u64,
}

/// A device.
///
/// It gives chains back in the order in which it takes them. So the index of what it has given back says where a saved machine's device
/// goes on: what it had taken and not given back, the one that takes its place takes again.
pub trait Device: Send {
    /// Its name in figures and messages.
    fn name(&self) -> &'static str;

    /// Its number (virtio 1.3, section 5).
    fn id(&self) -> u16;

    /// Its own features; those of the transport and the rings are added.
    fn features(&self) -> u64;

    /// The features of the rings that whoever serves them can deal with.
    fn ring_features(&self) -> u64 {
        EVENT_IDX | INDIRECT_DESC
    }

    /// The most entries of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Its configuration space.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// The guest writes to the configuration space. Most devices have nothing there to write.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready.
    ///
    /// # Errors
    /// [`Broken`] where it asks for what can't be.
    fn activate(&mut self, activation: Activation) -> Result<(), Broken>;

    /// What is to be watched beside the queues' doorbells, once it is active.
    fn sources(&self) -> Vec<Source<'_>> {
        Vec::new()
    }

    /// Whether another process, or the kernel, hears a queue's doorbell and serves it.
    fn served_elsewhere(&self, queue: u16) -> bool {
        let _ = queue;
        false
    }

    /// The doorbell of a queue was rung.
    ///
    /// # Errors
    /// [`Broken`].
    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken>;

    /// A source has something.
    ///
    /// # Errors
    /// [`Broken`].
    fn on_source(&mut self, token: u16) -> Result<Turn, Broken> {
        let _ = token;
        Ok(Turn::Done)
    }

    /// The queue whose doorbell brings the loop back to a source that has more than one turn may do.
    fn queue_of(&self, token: u16) -> u16 {
        let _ = token;
        0
    }

    /// Back to the state before activation. Nothing of the guest's memory may be touched after this.
    fn reset(&mut self);

    /// What it knows beside its driver's registers and rings, for a machine that is saved: another device of its kind takes it by
    /// [`Self::restore`]. Of most that is their configuration, which must be the same. None of one that can't be saved: others know, too.
    fn save(&self) -> Option<Vec<u8>> {
        Some(self.config().to_vec())
    }

    /// Takes what such a device knew. It is not active, and has just been made. The bytes may be anything.
    ///
    /// # Errors
    /// [`Broken`] where they can't be this device's.
    fn restore(&mut self, saved: &[u8]) -> Result<(), Broken> {
        if saved == self.config() {
            return Ok(());
        }
        Err(Broken(format!("this {} differs from the one that was saved (its size, its address)", self.name())))
    }

    /// It was activated where another stood when the machine was saved.
    ///
    /// # Errors
    /// [`Broken`].
    fn resumed(&mut self) -> Result<(), Broken> {
        Ok(())
    }

    /// Gives what is behind it so many bytes. Its configuration has changed after this.
    ///
    /// # Errors
    /// [`std::io::ErrorKind::InvalidInput`] where it has more, or can't have so many; [`std::io::ErrorKind::Unsupported`] where it has no size;
    /// else the kernel's.
    fn resize(&mut self, bytes: u64) -> std::io::Result<()> {
        let _ = bytes;
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// Lets it do no more than this in a second from now on.
    ///
    /// # Errors
    /// [`std::io::ErrorKind::Unsupported`] where it can't be limited; else the kernel's.
    fn limit(&mut self, limits: Limits) -> std::io::Result<()> {
        let _ = limits;
        Err(std::io::ErrorKind::Unsupported.into())
    }

    /// What the guest's driver says of itself, by name. It may be anything.
    ///
    /// # Errors
    /// [`Broken`].
    fn figures(&mut self) -> Result<Vec<(&'static str, u64)>, Broken> {
        Ok(Vec::new())
    }

    /// What has passed.
    fn counters(&self) -> Counters {
        Counters::default()
    }
}

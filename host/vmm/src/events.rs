//! The loop that serves devices: one epoll, and the thread that waits at it.
//!
//! A device is put on a loop when its driver is ready and taken off when it is reset; processors do that, on their own
//! threads. An event that was read before a device was taken off finds it inactive, or gone, and does nothing.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use coracle_virtio::device::{Broken, Turn};
use coracle_virtio::ring::borrowed;
use rustix::event::epoll::{self, EventData, EventFlags};

use crate::Error;
use coracle_virtio::transport::Transport;

use crate::pci::{Bus, Function, Outcome, Place};

/// What an event is for, as epoll keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// The doorbell of a device's queue.
    Doorbell(u16, u16),
    /// A source of a device.
    Source(u16, u16),
    /// Something of the loop's owner.
    Own(u16),
}

impl Key {
    fn encode(self) -> EventData {
        let (kind, slot, number) = match self {
            Self::Doorbell(slot, queue) => (0, slot, queue),
            Self::Source(slot, token) => (1, slot, token),
            Self::Own(number) => (2, 0, number),
        };
        EventData::new_u64(kind << 32 | u64::from(slot) << 16 | u64::from(number))
    }

    fn decode(data: EventData) -> Self {
        let [low, high, slot_low, slot_high, kind, ..] = data.u64().to_le_bytes();
        let (number, slot) = (u16::from_le_bytes([low, high]), u16::from_le_bytes([slot_low, slot_high]));
        match kind {
            0 => Self::Doorbell(slot, number),
            1 => Self::Source(slot, number),
            _ => Self::Own(number),
        }
    }
}

/// The events that are watched.
#[derive(Debug, Clone)]
pub(crate) struct Watch(Arc<OwnedFd>);

impl Watch {
    pub(crate) fn new() -> Result<Self, Error> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(Error::system("make an epoll"))?;
        Ok(Self(Arc::new(epoll)))
    }

    /// Whether both are the same loop.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Watches a descriptor of the owner's.
    pub(crate) fn add_own(&self, number: u16, fd: impl AsFd) -> Result<(), Error> {
        epoll::add(&*self.0, fd, Key::Own(number).encode(), EventFlags::IN).map_err(Error::system("watch a descriptor"))
    }

    /// Watches an active device, or watches it no more.
    pub(crate) fn follow(&self, slot: u16, function: &mut dyn Function, outcome: &Outcome) {
        let Some(transport) = function.transport() else { return };
        match outcome {
            Outcome::None => {}
            // Reset meanwhile by another processor: there is nothing to watch.
            Outcome::Watch if !transport.is_active() => {}
            Outcome::Watch => {
                if let Err(error) = self.add(slot, transport) {
                    let broken = Broken(format!("its events can't be watched: {error}"));
                    self.remove(transport);
                    transport.needs_reset(&broken);
                }
            }
            Outcome::Forget => self.remove(transport),
        }
    }

    fn add(&self, slot: u16, transport: &Transport) -> std::io::Result<()> {
        let is_own = |queue: &u16| !transport.device_ref().served_elsewhere(*queue);
        for (doorbell, queue) in transport.doorbells().iter().zip(0..).filter(|(_, queue)| is_own(queue)) {
            let key = Key::Doorbell(slot, queue).encode();
            epoll::add(&*self.0, borrowed(doorbell), key, EventFlags::IN | EventFlags::ET)?;
            // What the driver made available before it was ready it need not ring for again.
            doorbell.write(1)?;
        }
        for source in transport.device_ref().sources() {
            let edge = if source.edge { EventFlags::ET } else { EventFlags::empty() };
            epoll::add(&*self.0, source.fd, Key::Source(slot, source.token).encode(), EventFlags::IN | edge)?;
        }
        Ok(())
    }

    /// Takes off what is on. What is not on is no error: a device that was never active is reset, too.
    fn remove(&self, transport: &Transport) {
        for doorbell in transport.doorbells() {
            let _ = epoll::delete(&*self.0, borrowed(doorbell));
        }
        for source in transport.device_ref().sources() {
            let _ = epoll::delete(&*self.0, source.fd);
        }
    }

    /// Waits for events, serves the devices of `bus`, and gives the owner's events to `own` until that returns false.
    pub(crate) fn run(&self, bus: &Bus, mut own: impl FnMut(u16) -> bool) -> Result<(), Error> {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(32);
        loop {
            match epoll::wait(&*self.0, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(Error::system("wait for events")(error)),
            }
            for event in events.drain(..) {
                match Key::decode(event.data) {
                    Key::Own(number) => {
                        if !own(number) {
                            return Ok(());
                        }
                    }
                    Key::Doorbell(slot, queue) => {
                        self.serve(bus, slot, |device| Ok((device.on_queue(queue)?, queue)));
                    }
                    Key::Source(slot, token) => {
                        self.serve(bus, slot, |device| Ok((device.on_source(token)?, device.queue_of(token))))
                    }
                }
            }
        }
    }

    fn serve(
        &self,
        bus: &Bus,
        slot: u16,
        work: impl FnOnce(&mut dyn coracle_virtio::device::Device) -> Result<(Turn, u16), Broken>,
    ) {
        let Some(slot) = bus.slots().get(usize::from(slot)) else { return };
        let mut place = slot.place();
        // One that has gone meanwhile; or another in its place, which may be another loop's to serve.
        let own = place.as_mut().filter(|place| place.watch.is(self));
        let Some(transport) = own.and_then(|Place { function, .. }| function.transport()) else { return };
        if !transport.is_active() {
            return;
        }
        match work(transport.device()) {
            Ok((Turn::Done, _)) => {}
            Ok((Turn::More, queue)) => {
                // By way of the doorbell, so that the other devices have their turns in between.
                let bell = transport.doorbells().get(usize::from(queue));
                if let Some(bell) = bell {
                    let _ = bell.write(1);
                }
            }
            Err(broken) => {
                self.remove(transport);
                transport.needs_reset(&broken);
            }
        }
    }
}

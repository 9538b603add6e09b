//! PCI: one bus, on which each device has message-signalled interrupts. Most are virtio devices (virtio 1.3, section 4.1); some are the
//! host's own ([`crate::vfio`]).
//!
//! ```text
//! guest ── ECAM ──▶ Bus ─▶ Function ─┬─ ConfigSpace   what it is, where its registers are
//!       ── BAR ───▶                  ├─ Msix          its interrupts
//!                                    └─ Transport     the device's registers (coracle-virtio)
//! ```

mod config;
mod msix;
mod virtio;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use coracle_virtio::transport::{Saved as SavedTransport, Transport};
use serde::{Deserialize, Serialize};

use msix::Saved as SavedMsix;
pub(crate) use msix::{ENTRY_BYTES, Msix};
pub(crate) use virtio::{BAR_BYTES, Virtio};
#[cfg(feature = "fuzzing")]
pub(crate) use virtio::{NOTIFY, NOTIFY_BYTES};

use coracle_virtio::device::Broken;

use crate::Error;
use crate::arch::layout;
use crate::events::Watch;

/// Devices of a bus, by the number that the guest knows.
const DEVICES: u8 = 32;
/// The first number that devices get. 0 stays free, as a host bridge's place.
const FIRST: u8 = 1;

/// BARs of a device (PCI 3.0, section 6.2.5).
pub(crate) const BARS: usize = 6;

/// Where the guest has put a part of a device's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Bar {
    /// 0 where they are not answered.
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// What whoever runs a device's loop must do.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Outcome {
    /// Nothing.
    None,
    /// Watch the device.
    Watch,
    /// Watch it no more.
    Forget,
}

/// A device as the guest has set it up, for a machine that is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    config: Vec<u8>,
    msix: SavedMsix,
    transport: SavedTransport,
}

/// A PCI device as its bus sees it. Widths and places of accesses are the guest's choice: what makes no sense reads as zeros, and changes
/// nothing.
pub(crate) trait Function: Send {
    /// Its name in messages.
    fn name(&self) -> &'static str;

    /// The registers of a virtio device; none of another.
    fn transport(&mut self) -> Option<&mut Transport>;

    /// The interrupts, to look at.
    #[cfg(feature = "fuzzing")]
    fn msix(&self) -> Option<&Msix>;

    /// Puts the registers at an address of the bus's window, as firmware does, where there is room for [`BAR_BYTES`]. Who needs more is put
    /// somewhere by the guest's kernel.
    fn place(&mut self, address: u64);

    /// Where its registers are answered.
    fn bars(&self) -> [Bar; BARS];

    fn read_config(&mut self, at: u16, data: &mut [u8]);

    fn write_config(&mut self, at: u16, data: &[u8]) -> Outcome;

    /// The device as it is; none of one that can't be saved. Nobody may serve it meanwhile.
    fn save(&self) -> Option<Saved> {
        None
    }

    /// Takes the place of a saved device. It is of no use any more where that fails.
    ///
    /// # Errors
    /// Where it can't be that device.
    fn restore(&mut self, saved: &Saved) -> Result<Outcome, Broken> {
        let _ = saved;
        Err(Broken::new("a device of the host's can't be another machine's"))
    }

    /// Reads a BAR's registers, at an offset in it.
    fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> Outcome;
}

/// A place on the bus.
pub(crate) struct Slot {
    /// Where the guest has put the device's registers: start and bytes. Outside of the lock, so that an access to one device never waits
    /// for another; a processor that sees one of a pair alone is one that has not waited for the other's write.
    bars: [(AtomicU64, AtomicU64); BARS],
    /// Whether the slot is some device's: from its coming until whoever waits for its end was told. Outside of the lock, too: a disk that is
    /// waited for holds up nobody who looks for a free slot.
    is_taken: AtomicBool,
    /// Processors and the device's loop both work on it, each for a bounded time.
    place: Mutex<Option<Place>>,
}

/// A device in its slot.
pub(crate) struct Place {
    /// The device.
    pub(crate) function: Box<dyn Function>,
    /// The loop that serves it.
    pub(crate) watch: Watch,
}

impl Place {
    /// Does on the loop what a write of the guest's to the device in this slot has brought.
    fn follow(&mut self, slot: usize, outcome: &Outcome) {
        if let Ok(slot) = u16::try_from(slot) {
            self.watch.follow(slot, &mut *self.function, outcome);
        }
    }
}

impl Slot {
    /// Where the first of them is answered.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn bar(&self) -> u64 {
        self.bars.first().map_or(0, |(start, _)| start.load(Ordering::Acquire))
    }

    fn set(&self, bars: [Bar; BARS]) {
        for ((start, bytes), bar) in self.bars.iter().zip(bars) {
            // Nobody finds it at its new place with its old size.
            start.store(0, Ordering::Release);
            bytes.store(bar.bytes, Ordering::Release);
            start.store(bar.start, Ordering::Release);
        }
    }

    /// The BAR that an address is in, and the offset.
    fn in_bar(&self, address: u64) -> Option<(usize, u64)> {
        self.bars.iter().enumerate().find_map(|(number, (start, bytes))| {
            let start = start.load(Ordering::Acquire);
            let offset = address.checked_sub(start).filter(|offset| *offset < bytes.load(Ordering::Acquire))?;
            (start != 0).then_some((number, offset))
        })
    }

    /// The device, where there is one.
    pub(crate) fn place(&self) -> MutexGuard<'_, Option<Place>> {
        // A panic ends the process: there is nobody left to see a half-changed device.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The slot that the guest knows by a number.
fn slot_of(number: u8) -> Option<usize> {
    number.checked_sub(FIRST).filter(|_| number < DEVICES).map(usize::from)
}

/// The bus. It has all its slots from the start.
pub(crate) struct Bus {
    slots: Vec<Slot>,
}

impl Bus {
    /// A bus with these devices, in this order.
    pub(crate) fn new(places: Vec<Place>) -> Result<Self, Error> {
        let slot = |_| Slot { bars: Default::default(), is_taken: AtomicBool::new(false), place: Mutex::new(None) };
        let bus = Self { slots: (FIRST..DEVICES).map(slot).collect() };
        for place in places {
            bus.insert(place)?;
        }
        Ok(bus)
    }

    /// Puts a device into the first free slot; gives the number by which the guest finds it.
    ///
    /// # Errors
    /// Where there is none.
    pub(crate) fn insert(&self, mut place: Place) -> Result<u8, Error> {
        for (slot, number) in self.slots.iter().zip(FIRST..) {
            if !slot.is_taken.swap(true, Ordering::AcqRel) {
                place.function.place(layout::PCI_WINDOW + u64::from(number - FIRST) * BAR_BYTES);
                *slot.place() = Some(place);
                return Ok(number);
            }
        }
        Err(Error::Invalid(format!("a machine can have {} devices", DEVICES - FIRST)))
    }

    /// Takes a device out: it is watched no more, and all of it goes. Its slot stays taken until it is released. Whether there was one.
    pub(crate) fn remove(&self, number: u8) -> bool {
        let Some((index, slot)) = slot_of(number).and_then(|index| Some((index, self.slots.get(index)?))) else {
            return false;
        };
        let mut place = slot.place();
        slot.set([Bar::default(); BARS]);
        let found = place.take();
        let was_there = found.is_some();
        if let Some(mut place) = found {
            place.follow(index, &Outcome::Forget);
        }
        was_there
    }

    /// Lets another device have the slot: everybody knows that the one that was there has gone.
    pub(crate) fn release(&self, number: u8) {
        if let Some(slot) = self.slot(number) {
            slot.is_taken.store(false, Ordering::Release);
        }
    }

    /// Holds all devices still until what is given is dropped.
    pub(crate) fn hold(&self) -> Vec<MutexGuard<'_, Option<Place>>> {
        self.slots.iter().map(Slot::place).collect()
    }

    /// Puts each device in the place of that which was saved in its slot, and has its loop serve it.
    ///
    /// # Errors
    /// Where the devices are not those that were saved.
    pub(crate) fn restore(&self, saved: &[Option<Saved>]) -> Result<(), Error> {
        if saved.len() != self.slots.len() {
            return Err(Error::Invalid(format!("a machine with {} slots was saved", saved.len())));
        }
        for ((index, slot), saved) in self.slots.iter().enumerate().zip(saved) {
            let mut place = slot.place();
            let (place, saved) = match (place.as_mut(), saved) {
                (Some(place), Some(saved)) => (place, saved),
                (None, None) => continue,
                (found, _) => {
                    let (this, that) = if found.is_some() { ("has a", "had none") } else { ("has no", "had one") };
                    let number = index + usize::from(FIRST);
                    return Err(Error::Invalid(format!(
                        "the machine {this} device {number}; that which was saved {that}"
                    )));
                }
            };
            let outcome = place.function.restore(saved).map_err(|broken| {
                Error::Invalid(format!(
                    "the machine's device {} is not the one that was saved: {broken}",
                    index + usize::from(FIRST)
                ))
            })?;
            slot.set(place.function.bars());
            place.follow(index, &outcome);
        }
        Ok(())
    }

    /// The slots.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The slot that the guest knows by this number.
    pub(crate) fn slot(&self, number: u8) -> Option<&Slot> {
        self.slots.get(slot_of(number)?)
    }

    /// The slot and the register that an address in ECAM means (PCI Express 5.0, section 7.2.2).
    fn in_ecam(&self, address: u64) -> Option<(usize, &Slot, u16)> {
        let offset = address.checked_sub(layout::ECAM).filter(|offset| *offset < layout::ECAM_BYTES)?;
        let (number, function) = (u8::try_from(offset >> 15).ok()?, offset >> 12 & 7);
        let index = slot_of(number).filter(|_| function == 0)?;
        Some((index, self.slots.get(index)?, u16::try_from(offset & 0xfff).ok()?))
    }

    /// The slot whose device's registers an address is in, and the BAR and the offset.
    fn in_bar(&self, address: u64) -> Option<(usize, &Slot, (usize, u64))> {
        let mut slots = self.slots.iter().enumerate();
        slots.find_map(|(index, slot)| Some((index, slot, slot.in_bar(address)?)))
    }

    /// The guest reads. What is nobody's reads as ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((_, slot, register)) = self.in_ecam(address) {
            if let Some(place) = slot.place().as_mut() {
                place.function.read_config(register, data);
            }
        } else if let Some((_, slot, (bar, offset))) = self.in_bar(address)
            && let Some(place) = slot.place().as_mut()
        {
            place.function.read(bar, offset, data);
        }
    }

    /// The guest writes, and the device's loop does what it wants of it. Whether the device is watched from now on.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> bool {
        let (index, mut place, outcome);
        if let Some((at, slot, register)) = self.in_ecam(address) {
            (index, place) = (at, slot.place());
            let Some(found) = place.as_mut() else { return false };
            outcome = found.function.write_config(register, data);
            slot.set(found.function.bars());
        } else {
            let Some((at, slot, (bar, offset))) = self.in_bar(address) else { return false };
            (index, place) = (at, slot.place());
            let Some(found) = place.as_mut() else { return false };
            outcome = found.function.write(bar, offset, data);
        }
        if let Some(place) = place.as_mut() {
            place.follow(index, &outcome);
        }
        outcome == Outcome::Watch
    }
}

//! PCI: one bus, on which each device is a virtio device with message-signalled interrupts (virtio 1.3, section 4.1).
//!
//! ```text
//! guest ── ECAM ──▶ Bus ─▶ Function ─┬─ ConfigSpace   what it is, where its registers are
//!       ── BAR ───▶                  ├─ Msix          its interrupts
//!                                    └─ Transport     the device's registers (coracle-virtio)
//! ```

mod config;
mod function;
mod msix;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) use function::{BAR_BYTES, Function, Outcome};
#[cfg(feature = "fuzzing")]
pub(crate) use function::{NOTIFY, NOTIFY_BYTES};

use crate::Error;
use crate::arch::layout;

/// Devices of a bus.
const SLOTS: usize = 32;
/// The first slot that devices get. Slot 0 stays free, as a host bridge's place.
const FIRST_SLOT: usize = 1;

/// A place on the bus with a device.
pub(crate) struct Slot {
    /// Where the guest has put the device's registers; 0 while it has not. Outside of the lock, so that an access to one
    /// device never waits for another.
    bar: AtomicU64,
    /// Processors and the device's loop both work on it, each for a bounded time.
    function: Mutex<Function>,
}

impl Slot {
    /// Where its registers are answered.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn bar(&self) -> u64 {
        self.bar.load(Ordering::Acquire)
    }

    /// The device.
    pub(crate) fn function(&self) -> MutexGuard<'_, Function> {
        // A panic ends the process: there is nobody left to see a half-changed device.
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bus.
pub(crate) struct Bus {
    slots: Vec<Slot>,
}

impl Bus {
    /// A bus with these devices.
    pub(crate) fn new(functions: Vec<Function>) -> Result<Self, Error> {
        if functions.len() > SLOTS - FIRST_SLOT {
            return Err(Error::Invalid(format!("a machine can have {} devices", SLOTS - FIRST_SLOT)));
        }
        let mut slots = Vec::with_capacity(functions.len());
        for (mut function, number) in functions.into_iter().zip(0_u64..) {
            function.place(layout::PCI_WINDOW + number * BAR_BYTES);
            slots.push(Slot { bar: AtomicU64::new(0), function: Mutex::new(function) });
        }
        Ok(Self { slots })
    }

    /// The devices.
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// The device and the register that an address in ECAM means (PCI Express 5.0, section 7.2.2).
    fn in_ecam(&self, address: u64) -> Option<(&Slot, u16)> {
        let offset = address.checked_sub(layout::ECAM).filter(|offset| *offset < layout::ECAM_BYTES)?;
        let (device, function) = (usize::try_from(offset >> 15).ok()?, offset >> 12 & 7);
        let slot = self.slots.get(device.checked_sub(FIRST_SLOT)?).filter(|_| function == 0)?;
        Some((slot, u16::try_from(offset & 0xfff).ok()?))
    }

    /// The device whose registers an address is in, its number, and the offset.
    fn in_bar(&self, address: u64) -> Option<(usize, &Slot, u64)> {
        self.slots.iter().enumerate().find_map(|(number, slot)| {
            let start = slot.bar.load(Ordering::Acquire);
            let offset = address.checked_sub(start).filter(|offset| start != 0 && *offset < BAR_BYTES)?;
            Some((number, slot, offset))
        })
    }

    /// The guest reads. What is nobody's reads as ones.
    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        if let Some((slot, register)) = self.in_ecam(address) {
            slot.function().read_config(register, data);
        } else if let Some((_, slot, offset)) = self.in_bar(address) {
            slot.function().read(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// The guest writes. The device that wants something of its loop after that, and what.
    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Option<(usize, Outcome)> {
        if let Some((slot, register)) = self.in_ecam(address) {
            let mut function = slot.function();
            let outcome = function.write_config(register, data);
            slot.bar.store(function.decoded(), Ordering::Release);
            let number = self.slots.iter().position(|other| std::ptr::eq(other, slot))?;
            return Some((number, outcome));
        }
        let (number, slot, offset) = self.in_bar(address)?;
        let outcome = slot.function().write(offset, data);
        Some((number, outcome))
    }
}

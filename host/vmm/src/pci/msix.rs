//! The table of message-signalled interrupts (PCI 3.0, section 6.8.2).

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::irq::{Message, Vector};

/// Bytes of an entry: address, data, control.
pub(crate) const ENTRY_BYTES: u64 = 16;
/// Of the control word: this vector is masked.
const MASKED: u32 = 1;
/// Of the capability's control word: all are masked; all are enabled.
const FUNCTION_MASKED: u16 = 1 << 14;
const ENABLED: u16 = 1 << 15;

#[derive(Debug, Clone, Copy)]
struct Entry {
    message: Message,
    control: u32,
}

/// The table as the guest has written it, for a machine that is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// The capability's control word.
    control: u16,
    /// Address, data and control word of each entry.
    entries: Vec<(u64, u32, u32)>,
}

/// See the module.
pub(crate) struct Msix {
    entries: Vec<Entry>,
    vectors: Vec<Vector>,
    control: u16,
}

impl Msix {
    pub(crate) fn new(vectors: Vec<Vector>) -> Self {
        let entry = Entry { message: Message::default(), control: MASKED };
        Self { entries: vec![entry; vectors.len()], vectors, control: 0 }
    }

    pub(super) fn save(&self) -> Saved {
        let entries = self.entries.iter();
        let entries = entries.map(|entry| (entry.message.address, entry.message.data, entry.control)).collect();
        Saved { control: self.control, entries }
    }

    /// Takes what another table was. Whether it had as many entries.
    pub(super) fn restore(&mut self, saved: &Saved) -> bool {
        if saved.entries.len() != self.entries.len() {
            return false;
        }
        for (place, (address, data, control)) in self.entries.iter_mut().zip(&saved.entries) {
            let message = Message { address: *address, data: *data };
            *place = Entry { message, control: control & MASKED };
        }
        self.set_control(saved.control);
        true
    }

    /// Each vector with its entry of the table: message and control word.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn table(&self) -> impl Iterator<Item = (&Vector, Message, u32)> {
        self.vectors.iter().zip(&self.entries).map(|(vector, entry)| (vector, entry.message, entry.control))
    }

    /// The descriptors by which the vectors are signalled.
    pub(crate) fn events(&self) -> impl Iterator<Item = &EventFd> {
        self.vectors.iter().map(Vector::event)
    }

    /// Whether the guest has enabled them, masked or not.
    pub(crate) fn is_enabled(&self) -> bool {
        self.control & ENABLED != 0
    }

    /// Whether the guest wants interrupts of the device at all.
    fn is_open(&self) -> bool {
        self.control & ENABLED != 0 && self.control & FUNCTION_MASKED == 0
    }

    /// The capability without its first two bytes, for a table and a list of waiting interrupts in BAR 0.
    pub(super) fn capability(&self, table: u32, pending: u32) -> [u8; 10] {
        let mut body = [0; 10];
        let size = u16::try_from(self.vectors.len().saturating_sub(1)).unwrap_or(0).to_le_bytes();
        let parts = size.into_iter().chain(table.to_le_bytes()).chain(pending.to_le_bytes());
        for (place, byte) in body.iter_mut().zip(parts) {
            *place = byte;
        }
        body
    }

    /// The guest has written the capability's control word.
    pub(crate) fn set_control(&mut self, control: u16) {
        self.control = control;
        for index in 0..self.entries.len() {
            self.apply(index);
        }
    }

    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let entry = usize::try_from(offset / ENTRY_BYTES).ok().and_then(|index| self.entries.get(index));
        let Some(entry) = entry else { return data.fill(0) };
        let mut bytes = [0; ENTRY_BYTES as usize];
        let parts = entry.message.address.to_le_bytes().into_iter();
        let parts = parts.chain(entry.message.data.to_le_bytes()).chain(entry.control.to_le_bytes());
        for (place, byte) in bytes.iter_mut().zip(parts) {
            *place = byte;
        }
        let mut bytes = bytes.iter().skip(usize::try_from(offset % ENTRY_BYTES).unwrap_or(0));
        for place in data {
            *place = bytes.next().copied().unwrap_or(0);
        }
    }

    /// Words and double words at their own alignment, as the specification has it; anything else is ignored.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        let Ok(index) = usize::try_from(offset / ENTRY_BYTES) else { return };
        let Some(entry) = self.entries.get_mut(index) else { return };
        let address = &mut entry.message.address;
        match (offset % ENTRY_BYTES, data) {
            (0, &[a, b, c, d]) => *address = *address & !0xffff_ffff | u64::from(u32::from_le_bytes([a, b, c, d])),
            (4, &[a, b, c, d]) => *address = *address & 0xffff_ffff | u64::from(u32::from_le_bytes([a, b, c, d])) << 32,
            (8, &[a, b, c, d]) => entry.message.data = u32::from_le_bytes([a, b, c, d]),
            (12, &[a, b, c, d]) => entry.control = u32::from_le_bytes([a, b, c, d]) & MASKED,
            (0, data) if data.len() == 8 => *address = from_le(data),
            (8, data) if data.len() == 8 => {
                let value = from_le(data);
                entry.message.data = (value & 0xffff_ffff) as u32;
                entry.control = (value >> 32) as u32 & MASKED;
            }
            _ => return,
        }
        self.apply(index);
    }

    fn apply(&mut self, index: usize) {
        let is_open = self.is_open();
        let (Some(entry), Some(vector)) = (self.entries.get(index), self.vectors.get_mut(index)) else { return };
        let open = is_open && entry.control & MASKED == 0;
        if let Err(error) = vector.set(open.then_some(entry.message)) {
            log::warn!("an interrupt's message {:x?} can't be routed: {error}", entry.message);
        }
    }
}

fn from_le(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

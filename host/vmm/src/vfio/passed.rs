//! A device of the host's on the guest's bus.
//!
//! The guest sees what the device is, its memory BARs, its message-signalled interrupts (MSI-X) and what its vendor has put into the
//! configuration space; no other capability, no I/O ports, no ROM, no interrupt pin. What it may change there goes to the kernel's own
//! `vfio-pci`, which checks it once more; where its BARs are for the guest is known here only.

use std::sync::{Arc, Mutex, PoisonError};

use coracle_virtio::transport::Transport;

use super::Space;
use super::kernel::{Kernel, Mapping, Region};
use crate::Error;
use crate::irq::{Interrupts, Vector, Wires};
use crate::pci::{BARS, Bar, ENTRY_BYTES, Function, Msix, Outcome};

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;
/// Bytes of the configuration space that the guest sees.
const CONFIG_BYTES: usize = 256;
const PAGE_BYTES: u64 = 4096;

/// Registers of the header (PCI 3.0, section 6.1).
mod register {
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const HEADER_TYPE: usize = 0x0e;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const CARDBUS: usize = 0x28;
    pub(super) const ROM: usize = 0x30;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const LINE: usize = 0x3c;
    pub(super) const PIN: usize = 0x3d;
}

/// Of the command register: memory is answered; the device reaches memory; it has no interrupt pin.
const MEMORY: u16 = 1 << 1;
const MASTER: u16 = 1 << 2;
const NO_PIN: u16 = 1 << 10;
/// Of the status register: there is a list of capabilities.
const HAS_CAPABILITIES: u8 = 1 << 4;

/// Capabilities that the guest sees.
const VENDOR: u8 = 9;
const MSIX: u8 = 0x11;
/// A list that goes round is followed no further than this: capabilities have four bytes at least.
const CAPABILITIES_MAX: usize = 48;

/// The numbers of KVM's list of memory that are free.
#[derive(Debug)]
pub(crate) struct Numbers(Mutex<(Vec<u32>, u32)>);

/// A number of that list, until it is dropped.
#[derive(Debug)]
struct Number(u32, Arc<Numbers>);

impl Numbers {
    /// Those from `first` on.
    pub(crate) fn from(first: u32) -> Self {
        Self(Mutex::new((Vec::new(), first)))
    }

    fn take(numbers: &Arc<Self>) -> Number {
        let mut free = numbers.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = free.0.pop().unwrap_or_else(|| {
            free.1 += 1;
            free.1 - 1
        });
        Number(number, Arc::clone(numbers))
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        self.1.0.lock().unwrap_or_else(PoisonError::into_inner).0.push(self.0);
    }
}

/// A BAR of the device.
struct Window {
    region: Region,
    /// The guest's address, and whether the BAR has 64 bits.
    address: u64,
    is_wide: bool,
    /// The bits of its lowest byte that say what it is.
    kind: u8,
    /// Parts of it that can be mapped.
    parts: Vec<Part>,
    /// Where KVM was asked to have them; 0 where nowhere.
    mapped_at: u64,
}

/// A part of a BAR that can be mapped.
struct Part {
    /// Its offset in the BAR.
    offset: u64,
    mapping: Mapping,
    number: Number,
    /// Whether KVM has it.
    is_mapped: bool,
}

/// Where the table of interrupts is.
#[derive(Debug, Clone, Copy)]
struct Table {
    /// The capability.
    at: usize,
    bar: usize,
    offset: u64,
    bytes: u64,
}

/// See the module.
pub(crate) struct Passed {
    kernel: Box<dyn Kernel>,
    vm: Arc<dyn Wires>,
    config: Region,
    /// Bytes of the configuration space that are not the device's own, by their place.
    own: Vec<Option<u8>>,
    /// What of the device's own bytes the guest may change.
    writable: Vec<bool>,
    windows: [Option<Window>; BARS],
    command: u16,
    table: Table,
    msix: Msix,
    is_signalled: bool,
    /// What it reaches; dropped last, when the device's file and what is mapped of it are gone, and none of its accesses is under way.
    space: Option<Arc<Space>>,
}

fn failed(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    Error::system(what)
}

/// A little-endian number of a configuration space.
fn number<const N: usize>(config: &[u8], at: usize) -> u64 {
    let bytes = config.get(at..).and_then(|rest| rest.first_chunk::<N>());
    bytes.map_or(0, |bytes| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

impl Passed {
    /// A device that the kernel hands over. What is mapped of it gets a number in KVM's list of memory.
    pub(crate) fn new(
        kernel: Box<dyn Kernel>,
        vm: Arc<dyn Wires>,
        interrupts: &Arc<Interrupts>,
        numbers: &Arc<Numbers>,
    ) -> Result<Self, Error> {
        let config = kernel.region(CONFIG).map_err(failed("look at the device"))?;
        let mut seen = [0; CONFIG_BYTES];
        kernel.read(&mut seen, config.offset).map_err(failed("read the device's configuration"))?;
        let shown = capabilities(&seen);
        let table = table(&seen, &shown).ok_or_else(|| {
            Error::Invalid(
                "the device has no message-signalled interrupts (MSI-X), without which none is passed on".into(),
            )
        })?;
        let vectors: Result<Vec<Vector>, _> = (0..table.bytes / ENTRY_BYTES).map(|_| interrupts.vector()).collect();
        let windows = windows(&*kernel, &seen, &table, numbers)?;
        if windows
            .get(table.bar)
            .is_none_or(|window| window.as_ref().is_none_or(|window| table.offset + table.bytes > window.region.bytes))
        {
            return Err(Error::Invalid("the device's table of interrupts is in none of its BARs".into()));
        }
        let msix = Msix::new(vectors?);
        let (own, writable) = shown_bytes(&seen, &shown, &table);
        let mut passed = Self {
            kernel,
            space: None,
            vm,
            config,
            own,
            writable,
            windows,
            command: 0,
            table,
            msix,
            is_signalled: false,
        };
        passed.tell_command();
        Ok(passed)
    }

    /// Lets it reach what the address space has.
    pub(crate) fn reach(&mut self, space: Arc<Space>) {
        self.space = Some(space);
    }

    /// The device reaches memory where the guest lets it, and never has a pin.
    fn tell_command(&mut self) {
        let command = self.command & (MEMORY | MASTER) | NO_PIN;
        let at = self.config.offset + register::COMMAND as u64;
        if let Err(error) = self.kernel.write(&command.to_le_bytes(), at) {
            log::warn!("a device of the host's takes no command: {error}");
        }
    }

    fn write_byte(&mut self, at: usize, byte: u8) {
        match at {
            register::COMMAND => self.command = self.command & 0xff00 | u16::from(byte) & (MEMORY | MASTER),
            register::BAR0..register::CARDBUS => {
                let (index, shift) = ((at - register::BAR0) / 4, (at - register::BAR0) % 4 * 8);
                self.write_bar(index, shift, byte);
            }
            _ => {}
        }
        if let Some(Some(place)) = self.own.get_mut(at)
            && (at == register::LINE || (self.table.at + 2..self.table.at + 4).contains(&at))
        {
            // Of the control word of MSI-X the guest changes the two highest bits (section 6.8.2.3).
            let mask = if at == register::LINE {
                0xff
            } else if at == self.table.at + 3 {
                0xc0
            } else {
                0
            };
            *place = *place & !mask | byte & mask;
        } else if self.writable.get(at).is_some_and(|writable| *writable)
            && let Err(error) = self.kernel.write(&[byte], self.config.offset + at as u64)
        {
            log::debug!("a device of the host's takes no {byte:#x} at {at:#x}: {error}");
        }
    }

    /// A byte of a BAR: of its lower half, or of the upper half of the one before.
    fn write_bar(&mut self, index: usize, shift: usize, byte: u8) {
        let mut change = |index: usize, shift: usize, is_upper: bool| {
            let Some(Some(window)) = self.windows.get_mut(index) else { return };
            if is_upper && !window.is_wide {
                return;
            }
            let mask = !(window.region.bytes - 1);
            let cleared = window.address & !(0xff << shift);
            window.address =
                (cleared | u64::from(byte) << shift) & mask & if window.is_wide { u64::MAX } else { 0xffff_ffff };
        };
        change(index, shift, false);
        if let Some(before) = index.checked_sub(1) {
            change(before, shift + 32, true);
        }
    }

    fn read_byte(&self, at: usize) -> Option<u8> {
        match at {
            register::COMMAND => self.command.to_le_bytes().first().copied(),
            _ if at == register::COMMAND + 1 => Some((NO_PIN >> 8) as u8),
            register::BAR0..register::CARDBUS => {
                let (index, nth) = ((at - register::BAR0) / 4, (at - register::BAR0) % 4);
                let window = |index: usize| self.windows.get(index).and_then(Option::as_ref);
                let (window, nth) = match (window(index), index.checked_sub(1).and_then(window)) {
                    (Some(window), _) => (window, nth),
                    (None, Some(before)) if before.is_wide => (before, nth + 4),
                    _ => return Some(0),
                };
                let byte = window.address.to_le_bytes().get(nth).copied().unwrap_or(0);
                Some(if nth == 0 { byte | window.kind } else { byte })
            }
            _ => self.own.get(at).copied().flatten(),
        }
    }

    /// Where a BAR is answered; 0 where it is not.
    fn decoded(&self, window: &Window) -> u64 {
        let fits = window.address.checked_add(window.region.bytes).is_some_and(|end| window.is_wide || end < 1 << 32);
        if self.command & MEMORY != 0 && fits { window.address } else { 0 }
    }

    /// Puts what is mapped where the guest has its BARs.
    fn follow(&mut self) {
        for index in 0..BARS {
            let wanted = self.windows.get(index).and_then(Option::as_ref).map_or(0, |window| self.decoded(window));
            let Some(Some(window)) = self.windows.get_mut(index) else { continue };
            if window.mapped_at == wanted {
                continue;
            }
            unmap(&*self.vm, window);
            for part in window.parts.iter_mut().filter(|_| wanted != 0) {
                let (place, bytes) = part.mapping.place();
                // Where it is refused, because the guest has put it over something else, that is what the guest sees there; where nothing
                // is, each access comes to us.
                match self.vm.map(part.number.0, wanted + part.offset, bytes, place) {
                    Ok(()) => part.is_mapped = true,
                    Err(error) => log::warn!("a part of a device of the host's can't be mapped: {error}"),
                }
            }
            window.mapped_at = wanted;
        }
    }

    fn signal(&mut self) {
        let wanted = self.msix.is_enabled();
        if self.is_signalled == wanted {
            return;
        }
        let events: Vec<_> = self.msix.events().filter(|_| wanted).collect();
        match self.kernel.signal_by(&events) {
            Ok(()) => self.is_signalled = wanted,
            Err(error) => log::warn!("the interrupts of a device of the host's can't be turned on or off: {error}"),
        }
    }

    /// The offset in the table of interrupts, of an access that is in it.
    fn in_table(&self, bar: usize, offset: u64) -> Option<u64> {
        let offset = offset.checked_sub(self.table.offset).filter(|offset| *offset < self.table.bytes)?;
        (bar == self.table.bar).then_some(offset)
    }

    /// Where in the device's file an access to a BAR is; none where it is no access that a device has.
    fn in_file(&self, bar: usize, offset: u64, bytes: usize) -> Option<u64> {
        let region = self.windows.get(bar)?.as_ref()?.region;
        let bytes = u64::try_from(bytes).ok().filter(|bytes| matches!(bytes, 1 | 2 | 4 | 8))?;
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= region.bytes);
        (fits && offset.is_multiple_of(bytes)).then(|| region.offset + offset)
    }
}

fn unmap(vm: &dyn Wires, window: &mut Window) {
    for part in window.parts.iter_mut().filter(|part| part.is_mapped) {
        let (place, _) = part.mapping.place();
        match vm.map(part.number.0, window.mapped_at + part.offset, 0, place) {
            Ok(()) => part.is_mapped = false,
            Err(error) => log::error!("a part of a device of the host's stays mapped: {error}"),
        }
    }
    window.mapped_at = 0;
}

/// KVM forgets what is mapped before it goes.
impl Drop for Passed {
    fn drop(&mut self) {
        for window in self.windows.iter_mut().flatten() {
            unmap(&*self.vm, window);
            for part in std::mem::take(&mut window.parts) {
                if part.is_mapped {
                    // The guest still reaches what is there: it must not become anything else.
                    std::mem::forget(part);
                }
            }
        }
        if self.is_signalled {
            let _ = self.kernel.signal_by(&[]);
        }
    }
}

/// The capabilities that the guest sees, by their places.
fn capabilities(config: &[u8]) -> Vec<(usize, u8)> {
    let mut found = Vec::new();
    let mut next = config.get(register::CAPABILITIES).copied().unwrap_or(0);
    for _ in 0..CAPABILITIES_MAX {
        let at = usize::from(next & !3);
        if at < 0x40 {
            break;
        }
        let kind = config.get(at).copied().unwrap_or(0);
        if matches!(kind, VENDOR | MSIX) && !found.iter().any(|(other, _)| *other == at) {
            found.push((at, kind));
        }
        next = config.get(at + 1).copied().unwrap_or(0);
    }
    found
}

/// The table of interrupts, by its capability (PCI 3.0, section 6.8.2).
fn table(config: &[u8], shown: &[(usize, u8)]) -> Option<Table> {
    let (at, _) = *shown.iter().find(|(_, kind)| *kind == MSIX)?;
    let entries = (number::<2>(config, at + 2) & 0x7ff) + 1;
    let place = number::<4>(config, at + 4);
    let bar = usize::try_from(place & 7).ok().filter(|bar| *bar < BARS)?;
    Some(Table { at, bar, offset: place & !7, bytes: entries * ENTRY_BYTES })
}

/// The bytes of the configuration space that are made up, and those that the guest may change.
fn shown_bytes(config: &[u8], shown: &[(usize, u8)], table: &Table) -> (Vec<Option<u8>>, Vec<bool>) {
    let mut own: Vec<Option<u8>> = vec![None; CONFIG_BYTES];
    let mut writable = vec![false; CONFIG_BYTES];
    let mut set = |at: usize, byte: u8| {
        if let Some(place) = own.get_mut(at) {
            *place = Some(byte);
        }
    };
    let byte = |at: usize| config.get(at).copied().unwrap_or(0);
    // What is no capability that it sees reads as zeros.
    for at in 0x40..CONFIG_BYTES {
        set(at, 0);
    }
    set(
        register::STATUS,
        byte(register::STATUS) & !HAS_CAPABILITIES | if shown.is_empty() { 0 } else { HAS_CAPABILITIES },
    );
    // One function.
    set(register::HEADER_TYPE, byte(register::HEADER_TYPE) & 0x7f);
    for at in (register::CARDBUS..register::CARDBUS + 4).chain(register::ROM..register::ROM + 4) {
        set(at, 0);
    }
    set(register::LINE, 0);
    set(register::PIN, 0);
    let places = shown.iter().map(|(at, _)| u8::try_from(*at).unwrap_or(0));
    let links = [register::CAPABILITIES].into_iter().chain(shown.iter().map(|(at, _)| at + 1));
    let bodies: Vec<(usize, usize)> = shown.iter().map(|(at, kind)| (*at, length(config, *at, *kind))).collect();
    for (at, bytes) in &bodies {
        for place in own.iter_mut().skip(*at).take(*bytes) {
            *place = None;
        }
    }
    for (at, bytes) in bodies.iter().filter(|(at, _)| *at != table.at) {
        // Behind its number, its link and its length, a vendor's capability is what the vendor makes of it.
        for place in writable.iter_mut().skip(at + 3).take(bytes.saturating_sub(3)) {
            *place = true;
        }
    }
    let mut set = |at: usize, byte: u8| {
        if let Some(place) = own.get_mut(at) {
            *place = Some(byte);
        }
    };
    for (link, place) in links.zip(places.chain([0])) {
        set(link, place);
    }
    set(table.at + 2, byte(table.at + 2));
    set(table.at + 3, byte(table.at + 3) & 0x3f);
    (own, writable)
}

/// Bytes of a capability.
fn length(config: &[u8], at: usize, kind: u8) -> usize {
    match kind {
        VENDOR => usize::from(config.get(at + 2).copied().unwrap_or(0)).max(3),
        _ => 12,
    }
}

/// The memory BARs, each with what of it is mapped: all but the pages that the table of interrupts is in.
fn windows(
    kernel: &dyn Kernel,
    config: &[u8],
    table: &Table,
    numbers: &Arc<Numbers>,
) -> Result<[Option<Window>; BARS], Error> {
    let mut windows: [Option<Window>; BARS] = Default::default();
    let mut upper = false;
    for (index, place) in windows.iter_mut().enumerate() {
        let low = config.get(register::BAR0 + 4 * index).copied().unwrap_or(0);
        let (is_io, is_wide) = (low & 1 != 0, low & 6 == 4);
        // The upper half of the one before is none of its own.
        let is_upper = std::mem::take(&mut upper);
        upper = !is_upper && !is_io && is_wide;
        if is_upper || is_io {
            continue;
        }
        let index_word = u32::try_from(index).unwrap_or(u32::MAX);
        let region = kernel.region(index_word).map_err(failed("look at the device's memory"))?;
        if region.bytes < 16 || !region.is_accessible {
            continue;
        }
        if !region.bytes.is_power_of_two() {
            return Err(Error::Invalid(format!("the device's memory has {} bytes", region.bytes)));
        }
        let table = Some(table).filter(|table| table.bar == index);
        let mut parts = Vec::new();
        for (offset, bytes) in mappable(&region, table) {
            let mapping = kernel.map(region.offset + offset, bytes).map_err(failed("map the device's memory"))?;
            parts.push(Part { offset, mapping, number: Numbers::take(numbers), is_mapped: false });
        }
        *place = Some(Window { region, address: 0, is_wide, kind: low & 0xf, parts, mapped_at: 0 });
    }
    Ok(windows)
}

/// What of a BAR is mapped: offset and bytes.
fn mappable(region: &Region, table: Option<&Table>) -> Vec<(u64, u64)> {
    if !region.is_mappable || !region.bytes.is_multiple_of(PAGE_BYTES) {
        return Vec::new();
    }
    let (from, to) = table.map_or((region.bytes, region.bytes), |table| {
        let end = (table.offset + table.bytes).next_multiple_of(PAGE_BYTES);
        (table.offset & !(PAGE_BYTES - 1), end.min(region.bytes))
    });
    [(0, from), (to, region.bytes - to)].into_iter().filter(|(_, bytes)| *bytes > 0).collect()
}

impl Function for Passed {
    fn name(&self) -> &'static str {
        "a device of the host's"
    }

    fn transport(&mut self) -> Option<&mut Transport> {
        None
    }

    #[cfg(feature = "fuzzing")]
    fn msix(&self) -> Option<&Msix> {
        Some(&self.msix)
    }

    /// The guest's kernel puts it somewhere: its BARs may be larger than what a slot has.
    fn place(&mut self, _: u64) {}

    fn bars(&self) -> [Bar; BARS] {
        let mut bars = [Bar::default(); BARS];
        for (bar, window) in bars.iter_mut().zip(&self.windows) {
            if let Some(window) = window {
                *bar = Bar { start: self.decoded(window), bytes: window.region.bytes };
            }
        }
        bars
    }

    fn read_config(&mut self, at: u16, data: &mut [u8]) {
        data.fill(0);
        let from = usize::from(at);
        // As one access, where it is one of the device's own: some of its registers count reads.
        let ends = from.checked_add(data.len()).is_some_and(|end| end <= CONFIG_BYTES);
        if ends
            && (from..from + data.len()).any(|at| self.read_byte(at).is_none())
            && let Err(error) = self.kernel.read(data, self.config.offset + u64::from(at))
        {
            log::debug!("a device of the host's can't be read at {at:#x}: {error}");
            data.fill(0xff);
        }
        for (byte, at) in data.iter_mut().zip(from..CONFIG_BYTES) {
            *byte = self.read_byte(at).unwrap_or(*byte);
        }
    }

    fn write_config(&mut self, at: u16, data: &[u8]) -> Outcome {
        let from = usize::from(at);
        let all = from..from.saturating_add(data.len());
        let whole = all.clone().all(|at| self.writable.get(at).is_some_and(|writable| *writable));
        if whole {
            // A vendor's register is written at once.
            if let Err(error) = self.kernel.write(data, self.config.offset + u64::from(at)) {
                log::debug!("a device of the host's takes nothing at {at:#x}: {error}");
            }
            return Outcome::None;
        }
        for (byte, at) in data.iter().zip(all.clone()) {
            self.write_byte(at, *byte);
        }
        // What is mapped goes before the device stops to answer there.
        self.follow();
        if all.contains(&register::COMMAND) {
            self.tell_command();
        }
        if all.contains(&(self.table.at + 3)) {
            let control = self.own.get(self.table.at + 3).copied().flatten().unwrap_or(0);
            self.msix.set_control(u16::from(control) << 8);
            self.signal();
        }
        Outcome::None
    }

    fn read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = self.in_table(bar, offset) {
            self.msix.read(offset, data);
        } else if let Some(place) = self.in_file(bar, offset, data.len())
            && let Err(error) = self.kernel.read(data, place)
        {
            log::debug!("a device of the host's can't be read: {error}");
            data.fill(0xff);
        }
    }

    fn write(&mut self, bar: usize, offset: u64, data: &[u8]) -> Outcome {
        if let Some(offset) = self.in_table(bar, offset) {
            self.msix.write(offset, data);
        } else if let Some(place) = self.in_file(bar, offset, data.len())
            && let Err(error) = self.kernel.write(data, place)
        {
            log::debug!("a device of the host's can't be written: {error}");
        }
        Outcome::None
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::MutexGuard;

    use kvm_bindings::kvm_irq_routing_entry;
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    /// A made-up device: its configuration space, and what was asked of it and of KVM.
    #[derive(Default)]
    struct Made {
        config: Vec<u8>,
        bars: [Region; BARS],
        written: Vec<(u64, Vec<u8>)>,
        signals: Vec<usize>,
        /// What KVM has mapped, by its number: the guest's address and bytes.
        mapped: std::collections::BTreeMap<u32, (u64, u64)>,
    }

    #[derive(Clone, Default)]
    struct Host(Arc<Mutex<Made>>);

    impl Host {
        fn made(&self) -> MutexGuard<'_, Made> {
            self.0.lock().unwrap()
        }
    }

    const CONFIG_AT: u64 = 7 << 40;

    impl Kernel for Host {
        fn region(&self, index: u32) -> io::Result<Region> {
            let made = self.made();
            Ok(made.bars.get(index as usize).copied().unwrap_or(Region {
                bytes: 4096,
                offset: CONFIG_AT,
                is_accessible: true,
                is_mappable: false,
            }))
        }

        fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
            let made = self.made();
            match offset.checked_sub(CONFIG_AT) {
                Some(at) => data.copy_from_slice(&made.config[at as usize..][..data.len()]),
                None => data.fill(0x5a),
            }
            Ok(())
        }

        fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
            self.made().written.push((offset, data.to_vec()));
            Ok(())
        }

        fn signal_by(&self, events: &[&EventFd]) -> io::Result<()> {
            self.made().signals.push(events.len());
            Ok(())
        }

        fn map(&self, _: u64, bytes: u64) -> io::Result<Mapping> {
            // Any memory does: nobody looks at it.
            super::super::Device::anonymous(bytes)
        }
    }

    impl Wires for Host {
        fn route(&self, _: &[kvm_irq_routing_entry]) -> io::Result<()> {
            Ok(())
        }
        fn watch(&self, _: &EventFd, _: u32) -> io::Result<()> {
            Ok(())
        }
        fn forget(&self, _: &EventFd, _: u32) -> io::Result<()> {
            Ok(())
        }
        fn level(&self, _: u32, _: bool) -> io::Result<()> {
            unreachable!()
        }
        fn map(&self, number: u32, address: u64, bytes: u64, _: u64) -> io::Result<()> {
            let mut made = self.made();
            if bytes == 0 {
                assert!(made.mapped.remove(&number).is_some(), "taken away twice");
            } else {
                assert!(made.mapped.insert(number, (address, bytes)).is_none(), "mapped twice");
            }
            Ok(())
        }
        fn ring(&self, _: &EventFd, _: u64) -> io::Result<()> {
            unreachable!()
        }
        fn unring(&self, _: &EventFd, _: u64) -> io::Result<()> {
            unreachable!()
        }
    }

    /// A device with power management, a vendor's capability, and MSI-X of three vectors in its BAR 4; BAR 0 is of ports, BAR 1 small, BAR 2
    /// has 64 bits.
    fn host() -> Host {
        let mut config = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0xf4, 0x1a, 0x41, 0x10, 0, 0, 0x10, 0]);
        put(0x0e, &[0x80]);
        put(0x10, &[1, 0xc0]);
        put(0x14, &[0, 0, 0, 0xfe]);
        put(0x18, &[0xc, 0, 0, 0xe0]);
        put(0x20, &[0, 0, 0, 0xfd]);
        put(0x30, &[0, 0, 0xe, 0xfc]);
        put(0x34, &[0x40]);
        put(0x3c, &[11, 1]);
        put(0x40, &[1, 0x50, 3, 0, 8, 0, 0, 0]);
        put(0x50, &[9, 0x60, 16, 5, 0x77]);
        put(0x60, &[0x11, 0x40, 2, 0, 4, 0x20, 0, 0, 4, 0x30, 0, 0]);
        let region =
            |number: u64, bytes| Region { bytes, offset: number << 40, is_accessible: true, is_mappable: true };
        let bars =
            [region(0, 32), region(1, 64), region(2, 1 << 20), Region::default(), region(4, 0x8000), Region::default()];
        Host(Arc::new(Mutex::new(Made { config, bars, ..Made::default() })))
    }

    fn passed(host: &Host) -> Result<Passed, Error> {
        let vm: Arc<dyn Wires> = Arc::new(host.clone());
        let interrupts = Arc::new(Interrupts::new(Arc::clone(&vm)));
        Passed::new(Box::new(host.clone()), vm, &interrupts, &Arc::new(Numbers::from(16)))
    }

    fn read(device: &mut Passed, at: u16) -> u32 {
        let mut data = [0; 4];
        device.read_config(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(device: &mut Passed, at: u16, value: u32) {
        assert_eq!(device.write_config(at, &value.to_le_bytes()), Outcome::None);
    }

    #[test]
    fn the_guest_sees_what_it_may() {
        let host = host();
        let mut device = passed(&host).unwrap();
        assert_eq!(read(&mut device, 0), 0x1041_1af4);
        assert_eq!(read(&mut device, 4), 0x0010_0400, "no pin, and a list of capabilities");
        assert_eq!(read(&mut device, 0x0c) >> 16, 0, "one function");
        assert_eq!([read(&mut device, 0x10), read(&mut device, 0x30), read(&mut device, 0x3c)], [0, 0, 0]);
        // Power management is left out, and the list ends although the device's goes round.
        assert_eq!((read(&mut device, 0x34), read(&mut device, 0x40)), (0x50, 0));
        assert_eq!((read(&mut device, 0x50), read(&mut device, 0x60)), (0x0510_6009, 0x0002_0011));
        let mut wide = [7; 8];
        device.read_config(0x1000 - 4, &mut wide);
        assert_eq!(wide, [0; 8], "nothing behind the first 256 bytes");
    }

    #[test]
    fn bars_have_the_sizes_of_the_device_and_are_where_the_guest_wants_them() {
        let host = host();
        let mut device = passed(&host).unwrap();
        for at in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
            write(&mut device, at, u32::MAX);
        }
        let sizes = [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24].map(|at| read(&mut device, at));
        assert_eq!(sizes, [0, 0xffff_ffc0, 0xfff0_000c, u32::MAX, 0xffff_8000, 0]);
        write(&mut device, 0x14, 0xd000_0040);
        write(&mut device, 0x18, 0x1010_0000);
        write(&mut device, 0x1c, 0x20);
        write(&mut device, 0x20, 0xd000_8000);
        assert!(host.made().mapped.is_empty() && device.bars().iter().all(|bar| bar.start == 0), "not enabled");
        write(&mut device, 4, 6);
        assert_eq!(
            device.bars().map(|bar| bar.start),
            [0, 0xd000_0040, 0x20_1010_0000, 0, 0xd000_8000, 0],
            "{:x?}",
            device.bars()
        );
        // Around the page of the table; what is less than a page is not mapped.
        let mapped: Vec<_> = host.made().mapped.values().copied().collect();
        assert_eq!(mapped, [(0x20_1010_0000, 1 << 20), (0xd000_8000, 0x2000), (0xd000_b000, 0x5000)]);
        assert_eq!(host.made().written.last(), Some(&(CONFIG_AT + 4, vec![6, 4])));
        write(&mut device, 0x20, 0xd001_0000);
        assert!(host.made().mapped.values().any(|place| *place == (0xd001_3000, 0x5000)));
        write(&mut device, 4, 0);
        assert!(host.made().mapped.is_empty());
        write(&mut device, 4, 2);
        drop(device);
        assert!(host.made().mapped.is_empty(), "what is mapped goes with the device");
    }

    #[test]
    fn the_table_of_interrupts_is_the_monitors() {
        let host = host();
        let mut device = passed(&host).unwrap();
        let _ = device.write(4, 0x2000, &0xfee0_1000_u32.to_le_bytes());
        let mut data = [0; 4];
        device.read(4, 0x2000, &mut data);
        assert_eq!(data, 0xfee0_1000_u32.to_le_bytes());
        let before = host.made().written.len();
        let _ = device.write(4, 0x2000 + 3 * 16, &[1, 2, 3, 4]);
        assert_eq!(host.made().written[before..], [((4 << 40) + 0x2030, vec![1, 2, 3, 4])], "behind the table");
        device.read(4, 0x3000, &mut data);
        assert_eq!(data, [0x5a; 4]);
        assert!(host.made().signals.is_empty());
        write(&mut device, 0x60, 0xffff_ffff);
        assert_eq!(read(&mut device, 0x60), 0xc002_0011, "enabled and masked, and nothing else changes");
        assert_eq!(host.made().signals, [3]);
        write(&mut device, 0x60, 0);
        write(&mut device, 0x60, 0x8000_0000);
        drop(device);
        assert_eq!(host.made().signals, [3, 0, 3, 0]);
    }

    #[test]
    fn only_what_is_the_vendors_is_written_to_the_configuration() {
        let host = host();
        let mut device = passed(&host).unwrap();
        let before = host.made().written.len();
        for at in (0..0x100).step_by(4).filter(|at| ![4, 0x50, 0x54, 0x58, 0x5c].contains(at)) {
            write(&mut device, at, 0xa5a5_a5a5);
        }
        assert_eq!(host.made().written[before..], []);
        write(&mut device, 0x54, 0x0102_0304);
        let _ = device.write_config(0x52, &[9, 9, 9]);
        let written = host.made().written.clone();
        assert_eq!(
            written[before..],
            [(CONFIG_AT + 0x54, vec![4, 3, 2, 1]), (CONFIG_AT + 0x53, vec![9]), (CONFIG_AT + 0x54, vec![9])]
        );
    }

    #[test]
    fn accesses_that_no_device_has_do_nothing() {
        let host = host();
        let mut device = passed(&host).unwrap();
        let before = host.made().written.len();
        for (bar, offset, bytes) in
            [(2, 1 << 20, 4), (2, (1 << 20) - 2, 4), (2, 1, 2), (2, 0, 3), (3, 0, 4), (9, 0, 4), (2, u64::MAX, 8)]
        {
            let mut data = vec![1; bytes];
            device.read(bar, offset, &mut data);
            assert_eq!(data, vec![0; bytes], "{bar} {offset:#x} {bytes}");
            let _ = device.write(bar, offset, &data);
        }
        assert_eq!(host.made().written.len(), before);
        for at in 0..0x120 {
            let _ = device.write_config(at, &[0xff; 8]);
            device.read_config(at, &mut [0; 8]);
        }
    }

    #[test]
    fn a_device_that_is_not_as_it_should_be_is_refused() {
        let without = host();
        without.made().config[0x60] = 5;
        assert!(passed(&without).is_err_and(|error| error.to_string().contains("MSI-X")));
        for (change, what) in
            [((0x64, 0x03), "a BAR that is not there"), ((0x65, 0xff), "behind its BAR"), ((0x64, 7), "no BAR")]
        {
            let host = host();
            host.made().config[change.0] = change.1;
            assert!(passed(&host).is_err(), "{what}");
        }
        let odd = host();
        odd.made().bars[2].bytes = 3 << 20;
        assert!(passed(&odd).is_err());
    }

    #[test]
    fn a_hostile_guest_gets_nothing_mapped_but_where_its_bars_are() {
        let host = host();
        let mut device = passed(&host).unwrap();
        // Numbers that look random and are the same at each run (splitmix64).
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let value = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb) % below
        };
        for _ in 0..50_000 {
            let width = [1, 2, 4, 8, 3][random(5) as usize];
            let mut data = random(u64::MAX).to_le_bytes();
            if random(3) == 0 {
                data = [[0, 6][random(2) as usize], 0, 0, 0, 0, 0, 0, 0];
            }
            let data = &mut data[..width];
            let registers = [4, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x60, 0x62, 0x50];
            let at = if random(4) == 0 { random(0x1000) as u16 } else { registers[random(10) as usize] };
            match random(6) {
                0..3 => drop(device.write_config(at, data)),
                3 => device.read_config(at, data),
                4 => device.read(random(8) as usize, random(1 << 21), data),
                _ => drop(device.write(random(8) as usize, random(1 << 21), data)),
            }
            let bars: Vec<_> = device.bars().into_iter().filter(|bar| bar.start != 0).collect();
            for (start, bytes) in host.made().mapped.values() {
                let is_in = |bar: &&Bar| bar.start <= *start && start + bytes <= bar.start + bar.bytes;
                assert!(bars.iter().find(is_in).is_some(), "{start:#x} and {bytes:#x} bytes are in none of {bars:x?}");
            }
            for (offset, written) in host.made().written.drain(..) {
                let Some(at) = offset.checked_sub(CONFIG_AT) else { continue };
                let end = at + written.len() as u64;
                assert!(at == 4 || at >= 0x53 && end <= 0x60, "{written:?} at {at:#x} of the configuration");
            }
        }
    }
}

//! The registers by which a driver sets a device up: the common configuration of virtio over PCI (virtio 1.3, section
//! 4.1.4.3). It knows no bus: whoever owns the bus passes accesses on by their offset.
//!
//! The guest may write anything in any order and width. What is not a register in its own width reads as zero and takes no
//! write; what comes out of order is ignored, as a driver that breaks the rules of section 3.1.1 has no claim to more.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use crate::device::{ACCESS_PLATFORM, Activation, Broken, Device, EVENT_IDX, INDIRECT_DESC, Memory, VERSION_1};
use crate::ring::{Interrupts, NO_VECTOR, Ring};

/// Bytes of the common configuration.
pub const COMMON_BYTES: u64 = 64;

/// Device status bits (virtio 1.3, section 2.1).
pub mod status {
    /// `ACKNOWLEDGE`.
    pub const ACKNOWLEDGE: u8 = 1;
    /// `DRIVER`.
    pub const DRIVER: u8 = 2;
    /// `DRIVER_OK`.
    pub const DRIVER_OK: u8 = 4;
    /// `FEATURES_OK`.
    pub const FEATURES_OK: u8 = 8;
    /// `DEVICE_NEEDS_RESET`.
    pub const NEEDS_RESET: u8 = 64;
    /// `FAILED`.
    pub const FAILED: u8 = 128;
}

/// What whoever owns the device must do after a write.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub enum Effect {
    /// Nothing.
    None,
    /// The device became active: watch its doorbells and sources.
    Activated,
    /// The device was reset: watch nothing of it any more. It is told already.
    Reset,
    /// It broke while it was activated.
    Broke,
}

/// The registers that are no queue's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    status: u8,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u16,
    generation: u8,
}

/// A queue as its driver has set it up. The fields' names are those of a saved machine's file, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// A device as its driver has set it up, for a machine that is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// The device's name.
    device: String,
    registers: Registers,
    active: bool,
    config_vector: u16,
    /// Each with the vector of its interrupts.
    queues: Vec<(QueueRegisters, u16)>,
    /// What the device knows itself.
    own: Vec<u8>,
}

/// See the module.
pub struct Transport {
    device: Box<dyn Device>,
    memory: Memory,
    interrupts: Arc<Interrupts>,
    doorbells: Vec<EventFd>,
    queues: Vec<QueueRegisters>,
    registers: Registers,
    active: bool,
    access_platform: bool,
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Transport")
            .field("device", &self.device.name())
            .field("status", &self.registers.status)
            .finish()
    }
}

impl Transport {
    /// Registers for `device`, whose doorbells are there already, one a queue.
    #[must_use]
    pub fn new(device: Box<dyn Device>, memory: Memory, interrupts: Arc<Interrupts>, doorbells: Vec<EventFd>) -> Self {
        let queues = device.queue_sizes().iter().map(|size| QueueRegisters::new(*size)).collect();
        Self {
            device,
            memory,
            interrupts,
            doorbells,
            queues,
            registers: Registers::default(),
            active: false,
            access_platform: false,
        }
    }

    /// The same for a driver that lends the device what it may reach, and for no other (virtio 1.3, section 6.1, `VIRTIO_F_ACCESS_PLATFORM`).
    /// An address that it lends is one of the guest's memory.
    #[must_use]
    pub fn with_access_platform(self) -> Self {
        Self { access_platform: true, ..self }
    }

    /// The device.
    pub fn device(&mut self) -> &mut dyn Device {
        self.device.as_mut()
    }

    /// The device, to look at.
    #[must_use]
    pub fn device_ref(&self) -> &dyn Device {
        self.device.as_ref()
    }

    /// Whether the device runs.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active
    }

    /// The doorbells.
    #[must_use]
    pub fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    /// The features that the driver is offered.
    #[must_use]
    pub fn offered(&self) -> u64 {
        let own = self.device.features() | VERSION_1 | self.device.ring_features() & (EVENT_IDX | INDIRECT_DESC);
        own | if self.access_platform { ACCESS_PLATFORM } else { 0 }
    }

    /// Reads the common configuration.
    pub fn read_common(&self, offset: u64, data: &mut [u8]) {
        let queue = self.queues.get(usize::from(self.registers.queue_select));
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let value = match (offset, data.len()) {
            (0, 4) => u64::from(self.registers.device_features_select),
            (4, 4) => half(self.offered(), self.registers.device_features_select),
            (8, 4) => u64::from(self.registers.driver_features_select),
            (12, 4) => half(self.registers.driver_features, self.registers.driver_features_select),
            (16, 2) => u64::from(self.interrupts.get(None)),
            (18, 2) => self.queues.len() as u64,
            (20, 1) => u64::from(self.registers.status),
            (21, 1) => u64::from(self.registers.generation),
            (22, 2) => u64::from(self.registers.queue_select),
            (24, 2) => queue.map_or(0, |queue| u64::from(queue.size)),
            (26, 2) => u64::from(queue.map_or(NO_VECTOR, |_| self.interrupts.get(Some(self.registers.queue_select)))),
            (28, 2) => queue.map_or(0, |queue| u64::from(queue.ready)),
            (30, 2) => u64::from(self.registers.queue_select),
            (32..56, 4 | 8) => queue.map_or(0, |queue| queue.address(offset, data.len())),
            _ => 0,
        };
        for (place, byte) in data.iter_mut().zip(value.to_le_bytes()) {
            *place = byte;
        }
    }

    /// Writes the common configuration.
    pub fn write_common(&mut self, offset: u64, data: &[u8]) -> Effect {
        let mut bytes = [0; 8];
        for (place, byte) in bytes.iter_mut().zip(data) {
            *place = *byte;
        }
        let value = u64::from_le_bytes(bytes);
        let (low32, low16) = ((value & 0xffff_ffff) as u32, (value & 0xffff) as u16);
        let selected = self.registers.queue_select;
        match (offset, data.len()) {
            (0, 4) => self.registers.device_features_select = low32,
            (8, 4) => self.registers.driver_features_select = low32,
            (12, 4) => self.take_features(low32),
            (16, 2) => self.interrupts.set(None, low16),
            (20, 1) => return self.set_status((value & 0xff) as u8),
            (22, 2) => self.registers.queue_select = low16,
            (24, 2) => self.configure(|queue, max| {
                if low16 <= max && low16.is_power_of_two() {
                    queue.size = low16;
                }
            }),
            (26, 2) => self.interrupts.set(Some(selected), low16),
            // Disabled again by a reset only (section 4.1.4.3.2).
            (28, 2) => self.configure(|queue, _| queue.ready |= low16 == 1),
            (32..56, 4 | 8) => self.configure(|queue, _| queue.set_address(offset, data.len(), value)),
            _ => {}
        }
        Effect::None
    }

    /// Reads the device's own configuration. Past its end it is zero.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).ok().and_then(|offset| self.device.config().get(offset..));
        let mut bytes = from.unwrap_or_default().iter();
        for place in data {
            *place = bytes.next().copied().unwrap_or(0);
        }
    }

    /// Writes the device's own configuration.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Ok(offset) = usize::try_from(offset)
            && self.registers.status & status::DRIVER != 0
        {
            self.device.write_config(offset, data);
        }
    }

    /// The device has changed its configuration: the driver is told.
    pub fn config_changed(&mut self) {
        self.registers.generation = self.registers.generation.wrapping_add(1);
        self.interrupts.signal(None);
    }

    /// The device works no more: the driver is told, and must reset it.
    pub fn needs_reset(&mut self, broken: &Broken) {
        log::warn!("{}: {broken}", self.device.name());
        self.registers.status |= status::NEEDS_RESET;
        self.active = false;
        self.device.reset();
        if self.registers.status & status::DRIVER_OK != 0 {
            self.config_changed();
        }
    }

    fn take_features(&mut self, half: u32) {
        if self.registers.status & (status::FEATURES_OK | status::DRIVER_OK) != 0 {
            return;
        }
        let half = u64::from(half);
        match self.registers.driver_features_select {
            0 => self.registers.driver_features = self.registers.driver_features & !0xffff_ffff | half,
            1 => self.registers.driver_features = self.registers.driver_features & 0xffff_ffff | half << 32,
            _ => {}
        }
    }

    /// Changes the selected queue's registers, while the driver may: before `DRIVER_OK` and before it is enabled.
    fn configure(&mut self, change: impl FnOnce(&mut QueueRegisters, u16)) {
        if self.registers.status & status::DRIVER_OK != 0 {
            return;
        }
        let index = usize::from(self.registers.queue_select);
        let max = self.device.queue_sizes().get(index).copied().unwrap_or(0);
        if let Some(queue) = self.queues.get_mut(index).filter(|queue| !queue.ready) {
            change(queue, max);
        }
    }

    fn set_status(&mut self, new: u8) -> Effect {
        if new == 0 {
            self.reset();
            return Effect::Reset;
        }
        // A driver takes no bit back but by a reset, and can't set the device's own.
        let mut added = new & !self.registers.status & !status::NEEDS_RESET;
        let needed = VERSION_1 | if self.access_platform { ACCESS_PLATFORM } else { 0 };
        let known =
            self.registers.driver_features & !self.offered() == 0 && self.registers.driver_features & needed == needed;
        if added & status::FEATURES_OK != 0 && !known {
            added &= !status::FEATURES_OK;
        }
        let ready = added & status::DRIVER_OK != 0;
        if ready && (self.registers.status | added) & status::FEATURES_OK == 0
            || self.registers.status & status::NEEDS_RESET != 0
        {
            return Effect::None;
        }
        self.registers.status |= added;
        if !ready {
            return Effect::None;
        }
        match self.activate(false) {
            Ok(()) => {
                self.active = true;
                Effect::Activated
            }
            Err(broken) => {
                self.needs_reset(&broken);
                Effect::Broke
            }
        }
    }

    /// Activates the device, at the rings' beginnings or where another's was when it was saved.
    fn activate(&mut self, goes_on: bool) -> Result<(), Broken> {
        let mut rings = Vec::with_capacity(self.queues.len());
        let sizes: Vec<u16> = self.device.queue_sizes().to_vec();
        for (((registers, doorbell), max), index) in self.queues.iter().zip(&self.doorbells).zip(sizes).zip(0..) {
            if !registers.ready {
                rings.push(None);
                continue;
            }
            let mut queue: Queue = QueueT::new(max)?;
            queue.set_size(registers.size);
            registers.apply(&mut queue)?;
            queue.set_event_idx(self.registers.driver_features & EVENT_IDX != 0);
            queue.set_ready(true);
            if goes_on {
                // See [`Device`]: what was given back is all that is done with.
                let done = queue.used_idx(&*self.memory.memory(), Ordering::Acquire)?.0;
                queue.set_next_avail(done);
                queue.set_next_used(done);
            }
            let doorbell = doorbell.try_clone().map_err(|error| Broken(format!("no doorbell: {error}")))?;
            rings.push(Some(Ring::new(index, queue, self.memory.clone(), Arc::clone(&self.interrupts), doorbell)?));
        }
        let activation = Activation { features: self.registers.driver_features, memory: self.memory.clone(), rings };
        self.device.activate(activation)
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.device.reset();
        self.active = false;
        // What the driver has seen changes stays seen.
        self.registers = Registers { generation: self.registers.generation, ..Registers::default() };
        for (queue, size) in self.queues.iter_mut().zip(self.device.queue_sizes()) {
            *queue = QueueRegisters::new(*size);
        }
        self.interrupts.set(None, NO_VECTOR);
        for index in 0..self.queues.len() {
            self.interrupts.set(u16::try_from(index).ok(), NO_VECTOR);
        }
    }
}

impl Transport {
    /// The device as it is; none of one that can't be saved. Nobody may serve it meanwhile, or let its driver work.
    #[must_use]
    pub fn save(&self) -> Option<Saved> {
        let own = self.device.save()?;
        let vectors = (0..).map(|index| self.interrupts.get(Some(index)));
        Some(Saved {
            device: self.device.name().to_owned(),
            registers: self.registers,
            active: self.active,
            config_vector: self.interrupts.get(None),
            queues: self.queues.iter().copied().zip(vectors).collect(),
            own,
        })
    }

    /// Takes the place of a saved device, whose memory this one has. Whether it is active from now on: its doorbells and sources are to be
    /// watched. Its driver is interrupted, whether there is news for it or not.
    ///
    /// # Errors
    /// [`Broken`] where this device can't be the one that was saved; it is not usable then.
    pub fn restore(&mut self, saved: &Saved) -> Result<bool, Broken> {
        let name = self.device.name();
        // What a driver has written before it was asked whether that can be is anything.
        let Registers { status, driver_features, .. } = saved.registers;
        let agreed = if status & status::FEATURES_OK != 0 { driver_features } else { 0 };
        let missing = agreed & !self.offered();
        if saved.device != name || saved.queues.len() != self.queues.len() {
            return Err(Broken(format!("a {} was saved, with {} queues", saved.device, saved.queues.len())));
        }
        if missing != 0 {
            return Err(Broken(format!("the guest uses features of {name} that are not there ({missing:#x})")));
        }
        for ((place, (registers, vector)), index) in self.queues.iter_mut().zip(&saved.queues).zip(0..) {
            // As the driver could have set them.
            if registers.size > place.size || !registers.size.is_power_of_two() {
                return Err(Broken(format!("a queue of {name} can't have {} entries", registers.size)));
            }
            *place = *registers;
            self.interrupts.set(Some(index), *vector);
        }
        self.interrupts.set(None, saved.config_vector);
        self.registers = saved.registers;
        self.device.restore(&saved.own)?;
        if status & status::DRIVER_OK != 0 {
            // Whatever it was to be told when the machine was saved: that its configuration has changed, or that it must be reset.
            self.interrupts.signal(None);
        }
        if !saved.active {
            return Ok(false);
        }
        // An active device's driver has come to an agreement with it.
        if agreed & VERSION_1 == 0 || status & status::DRIVER_OK == 0 {
            return Err(Broken(format!("{name} can't be active with a driver that is not ready")));
        }
        self.activate(true)?;
        self.active = true;
        self.device.resumed()?;
        for index in 0..self.queues.len() {
            self.interrupts.signal(u16::try_from(index).ok());
        }
        Ok(true)
    }
}

impl QueueRegisters {
    fn new(size: u16) -> Self {
        Self { size, ready: false, descriptors: 0, driver: 0, device: 0 }
    }

    /// The address register at `offset`, whole or one half of it, and where its bits begin.
    fn field(&mut self, offset: u64) -> Option<(&mut u64, u32)> {
        let shift = if offset.is_multiple_of(8) { 0 } else { 32 };
        match offset & !7 {
            _ if !offset.is_multiple_of(4) => None,
            32 => Some((&mut self.descriptors, shift)),
            40 => Some((&mut self.driver, shift)),
            48 => Some((&mut self.device, shift)),
            _ => None,
        }
    }

    fn address(mut self, offset: u64, width: usize) -> u64 {
        match self.field(offset) {
            Some((field, 0)) if width == 8 => *field,
            Some((field, shift)) if width == 4 => *field >> shift & 0xffff_ffff,
            _ => 0,
        }
    }

    fn set_address(&mut self, offset: u64, width: usize, value: u64) {
        match self.field(offset) {
            Some((field, 0)) if width == 8 => *field = value,
            Some((field, shift)) if width == 4 => *field = *field & !(0xffff_ffff << shift) | value << shift,
            _ => {}
        }
    }

    fn apply(&self, queue: &mut Queue) -> Result<(), Broken> {
        let address = vm_memory::GuestAddress;
        queue.try_set_desc_table_address(address(self.descriptors))?;
        queue.try_set_avail_ring_address(address(self.driver))?;
        queue.try_set_used_ring_address(address(self.device))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::memory;
    use crate::rng::Rng;

    /// The status that a driver with these features comes to.
    fn status_with(access_platform: bool, features: u64) -> u8 {
        let interrupts = Arc::new(Interrupts::new(Vec::new(), 1));
        let transport = Transport::new(Box::new(Rng::new()), memory(), interrupts, Vec::new());
        let mut transport = if access_platform { transport.with_access_platform() } else { transport };
        let wanted = status::ACKNOWLEDGE | status::DRIVER;
        let _ = transport.write_common(20, &[wanted]);
        for half in [0_u32, 1] {
            let _ = transport.write_common(8, &half.to_le_bytes());
            let _ = transport.write_common(12, &((features >> (32 * half) & 0xffff_ffff) as u32).to_le_bytes());
        }
        let _ = transport.write_common(20, &[wanted | status::FEATURES_OK]);
        let mut found = [0];
        transport.read_common(20, &mut found);
        found[0]
    }

    #[test]
    fn a_device_that_reaches_only_what_it_is_lent_has_no_other_driver() {
        let refused = status::ACKNOWLEDGE | status::DRIVER;
        let agreed = refused | status::FEATURES_OK;
        assert_eq!(status_with(false, VERSION_1), agreed);
        assert_eq!(status_with(false, VERSION_1 | ACCESS_PLATFORM), refused, "it was not offered");
        assert_eq!(status_with(true, VERSION_1), refused);
        assert_eq!(status_with(true, ACCESS_PLATFORM), refused);
        assert_eq!(status_with(true, VERSION_1 | ACCESS_PLATFORM), agreed);
    }

    /// A source of randomness behind its registers, which a driver of `queue` has set up.
    fn transport(memory: &Memory) -> Transport {
        let eventfd = || EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let interrupts = Arc::new(Interrupts::new(vec![eventfd(), eventfd()], 1));
        Transport::new(Box::new(Rng::new()), memory.clone(), interrupts, vec![eventfd()])
    }

    #[test]
    fn another_device_goes_on_in_the_middle_of_a_ring() {
        use crate::driver::{DATA, Driver};
        let memory = memory();
        let (mut first, mut driver) = (transport(&memory), Driver::new(&memory, 0, 8));
        let agreed = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        let registers = driver.ring(false).registers();
        let set_up: [(u64, &[u8]); 9] = [
            (8, &1_u32.to_le_bytes()),
            (12, &1_u32.to_le_bytes()),
            (20, &[agreed]),
            (24, &8_u16.to_le_bytes()),
            (26, &1_u16.to_le_bytes()),
            (32, &registers.desc_table.to_le_bytes()),
            (40, &registers.avail_ring.to_le_bytes()),
            (48, &registers.used_ring.to_le_bytes()),
            (28, &1_u16.to_le_bytes()),
        ];
        for (offset, value) in set_up {
            assert_eq!(first.write_common(offset, value), Effect::None);
        }
        assert_eq!(first.write_common(20, &[agreed | status::DRIVER_OK]), Effect::Activated);
        for _ in 0..3 {
            driver.chain(&[(DATA, 4, true)]);
        }
        let _ = first.device().on_queue(0).unwrap();
        assert_eq!(driver.used(), [(0, 4), (1, 4), (2, 4)]);
        // One that is offered before, and one after.
        driver.chain(&[(DATA, 5, true)]);
        let saved = first.save().unwrap();
        drop(first);
        let mut second = transport(&memory);
        assert!(second.restore(&saved).unwrap() && second.is_active());
        assert!(second.interrupts.descriptor(Some(0)).unwrap().read().is_ok(), "whatever was lost on the way");
        driver.chain(&[(DATA, 6, true)]);
        let _ = second.device().on_queue(0).unwrap();
        assert_eq!(driver.used(), [(3, 5), (4, 6)]);
        assert_eq!(second.save().unwrap(), saved);
    }

    #[test]
    fn what_can_not_have_been_saved_is_refused() {
        let memory = memory();
        let saved = transport(&memory).save().unwrap();
        assert!(!transport(&memory).restore(&saved).unwrap(), "it was not active");
        let agreed = status::FEATURES_OK | status::DRIVER_OK;
        type Edit = (&'static str, fn(&mut Saved));
        let edits: [Edit; 7] = [
            ("another device", |saved| saved.device = "block".into()),
            ("more queues", |saved| saved.queues.extend(saved.queues.clone())),
            ("a larger queue", |saved| saved.queues[0].0.size = 128),
            ("an odd queue", |saved| saved.queues[0].0.size = 3),
            ("another configuration", |saved| saved.own = vec![1]),
            ("a driver that is not ready", |saved| saved.active = true),
            ("a queue outside of the memory", |saved| {
                (saved.active, saved.registers.driver_features) = (true, VERSION_1);
                saved.queues[0].0 = QueueRegisters { ready: true, descriptors: 1 << 40, ..saved.queues[0].0 };
            }),
        ];
        for (what, edit) in edits {
            let mut edited = saved.clone();
            edit(&mut edited);
            edited.registers.status = if edited.registers.driver_features == 0 { 0 } else { agreed };
            assert!(transport(&memory).restore(&edited).is_err(), "{what}");
        }
        let registers = Registers { status: agreed, driver_features: VERSION_1 | 1 << 40, ..saved.registers };
        let unknown = Saved { registers, ..saved };
        assert!(transport(&memory).restore(&unknown).unwrap_err().0.contains("0x10000000000"));
    }
}

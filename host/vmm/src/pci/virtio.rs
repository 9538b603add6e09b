//! A virtio device as a PCI device (virtio 1.3, section 4.1). All its registers are in BAR 0:
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | interrupt status |
//! | 0x2000 | the device's own configuration |
//! | 0x3000 | doorbells, 4 bytes a queue |
//! | 0x4000 | table of interrupts |
//! | 0x6000 | waiting interrupts |

use std::sync::Arc;

use coracle_virtio::device::{Broken, Device, Memory};
use coracle_virtio::ring::Interrupts as DeviceInterrupts;
use coracle_virtio::transport::{COMMON_BYTES, Effect, Transport};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::{ConfigSpace, Identity};
use super::msix::Msix;
use super::{BARS, Bar, Function, Outcome, Saved};
use crate::Error;
use crate::irq::{Interrupts, Wires};

/// Bytes of the BAR.
pub(crate) const BAR_BYTES: u64 = 0x8000;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
/// Where doorbells are in the BAR.
pub(crate) const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x6000;
/// Bytes of a doorbell.
pub(crate) const NOTIFY_BYTES: u64 = 4;

/// `PCI_VENDOR_ID_REDHAT_QUMRANET`, virtio's vendor, and the first number of its devices (section 4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE: u16 = 0x1040;

/// The vendor's own capability, and MSI-X.
const CAPABILITY_VENDOR: u8 = 9;
const CAPABILITY_MSIX: u8 = 0x11;
/// `cfg_type` of a virtio capability (section 4.1.4).
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_DEVICE: u8 = 4;
const TYPE_PCI: u8 = 5;

/// See the module.
pub(crate) struct Virtio {
    vm: Arc<dyn Wires>,
    config: ConfigSpace,
    msix: Msix,
    transport: Transport,
    /// Where capabilities are whose bytes do something.
    msix_at: u16,
    window_at: u16,
    /// Where the doorbells are known to KVM; 0 where they are not.
    doorbells_at: u64,
}

impl Virtio {
    /// A PCI device around `device`, which reaches only what the guest lends it where `access_platform` says so.
    pub(crate) fn new(
        vm: Arc<dyn Wires>,
        device: Box<dyn Device>,
        memory: Memory,
        interrupts: &Arc<Interrupts>,
        access_platform: bool,
    ) -> Result<Self, Error> {
        let queues = device.queue_sizes().len();
        // One for the configuration, one a queue.
        let vectors: Result<Vec<_>, _> = (0..=queues).map(|_| interrupts.vector()).collect();
        let vectors = vectors?;
        let eventfd = Error::system("make an eventfd");
        let events: Result<Vec<_>, _> = vectors.iter().map(|vector| vector.event().try_clone()).collect();
        let doorbells: Result<Vec<_>, _> = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect();
        let signals = Arc::new(DeviceInterrupts::new(events.map_err(&eventfd)?, queues));
        let msix = Msix::new(vectors);
        let mut config = ConfigSpace::new(identity(device.id()), BAR_BYTES);
        let (msix_at, window_at) = add_capabilities(&mut config, &msix, queues, device.config().len());
        let transport = Transport::new(device, memory, signals, doorbells.map_err(&eventfd)?);
        let transport = if access_platform { transport.with_access_platform() } else { transport };
        Ok(Self { vm, config, msix, transport, msix_at, window_at, doorbells_at: 0 })
    }

    fn read_at(&mut self, offset: u64, data: &mut [u8]) {
        match offset {
            COMMON..ISR if offset < COMMON + COMMON_BYTES => self.transport.read_common(offset, data),
            // Interrupts are signalled by messages only: nothing waits here.
            DEVICE..NOTIFY => self.transport.read_config(offset - DEVICE, data),
            TABLE..PENDING => self.msix.read(offset - TABLE, data),
            _ => data.fill(0),
        }
    }

    fn write_at(&mut self, offset: u64, data: &[u8]) -> Outcome {
        match offset {
            COMMON..ISR if offset < COMMON + COMMON_BYTES => match self.transport.write_common(offset, data) {
                Effect::None => Outcome::None,
                Effect::Activated => Outcome::Watch,
                Effect::Reset | Effect::Broke => Outcome::Forget,
            },
            DEVICE..NOTIFY => {
                self.transport.write_config(offset - DEVICE, data);
                Outcome::None
            }
            // KVM rings the doorbell itself; what comes here comes by the window of the configuration space.
            NOTIFY..TABLE => {
                let queue = usize::try_from((offset - NOTIFY) / NOTIFY_BYTES).unwrap_or(usize::MAX);
                if let Some(doorbell) = self.transport.doorbells().get(queue) {
                    let _ = doorbell.write(1);
                }
                Outcome::None
            }
            TABLE..PENDING => {
                self.msix.write(offset - TABLE, data);
                Outcome::None
            }
            _ => Outcome::None,
        }
    }

    /// Where an access to the window of the configuration space leads (section 4.1.4.9): offset in the BAR, and bytes.
    fn window(&self, at: u16, bytes: usize) -> Option<(u64, usize)> {
        if at != self.window_at + 16 || bytes > 4 {
            return None;
        }
        let mut fields = [0; 16];
        self.config.read(self.window_at, &mut fields);
        let word = |at: usize| {
            let bytes = fields.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or_default();
            u32::from_le_bytes(bytes)
        };
        let bar = fields.get(4).copied().unwrap_or(0xff);
        let length = usize::try_from(word(12)).ok().filter(|length| matches!(length, 1 | 2 | 4))?;
        let offset = u64::from(word(8));
        (bar == 0 && length == bytes && offset.is_multiple_of(length as u64)).then_some((offset, length))
    }

    /// Tells KVM where the doorbells are, after the guest has moved, enabled or disabled the BAR.
    fn move_doorbells(&mut self) {
        self.ring_at(self.config.decoded());
    }

    /// Puts the doorbells where the BAR is, or takes them down (0).
    fn ring_at(&mut self, wanted: u64) {
        if wanted == self.doorbells_at {
            return;
        }
        let place = |bar: u64, queue: u64| bar + NOTIFY + queue * NOTIFY_BYTES;
        if self.doorbells_at != 0 {
            for (doorbell, queue) in self.transport.doorbells().iter().zip(0..) {
                if let Err(error) = self.vm.unring(doorbell, place(self.doorbells_at, queue)) {
                    log::warn!("a doorbell can't be taken down: {error}");
                }
            }
        }
        self.doorbells_at = wanted;
        if wanted != 0 {
            for (doorbell, queue) in self.transport.doorbells().iter().zip(0..) {
                // Where it is refused, because the guest has put two devices at one place, the write comes to us.
                if let Err(error) = self.vm.ring(doorbell, place(wanted, queue)) {
                    log::warn!("a doorbell can't be put up: {error}");
                }
            }
        }
    }
}

impl Function for Virtio {
    fn name(&self) -> &'static str {
        self.transport.device_ref().name()
    }

    fn transport(&mut self) -> Option<&mut Transport> {
        Some(&mut self.transport)
    }

    #[cfg(feature = "fuzzing")]
    fn msix(&self) -> Option<&Msix> {
        Some(&self.msix)
    }

    fn place(&mut self, address: u64) {
        self.config.place(address);
    }

    fn bars(&self) -> [Bar; BARS] {
        let mut bars = [Bar::default(); BARS];
        if let Some(first) = bars.first_mut() {
            *first = Bar { start: self.config.decoded(), bytes: BAR_BYTES };
        }
        bars
    }

    fn read_config(&mut self, at: u16, data: &mut [u8]) {
        if let Some((offset, bytes)) = self.window(at, data.len()) {
            let mut value = [0; 4];
            if let Some(part) = value.get_mut(..bytes) {
                self.read_at(offset, part);
            }
            self.config.put(usize::from(self.window_at) + 16, &value);
        }
        self.config.read(at, data);
    }

    fn write_config(&mut self, at: u16, data: &[u8]) -> Outcome {
        self.config.write(at, data);
        // An access may begin before the control word, and be as wide as eight bytes.
        let end = at.saturating_add(u16::try_from(data.len()).unwrap_or(u16::MAX));
        if at < self.msix_at + 4 && end > self.msix_at + 2 {
            let mut control = [0; 2];
            self.config.read(self.msix_at + 2, &mut control);
            self.msix.set_control(u16::from_le_bytes(control));
        }
        self.move_doorbells();
        match self.window(at, data.len()) {
            Some((offset, bytes)) => {
                let value: Vec<u8> = data.iter().copied().take(bytes).collect();
                self.write_at(offset, &value)
            }
            None => Outcome::None,
        }
    }

    fn save(&self) -> Option<Saved> {
        let config = self.config.bytes().to_vec();
        Some(Saved { config, msix: self.msix.save(), transport: self.transport.save()? })
    }

    fn restore(&mut self, saved: &Saved) -> Result<Outcome, Broken> {
        if !self.config.restore(&saved.config) || !self.msix.restore(&saved.msix) {
            return Err(Broken::new("it is of another kind"));
        }
        self.move_doorbells();
        let active = self.transport.restore(&saved.transport)?;
        Ok(if active { Outcome::Watch } else { Outcome::None })
    }

    fn read(&mut self, _: usize, offset: u64, data: &mut [u8]) {
        self.read_at(offset, data);
    }

    fn write(&mut self, _: usize, offset: u64, data: &[u8]) -> Outcome {
        self.write_at(offset, data)
    }
}

/// KVM rings no doorbell of a device that has gone.
impl Drop for Virtio {
    fn drop(&mut self) {
        self.ring_at(0);
    }
}

fn identity(id: u16) -> Identity {
    let class = match id {
        // Network; mass storage, another; communication, another.
        1 => [2, 0, 0],
        2 | 26 => [1, 0x80, 0],
        3 => [7, 0x80, 0],
        // What has no class.
        _ => [0xff, 0, 0],
    };
    let device = FIRST_DEVICE + id;
    Identity { vendor: VENDOR, device, subsystem: device, revision: 1, class }
}

/// Adds the capabilities; gives the places of MSI-X and of the window.
fn add_capabilities(config: &mut ConfigSpace, msix: &Msix, queues: usize, own_bytes: usize) -> (u16, u16) {
    let low = |number: u64| u32::try_from(number).unwrap_or(0);
    let virtio = |kind: u8, offset: u64, bytes: u64, rest: &[u8]| {
        let length = u8::try_from(16 + rest.len()).unwrap_or(0);
        let mut body = vec![length, kind, 0, 0, 0, 0];
        body.extend(low(offset).to_le_bytes());
        body.extend(low(bytes).to_le_bytes());
        body.extend(rest);
        body
    };
    let multiplier = low(NOTIFY_BYTES).to_le_bytes();
    config.add_capability(CAPABILITY_VENDOR, &virtio(TYPE_COMMON, COMMON, COMMON_BYTES, &[]));
    config.add_capability(CAPABILITY_VENDOR, &virtio(TYPE_ISR, ISR, 1, &[]));
    if own_bytes > 0 {
        config.add_capability(CAPABILITY_VENDOR, &virtio(TYPE_DEVICE, DEVICE, own_bytes as u64, &[]));
    }
    let bells = queues as u64 * NOTIFY_BYTES;
    config.add_capability(CAPABILITY_VENDOR, &virtio(TYPE_NOTIFY, NOTIFY, bells, &multiplier));
    let window = config.add_capability(CAPABILITY_VENDOR, &virtio(TYPE_PCI, 0, 0, &[0; 4]));
    // The guest says where the window looks: BAR, offset, length; and reads or writes its four bytes of data.
    config.allow(window + 4, &[0xff]);
    config.allow(window + 8, &[0xff; 12]);
    let interrupts = config.add_capability(CAPABILITY_MSIX, &msix.capability(low(TABLE), low(PENDING)));
    config.allow(interrupts + 2, &(1_u16 << 14 | 1 << 15).to_le_bytes());
    let place = |at: usize| u16::try_from(at).unwrap_or(0);
    (place(interrupts), place(window))
}

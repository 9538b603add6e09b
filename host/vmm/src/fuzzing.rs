//! A bus for fuzzing: its wires lead to no KVM, but obey KVM's rules and can be looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coracle_monitor_api::KernelForm;
use coracle_virtio::device::{Device, Memory};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::boot::Images;
use crate::arch::layout;
use crate::events::Watch;
use crate::irq::{Interrupts, Wires};
use crate::pci::{Bus, Virtio};
use crate::{Error, pci};

/// Where the configuration space of the first slot is.
pub const ECAM: u64 = layout::ECAM;
/// Where devices are put first, one BAR after another.
pub const WINDOW: u64 = layout::PCI_WINDOW;
/// Bytes of a BAR.
pub const BAR_BYTES: u64 = pci::BAR_BYTES;
/// Where doorbells are in a BAR.
pub const NOTIFY: u64 = pci::NOTIFY;
/// Bytes of a doorbell.
pub const NOTIFY_BYTES: u64 = pci::NOTIFY_BYTES;

/// Whether bytes are a saved machine's state, behind its checksum.
#[must_use]
pub fn is_state(body: &[u8]) -> bool {
    crate::snapshot::is_state(body)
}

/// Loads a kernel and a RAM disk into memory of 64 MiB, as a boot does.
///
/// # Errors
/// What is wrong with them.
pub fn load_kernel(kernel: &std::fs::File, is_bzimage: bool, initrd: &std::fs::File) -> Result<(), Error> {
    let memory = vm_memory::GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 64 << 20)]);
    let memory = memory.map_err(|error| Error::Invalid(error.to_string()))?;
    let form = if is_bzimage { KernelForm::BzImage } else { KernelForm::PvhElf };
    let images = Images { kernel, form, initrd, command_line: "console=hvc0" };
    crate::arch::boot::load(&memory, &images, 0xe0000).map(drop)
}

/// What KVM would have been asked for so far.
#[derive(Debug, Default)]
struct Asked {
    routes: BTreeMap<u32, (u64, u32)>,
    watched: BTreeSet<(RawFd, u32)>,
    doorbells: BTreeMap<u64, RawFd>,
    refused: usize,
    contested: usize,
}

#[derive(Debug, Default)]
struct Nowhere(Mutex<Asked>);

impl Nowhere {
    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An error that is only ever due to a fault of the monitor's: counted.
fn refuse(asked: &mut Asked, errno: i32) -> io::Result<()> {
    asked.refused += 1;
    Err(io::Error::from_raw_os_error(errno))
}

impl Wires for Nowhere {
    fn route(&self, table: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let messages = table.iter().filter(|entry| entry.type_ == KVM_IRQ_ROUTING_MSI);
        let message = |entry: &kvm_irq_routing_entry| {
            // SAFETY: the entry's type says that this part of the union was written.
            #[expect(unsafe_code, reason = "a union of the kernel's interface")]
            let msi = unsafe { entry.u.msi };
            (entry.gsi, (u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo), msi.data))
        };
        self.asked().routes = messages.map(message).collect();
        Ok(())
    }

    fn watch(&self, event: &EventFd, number: u32) -> io::Result<()> {
        let mut asked = self.asked();
        if asked.watched.insert((event.as_raw_fd(), number)) { Ok(()) } else { refuse(&mut asked, libc::EBUSY) }
    }

    fn forget(&self, event: &EventFd, number: u32) -> io::Result<()> {
        let mut asked = self.asked();
        if asked.watched.remove(&(event.as_raw_fd(), number)) { Ok(()) } else { refuse(&mut asked, libc::ENOENT) }
    }

    fn level(&self, _: u32, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn map(&self, _: u32, _: u64, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn ring(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        let mut asked = self.asked();
        if asked.doorbells.contains_key(&address) {
            // The guest has put two devices at one place: no fault of ours.
            asked.contested += 1;
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        asked.doorbells.insert(address, doorbell.as_raw_fd());
        Ok(())
    }

    fn unring(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        let mut asked = self.asked();
        if asked.doorbells.get(&address) != Some(&doorbell.as_raw_fd()) {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        asked.doorbells.remove(&address);
        Ok(())
    }
}

/// A device of the bench's as it is seen from the host.
#[derive(Debug)]
pub struct Place {
    /// Where its registers are answered; 0 where they are not.
    pub bar: u64,
    /// Its doorbells, by queue.
    pub doorbells: Vec<RawFd>,
    /// Its interrupts.
    pub interrupts: Vec<Interrupt>,
}

/// An interrupt of a device.
#[derive(Debug, Clone, Copy)]
pub struct Interrupt {
    /// What signals it.
    pub event: RawFd,
    /// Its number in KVM's table.
    pub number: u32,
    /// The address and the data that its entry of the table has.
    pub message: (u64, u32),
    /// The control word of its entry.
    pub control: u32,
}

/// What KVM knows of the devices.
#[derive(Debug)]
pub struct Known {
    /// The message of each interrupt's number.
    pub routes: BTreeMap<u32, (u64, u32)>,
    /// The interrupts that come: descriptor and number.
    pub watched: BTreeSet<(RawFd, u32)>,
    /// The doorbell at each address.
    pub doorbells: BTreeMap<u64, RawFd>,
    /// How often the monitor has asked for what KVM refuses whatever the guest does.
    pub refused: usize,
    /// How often the guest has put a device where another one's doorbells were. The later one has none in KVM then, also after the
    /// earlier one has gone: what the guest writes there comes to the monitor.
    pub contested: usize,
}

/// A bus with devices.
pub struct Bench {
    bus: Bus,
    wires: Arc<Nowhere>,
}

impl Bench {
    /// With these devices in slots 1 and up.
    ///
    /// # Errors
    /// Where there are too many, or descriptors run out.
    pub fn new(devices: Vec<Box<dyn Device>>, memory: &Memory) -> Result<Self, Error> {
        let wires = Arc::new(Nowhere::default());
        let interrupts = Arc::new(Interrupts::new(Arc::clone(&wires) as _));
        let watch = Watch::new()?;
        let place = |device| {
            let function = Virtio::new(Arc::clone(&wires) as _, device, memory.clone(), &interrupts, false)?;
            Ok(pci::Place { function: Box::new(function), watch: watch.clone() })
        };
        let places: Result<Vec<_>, Error> = devices.into_iter().map(place).collect();
        Ok(Self { bus: Bus::new(places?)?, wires })
    }

    /// The guest reads at an address.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        self.bus.read(address, data);
    }

    /// The guest writes at an address. Whether a device was to be watched after that.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.bus.write(address, data)
    }

    /// What is saved of the devices, as a state has it.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let saved: Vec<_> =
            self.bus.hold().iter().map(|place| place.as_ref().and_then(|place| place.function.save())).collect();
        serde_json::to_vec(&saved).unwrap_or_default()
    }

    /// Puts the devices, which were just made, in the place of those that were saved. Whether they could be.
    pub fn restore(&self, saved: &[u8]) -> bool {
        serde_json::from_slice::<Vec<_>>(saved).is_ok_and(|saved| self.bus.restore(&saved).is_ok())
    }

    /// The devices.
    #[must_use]
    pub fn places(&self) -> Vec<Place> {
        let place = |slot: &pci::Slot| {
            let mut place = slot.place();
            let function = &mut place.as_mut()?.function;
            let doorbells = function.transport()?.doorbells().iter().map(AsRawFd::as_raw_fd).collect();
            let table = function.msix()?.table();
            let interrupts = table.map(|(vector, message, control)| Interrupt {
                event: vector.event().as_raw_fd(),
                number: vector.number(),
                message: (message.address, message.data),
                control,
            });
            Some(Place { bar: slot.bar(), doorbells, interrupts: interrupts.collect() })
        };
        self.bus.slots().iter().filter_map(place).collect()
    }

    /// What KVM knows.
    #[must_use]
    pub fn known(&self) -> Known {
        let asked = self.wires.asked();
        Known {
            routes: asked.routes.clone(),
            watched: asked.watched.clone(),
            doorbells: asked.doorbells.clone(),
            refused: asked.refused,
            contested: asked.contested,
        }
    }
}

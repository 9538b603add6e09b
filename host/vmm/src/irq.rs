//! Message-signalled interrupts: each vector of a device has a number in KVM's routing table and an eventfd that KVM
//! watches. A masked vector's eventfd is not watched; what it gets meanwhile is delivered when it is unmasked.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Error;
use crate::arch::layout::IO_APIC_PINS;

/// More than KVM routes in all kernels that we know (`KVM_MAX_IRQ_ROUTES` is 4096).
const MESSAGES_MAX: usize = 2048;

/// What a message-signalled interrupt writes, and where (PCI 3.0, section 6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Message {
    pub(crate) address: u64,
    pub(crate) data: u32,
}

/// What interrupts and doorbells ask of KVM, each with the errors of its call.
pub(crate) trait Wires: Send + Sync {
    /// `KVM_SET_GSI_ROUTING`: which interrupt a number means.
    fn route(&self, table: &[kvm_irq_routing_entry]) -> io::Result<()>;
    /// `KVM_IRQFD`: the interrupt of that number comes when the eventfd is signalled.
    fn watch(&self, event: &EventFd, number: u32) -> io::Result<()>;
    /// It comes so no more.
    fn forget(&self, event: &EventFd, number: u32) -> io::Result<()>;
    /// `KVM_IRQ_LINE`: the I/O APIC's pin is so, until it is told otherwise.
    fn level(&self, pin: u32, high: bool) -> io::Result<()>;
    /// `KVM_SET_USER_MEMORY_REGION`: at the guest's `address` are `bytes` of this process's memory from `place` on, under this number; none are
    /// there no more. What is there must be this process's until then.
    fn map(&self, number: u32, address: u64, bytes: u64, place: u64) -> io::Result<()>;
    /// `KVM_IOEVENTFD`: a write of the guest's to `address`, of any value and width, signals the eventfd.
    fn ring(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;
    /// It does so no more.
    fn unring(&self, doorbell: &EventFd, address: u64) -> io::Result<()>;
}

fn errno(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl Wires for VmFd {
    fn route(&self, table: &[kvm_irq_routing_entry]) -> io::Result<()> {
        let table = KvmIrqRouting::from_entries(table).map_err(|_| io::Error::other("too many interrupts"))?;
        self.set_gsi_routing(&table).map_err(errno)
    }

    fn watch(&self, event: &EventFd, number: u32) -> io::Result<()> {
        self.register_irqfd(event, number).map_err(errno)
    }

    fn forget(&self, event: &EventFd, number: u32) -> io::Result<()> {
        self.unregister_irqfd(event, number).map_err(errno)
    }

    fn level(&self, pin: u32, high: bool) -> io::Result<()> {
        self.set_irq_line(pin, high).map_err(errno)
    }

    fn map(&self, number: u32, address: u64, bytes: u64, place: u64) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: 0,
            guest_phys_addr: address,
            memory_size: bytes,
            userspace_addr: place,
        };
        // SAFETY: whoever asks has the memory mapped there until it has asked for no bytes of it.
        #[expect(unsafe_code, reason = "KVM lets the guest write to this process's memory")]
        unsafe { self.set_user_memory_region(region) }.map_err(errno)
    }

    fn ring(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        self.register_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch).map_err(errno)
    }

    fn unring(&self, doorbell: &EventFd, address: u64) -> io::Result<()> {
        self.unregister_ioevent(doorbell, &IoEventAddress::Mmio(address), NoDatamatch).map_err(errno)
    }
}

/// The machine's interrupts.
pub(crate) struct Interrupts {
    vm: Arc<dyn Wires>,
    /// What each number means. Devices of several threads change it: each under its own lock, and all of them must give KVM one table.
    routes: Mutex<Vec<Route>>,
}

/// A number of KVM's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// No device has it.
    Free,
    /// A device's that was not told where it is delivered.
    Nowhere,
    /// Delivered so.
    To(Message),
}

impl Interrupts {
    pub(crate) fn new(vm: Arc<dyn Wires>) -> Self {
        Self { vm, routes: Mutex::new(Vec::new()) }
    }

    fn routes(&self) -> MutexGuard<'_, Vec<Route>> {
        // The table is whole between any two statements.
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A vector of a device, masked.
    pub(crate) fn vector(self: &Arc<Self>) -> Result<Vector, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::system("make an eventfd"))?;
        let mut routes = self.routes();
        let index = match routes.iter().position(|route| *route == Route::Free) {
            Some(index) => index,
            None if routes.len() < MESSAGES_MAX => {
                routes.push(Route::Free);
                routes.len() - 1
            }
            None => return Err(Error::Invalid("the machine's devices have too many interrupts".into())),
        };
        if let Some(place) = routes.get_mut(index) {
            *place = Route::Nowhere;
        }
        drop(routes);
        let number = u32::try_from(index).unwrap_or(0) + IO_APIC_PINS;
        Ok(Vector { interrupts: Arc::clone(self), number, event, message: None })
    }

    /// An interrupt of the I/O APIC's pin, signalled by the eventfd.
    pub(crate) fn pin(&self, pin: u32) -> Result<EventFd, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(Error::system("make an eventfd"))?;
        self.vm.watch(&event, pin).map_err(Error::system("watch an interrupt"))?;
        Ok(event)
    }

    /// Gives a number its meaning, and KVM the whole table where that changes.
    fn route(&self, number: u32, route: Route) -> io::Result<()> {
        let mut routes = self.routes();
        let index = usize::try_from(number.saturating_sub(IO_APIC_PINS)).unwrap_or(usize::MAX);
        let Some(place) = routes.get_mut(index).filter(|place| **place != route) else { return Ok(()) };
        let is_known = matches!(*place, Route::To(_)) || matches!(route, Route::To(_));
        *place = route;
        if !is_known {
            return Ok(());
        }
        let mut entries: Vec<_> = (0..IO_APIC_PINS).map(pin_entry).collect();
        for (number, route) in (IO_APIC_PINS..).zip(routes.iter()) {
            if let Route::To(message) = route {
                entries.push(message_entry(number, *message));
            }
        }
        self.vm.route(&entries)
    }
}

fn pin_entry(pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = pin;
    entry
}

fn message_entry(number: u32, message: Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi: number, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    let (low, high) = (message.address & 0xffff_ffff, message.address >> 32);
    entry.u.msi.address_lo = u32::try_from(low).unwrap_or(0);
    entry.u.msi.address_hi = u32::try_from(high).unwrap_or(0);
    entry.u.msi.data = message.data;
    entry
}

/// One vector of a device.
pub(crate) struct Vector {
    interrupts: Arc<Interrupts>,
    number: u32,
    event: EventFd,
    /// Where it is delivered; `None` while it is masked.
    message: Option<Message>,
}

impl Vector {
    /// Its number in KVM's table.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// The descriptor by which it is signalled.
    pub(crate) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Delivers it as `message`, or masks it.
    pub(crate) fn set(&mut self, message: Option<Message>) -> io::Result<()> {
        if self.message == message {
            return Ok(());
        }
        if let Some(message) = message {
            self.interrupts.route(self.number, Route::To(message))?;
        }
        match (self.message.is_some(), message.is_some()) {
            (false, true) => self.interrupts.vm.watch(&self.event, self.number)?,
            (true, false) => self.interrupts.vm.forget(&self.event, self.number)?,
            _ => {}
        }
        self.message = message;
        Ok(())
    }
}

/// It comes no more, and its number is free.
impl Drop for Vector {
    fn drop(&mut self) {
        let masked = self.set(None);
        if let Err(error) = masked.and_then(|()| self.interrupts.route(self.number, Route::Free)) {
            log::warn!("an interrupt can't be taken down: {error}");
        }
    }
}

//! What KVM knows of a machine that is saved: its processors, their interrupt controllers, its clock.
//!
//! The order in which a processor's parts are asked for and given back is KVM's own (KVM API): the run state first, which the asking may
//! change; the local APIC behind the registers that place it; the model-specific registers behind the APIC, whose timer is among them; what is
//! about to happen last.

use kvm_bindings::{
    CpuId, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use crate::Error;

/// Memory types (Intel SDM volume 3, section 12.11), which KVM has and does not list: variable ranges, fixed ranges, the default.
const MEMORY_TYPES: [std::ops::RangeInclusive<u32>; 5] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// A processor that has virtual machines of its own keeps what it knows of them elsewhere: `CR4.VMXE` and `EFER.SVME`.
const CR4_VMXE: u64 = 1 << 13;
const EFER_SVME: u64 = 1 << 12;

/// The most that a processor's extended state has where no feature was asked for that needs more.
const XSAVE_BYTES: i32 = 4096;

/// The model-specific registers that a processor's state has on this host.
///
/// # Errors
/// Where KVM does not tell.
pub(crate) fn registers(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let listed = kvm.get_msr_index_list().map_err(Error::kvm("tell which registers processors have"))?;
    Ok(MEMORY_TYPES.into_iter().flatten().chain(listed.as_slice().iter().copied()).collect())
}

/// A processor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Processor {
    run: kvm_mp_state,
    general: kvm_regs,
    special: kvm_sregs,
    extended: kvm_xsave,
    extended_control: kvm_xcrs,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    specific: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

impl Processor {
    /// The state of a processor that is not in the guest, and has taken what it was answered; of the model-specific registers, those
    /// of `wanted` that it has.
    ///
    /// # Errors
    /// Where KVM does not tell, or does not tell all: the guest runs virtual machines itself.
    pub(crate) fn of(processor: &VcpuFd, wanted: &[u32]) -> Result<Self, Error> {
        let failed = || Error::kvm("tell a processor's state");
        let run = processor.get_mp_state().map_err(failed())?;
        let general = processor.get_regs().map_err(failed())?;
        let special = processor.get_sregs().map_err(failed())?;
        if special.cr4 & CR4_VMXE != 0 || special.efer & EFER_SVME != 0 {
            return Err(Error::Invalid("a machine can't be saved whose guest runs virtual machines itself".into()));
        }
        Ok(Self {
            run,
            general,
            special,
            extended: processor.get_xsave().map_err(failed())?,
            extended_control: processor.get_xcrs().map_err(failed())?,
            debug: processor.get_debug_regs().map_err(failed())?,
            apic: processor.get_lapic().map_err(failed())?,
            specific: read_registers(processor, wanted)?,
            events: processor.get_vcpu_events().map_err(failed())?,
            tsc_khz: processor.get_tsc_khz().map_err(failed())?,
        })
    }

    /// Puts a processor into this state. It was just made, with the same CPUID; the machine's first one goes first.
    ///
    /// # Errors
    /// Where KVM refuses: the state is another host's, or none.
    pub(crate) fn put(&self, processor: &VcpuFd, is_first: bool) -> Result<(), Error> {
        let failed = || Error::kvm("put a processor into its saved state");
        if processor.get_tsc_khz().map_err(failed())? != self.tsc_khz {
            processor.set_tsc_khz(self.tsc_khz).map_err(Error::kvm("count as fast as the saved machine's host"))?;
        }
        processor.set_mp_state(self.run).map_err(failed())?;
        processor.set_regs(&self.general).map_err(failed())?;
        processor.set_sregs(&self.special).map_err(failed())?;
        // SAFETY: KVM reads as many bytes as the structure has: more it takes only for features that a process has asked its kernel for,
        // and this one asks for none.
        #[expect(unsafe_code, reason = "the structure's size is the host's to say")]
        unsafe { processor.set_xsave(&self.extended) }.map_err(failed())?;
        processor.set_xcrs(&self.extended_control).map_err(failed())?;
        processor.set_debug_regs(&self.debug).map_err(failed())?;
        processor.set_lapic(&self.apic).map_err(failed())?;
        if is_first {
            leave_time(processor)?;
        }
        write_registers(processor, &self.specific)?;
        tell_of_pause(processor);
        processor.set_vcpu_events(&self.events).map_err(failed())
    }
}

/// Has a machine's time stamp counter forget when it began. KVM takes a value within a second of what it expects for an attempt to make
/// processors alike, and keeps what it had (Linux: `kvm_synchronize_tsc`; newer ones do not where it is the first that is set). The next
/// processors are to be alike, but the first one's value is the saved one.
fn leave_time(processor: &VcpuFd) -> Result<(), Error> {
    const TSC: u32 = 0x10;
    let far = [kvm_msr_entry { index: TSC, data: 1 << 60, ..Default::default() }];
    write_registers(processor, &far)
}

/// Lets a guest's watchdogs know that nobody has run it for a while, where it has KVM's clock.
pub(crate) fn tell_of_pause(processor: &VcpuFd) {
    if let Err(error) = processor.kvmclock_ctrl() {
        log::debug!("the guest has no clock of KVM's: {error}");
    }
}

/// The guest's clock.
///
/// # Errors
/// Where KVM does not tell.
pub(crate) fn clock(vm: &VmFd) -> Result<kvm_clock_data, Error> {
    vm.get_clock().map_err(Error::kvm("tell the guest's clock"))
}

/// Whether all of the host's processors' state can be saved.
///
/// # Errors
/// Where it can't.
pub(crate) fn check_state(vm: &VmFd) -> Result<(), Error> {
    if vm.check_extension_int(kvm_ioctls::Cap::Xsave2) > XSAVE_BYTES {
        return Err(Error::Invalid("the host's processors have more state than can be saved".into()));
    }
    Ok(())
}

/// Those of the registers that the processor has, with what is in them.
fn read_registers(processor: &VcpuFd, mut wanted: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::with_capacity(wanted.len());
    while !wanted.is_empty() {
        let entries: Vec<_> =
            wanted.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut registers = Msrs::from_entries(&entries).map_err(|_| too_many())?;
        let count = processor.get_msrs(&mut registers).map_err(Error::kvm("read a processor's registers"))?;
        found.extend(registers.as_slice().iter().take(count));
        // KVM stops at the first that this processor does not have.
        wanted = wanted.get(count + 1..).unwrap_or_default();
    }
    Ok(found)
}

fn write_registers(processor: &VcpuFd, mut entries: &[kvm_msr_entry]) -> Result<(), Error> {
    while !entries.is_empty() {
        let registers = Msrs::from_entries(entries).map_err(|_| too_many())?;
        let count = processor.set_msrs(&registers).map_err(Error::kvm("set a processor's registers"))?;
        let Some((refused, rest)) = entries.get(count..).and_then(<[_]>::split_first) else { return Ok(()) };
        // One that KVM lists and does not take back was never written: that is its state from the start.
        if refused.data != 0 {
            let (index, data) = (refused.index, refused.data);
            return Err(Error::Invalid(format!(
                "this host's processors can't have {data:#x} in their register {index:#x}"
            )));
        }
        entries = rest;
    }
    Ok(())
}

fn too_many() -> Error {
    Error::Invalid("a processor can't have so many registers".into())
}

/// What all processors share: the interrupt controllers beside their local ones, and the clock.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Chips {
    controllers: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
    /// What the first processor says of itself.
    cpuid: Vec<kvm_cpuid_entry2>,
}

/// KVM's numbers of the interrupt controllers: both of a PC, and the I/O APIC.
const CONTROLLERS: [u32; 3] =
    [kvm_bindings::KVM_IRQCHIP_PIC_MASTER, kvm_bindings::KVM_IRQCHIP_PIC_SLAVE, kvm_bindings::KVM_IRQCHIP_IOAPIC];

impl Chips {
    /// Of a machine that stands still since its clock was so.
    ///
    /// # Errors
    /// Where KVM does not tell.
    pub(crate) fn of(vm: &VmFd, cpuid: &CpuId, clock: kvm_clock_data) -> Result<Self, Error> {
        let mut controllers = Vec::with_capacity(CONTROLLERS.len());
        for chip_id in CONTROLLERS {
            let mut controller = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut controller).map_err(Error::kvm("tell an interrupt controller's state"))?;
            controllers.push(controller);
        }
        Ok(Self { controllers, clock, cpuid: cpuid.as_slice().to_vec() })
    }

    /// Whether this host's processors are those of the host where the machine was saved.
    ///
    /// # Errors
    /// Where they are not: what differs.
    pub(crate) fn check(&self, cpuid: &CpuId) -> Result<(), Error> {
        let leaf = |entry: &kvm_cpuid_entry2| (entry.function, entry.index);
        let values = |entry: &kvm_cpuid_entry2| [entry.eax, entry.ebx, entry.ecx, entry.edx];
        let differs = |entry: &&kvm_cpuid_entry2| {
            let other = self.cpuid.iter().find(|other| leaf(other) == leaf(entry));
            other.is_none_or(|other| values(other) != values(entry))
        };
        let own = cpuid.as_slice();
        let first = own.iter().find(differs).map(leaf);
        if first.is_none() && own.len() == self.cpuid.len() {
            return Ok(());
        }
        let (function, index) = first.unwrap_or_default();
        Err(Error::Invalid(format!(
            "the machine was saved on other processors, or by another kernel's KVM: CPUID leaf {function:#x}.{index} differs"
        )))
    }

    /// Puts the interrupt controllers of a machine that was just made into this state.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub(crate) fn put(&self, vm: &VmFd) -> Result<(), Error> {
        if self.controllers.iter().map(|controller| controller.chip_id).ne(CONTROLLERS) {
            return Err(Error::Invalid("the saved machine has other interrupt controllers".into()));
        }
        for controller in &self.controllers {
            vm.set_irqchip(controller).map_err(Error::kvm("put an interrupt controller into its saved state"))?;
        }
        Ok(())
    }

    /// Has the guest's clock go on where it stood: the time between both is none to the guest.
    ///
    /// # Errors
    /// Where KVM refuses.
    pub(crate) fn put_clock(&self, vm: &VmFd) -> Result<(), Error> {
        let clock = kvm_clock_data { clock: self.clock.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(Error::kvm("set the guest's clock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpuid(entries: &[(u32, u32)]) -> CpuId {
        let entry = |&(function, eax): &(u32, u32)| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        CpuId::from_entries(&entries.iter().map(entry).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn other_processors_are_named_by_what_differs() {
        let own = cpuid(&[(0, 13), (1, 0x600)]);
        let chips = Chips { controllers: Vec::new(), clock: kvm_clock_data::default(), cpuid: own.as_slice().to_vec() };
        assert!(chips.check(&own).is_ok());
        let other = chips.check(&cpuid(&[(0, 13), (1, 0x601)])).unwrap_err().to_string();
        assert!(other.contains("leaf 0x1.0"), "{other}");
        assert!(chips.check(&cpuid(&[(0, 13)])).is_err(), "the saved one's had more");
        assert!(chips.check(&cpuid(&[(0, 13), (1, 0x600), (7, 0)])).is_err(), "this one's have more");
    }

    #[test]
    fn state_passes_through_a_file_unchanged() {
        let mut processor = Processor {
            run: kvm_mp_state { mp_state: 3 },
            general: kvm_regs { rip: u64::MAX, ..Default::default() },
            special: kvm_sregs { cr3: 1 << 40, ..Default::default() },
            extended: kvm_xsave::default(),
            extended_control: kvm_xcrs { nr_xcrs: 1, ..Default::default() },
            debug: kvm_debugregs { dr7: 0x400, ..Default::default() },
            apic: kvm_lapic_state::default(),
            specific: vec![kvm_msr_entry { index: 0x10, data: 1 << 50, ..Default::default() }],
            events: kvm_vcpu_events::default(),
            tsc_khz: 2_000_000,
        };
        processor.apic.regs[1023] = -1;
        processor.extended.region[1023] = 0xffff_ffff;
        let text = serde_json::to_string(&processor).unwrap();
        let found: Processor = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (found.apic.regs[1023], found.extended.region[1023], found.general.rip),
            (-1, 0xffff_ffff, u64::MAX)
        );
        assert_eq!(serde_json::to_string(&found).unwrap(), text);
    }
}

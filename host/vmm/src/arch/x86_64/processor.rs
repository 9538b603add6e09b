//! Processors and their interrupt controllers, in the state in which a kernel is started.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::boot::Entry;
use super::{cpuid, layout};
use crate::Error;

/// APIC numbers have 8 bits, of which 255 means all.
pub(crate) const PROCESSORS_MAX: u32 = 254;

const MSR_MTRR_DEFAULT: u32 = 0x2ff;
/// Memory ranges are enabled, and what no range names is cached with write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Makes the interrupt controllers that KVM has: local APICs and the I/O APIC.
pub(crate) fn create_interrupt_controller(vm: &VmFd) -> Result<(), Error> {
    let tss = usize::try_from(layout::KVM_TSS).map_err(|_| Error::Invalid("a 64-bit host is needed".into()))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).map_err(Error::kvm("place its identity map"))?;
    vm.set_tss_address(tss).map_err(Error::kvm("place its task state"))?;
    vm.create_irq_chip().map_err(Error::kvm("make interrupt controllers"))
}

/// Makes processors of one machine.
pub(crate) struct Processors {
    supported: CpuId,
    tsc_deadline: bool,
    count: u8,
}

impl Processors {
    /// For a machine of `count` processors.
    pub(crate) fn new(kvm: &Kvm, count: u32) -> Result<Self, Error> {
        let allowed = kvm.get_max_vcpus().min(PROCESSORS_MAX as usize);
        let count = u8::try_from(count).ok().filter(|count| *count > 0 && usize::from(*count) <= allowed);
        let count = count.ok_or_else(|| Error::Invalid(format!("a machine can have 1 to {allowed} processors")))?;
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Error::kvm("tell what processors it has"))?;
        Ok(Self { supported, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer), count })
    }

    /// What the processor `id` says of itself.
    pub(crate) fn cpuid(&self, id: u8) -> Result<CpuId, Error> {
        cpuid::for_processor(&self.supported, id, self.count, self.tsc_deadline)
    }

    /// Makes the processor `id`. The first one begins at `entry`, the others wait for the kernel to start them.
    pub(crate) fn create(&self, vm: &VmFd, id: u8, entry: Option<&Entry>) -> Result<VcpuFd, Error> {
        let processor = vm.create_vcpu(u64::from(id)).map_err(Error::kvm("make a processor"))?;
        let cpuid = self.cpuid(id)?;
        processor.set_cpuid2(&cpuid).map_err(Error::kvm("describe a processor"))?;
        let default = kvm_msr_entry { index: MSR_MTRR_DEFAULT, data: MTRR_ENABLED_WRITE_BACK, ..Default::default() };
        let registers = Msrs::from_entries(&[default]).map_err(|_| Error::Invalid("too many registers".into()))?;
        processor.set_msrs(&registers).map_err(Error::kvm("set a processor's registers"))?;
        // KVM looks for whom an interrupt between processors is in a map that it makes anew when a local APIC changes, and not when a
        // processor comes: one that comes later would never be started (Linux: `kvm_recalculate_apic_map`).
        let apic = processor.get_lapic().map_err(Error::kvm("read a processor's APIC"))?;
        processor.set_lapic(&apic).map_err(Error::kvm("set a processor's APIC"))?;
        if let Some(entry) = entry.filter(|_| id == 0) {
            start_at(&processor, entry)?;
        }
        Ok(processor)
    }
}

fn start_at(processor: &VcpuFd, entry: &Entry) -> Result<(), Error> {
    let mut special = processor.get_sregs().map_err(Error::kvm("read a processor's registers"))?;
    let data = segment(0x18, 3, false);
    let mut registers = kvm_regs { rflags: 2, ..Default::default() };
    match *entry {
        Entry::Pvh { address, start_info } => {
            special.cs = segment(0x10, 0xb, false);
            // Protected mode, and nothing else; bit 4 is always set.
            special.cr0 = 0x11;
            special.cr4 = 0;
            special.efer = 0;
            (registers.rip, registers.rbx) = (address, start_info);
        }
        Entry::Long { address, zero_page, page_tables, gdt } => {
            special.cs = segment(0x10, 0xb, true);
            (special.gdt.base, special.gdt.limit) = (gdt, 31);
            // Protected mode and paging; physical address extension; long mode, enabled and active.
            special.cr0 = 0x8000_0011;
            special.cr3 = page_tables;
            special.cr4 = 0x20;
            special.efer = 0x500;
            (registers.rip, registers.rsi) = (address, zero_page);
        }
    }
    for place in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
        *place = data;
    }
    special.tr = kvm_segment { limit: 0x67, type_: 0xb, present: 1, selector: 0, ..Default::default() };
    processor.set_sregs(&special).map_err(Error::kvm("set a processor's registers"))?;
    processor.set_regs(&registers).map_err(Error::kvm("set a processor's registers"))
}

/// A flat segment over the whole address space; for code, 64-bit or 32-bit.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

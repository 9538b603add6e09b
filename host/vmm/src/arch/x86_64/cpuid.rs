//! What the guest's processors say of themselves: what KVM supports on this host, with the machine's own topology of one
//! package with one thread a core (Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E).

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::Error;

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADING: u32 = 1 << 28;

/// The leaves for the processor `id` of `count`, from those that KVM supports.
pub(super) fn for_processor(supported: &CpuId, id: u8, count: u8, tsc_deadline: bool) -> Result<CpuId, Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    let (id, cores) = (u32::from(id), u32::from(count));
    // Bits of an APIC number that tell cores apart.
    let bits = u8::BITS - (count.max(1) - 1).leading_zeros();
    for entry in &mut entries {
        match entry.function {
            0 => entry.eax = entry.eax.max(0xb),
            1 => {
                let clflush = entry.ebx & 0xff00;
                entry.ebx = id << 24 | cores << 16 | clflush | entry.ebx & 0xff;
                entry.ecx |= HYPERVISOR | if tsc_deadline { TSC_DEADLINE } else { 0 };
                entry.edx = entry.edx & !HYPER_THREADING | if cores > 1 { HYPER_THREADING } else { 0 };
            }
            // Each core has its caches but the last, which all share.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << bits) - 1) << 26;
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | u32::from(bits as u8) << 12 | (cores - 1),
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { cores - 1 } else { 0 };
                entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
            }
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
            _ => {}
        }
    }
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        edx: id,
        ..Default::default()
    };
    // One thread a core; the cores; the end.
    entries.extend([level(0, 0, 1, 1), level(1, bits, cores, 2), level(2, 0, 0, 0)]);
    CpuId::from_entries(&entries).map_err(|_| Error::Invalid("the host's processor has too many CPUID leaves".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn topology_is_one_package_of_cores() {
        let of = |function, eax| kvm_cpuid_entry2 { function, eax, ecx: 0x10, edx: !0, ..Default::default() };
        let supported = CpuId::from_entries(&[of(0, 0xd), of(1, 0x600f10), of(0xb, 9), of(0x8000_0008, 48)]).unwrap();
        let third = for_processor(&supported, 2, 3, true).unwrap();
        let first = leaf(&third, 1, 0);
        assert_eq!((first.ebx >> 24, first.ebx >> 16 & 0xff), (2, 3));
        assert_eq!(first.ecx, HYPERVISOR | TSC_DEADLINE | 0x10);
        assert_eq!(
            leaf(&third, 0xb, 1),
            kvm_cpuid_entry2 { eax: 2, ebx: 3, ecx: 0x201, edx: 2, ..leaf(&third, 0xb, 1) }
        );
        assert_eq!(leaf(&third, 0x8000_0008, 0).ecx & 0xf0ff, 0x2002);
        let only = for_processor(&supported, 0, 1, false).unwrap();
        assert_eq!(leaf(&only, 1, 0).edx & HYPER_THREADING, 0);
        assert_eq!((leaf(&only, 0xb, 1).eax, leaf(&only, 1, 0).ecx & TSC_DEADLINE), (0, 0));
    }
}

//! The guest's physical address space, and its ports.
//!
//! ```text
//! 0                      RAM, the boot's own pages first
//! 0x000a_0000            nothing; ACPI tables from 0x000e_0000 (reserved)
//! 0x0010_0000            RAM, up to 3 GiB
//! 0xc000_0000            PCI devices, 32-bit window
//! 0xe000_0000            PCI configuration space (ECAM), one bus
//! 0xfec0_0000            I/O APIC
//! 0xfee0_0000            local APICs
//! 0x1_0000_0000          the rest of the RAM
//! after the RAM          memory that the guest gains later
//! after that             files as memory
//! after that             PCI devices, 64-bit window
//! ```

/// Where RAM below 4 GiB ends at the latest.
pub(crate) const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on.
pub(crate) const HIGH_RAM: u64 = 1 << 32;

/// Conventional memory ends here, one page below the place of a BIOS's data.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_f000;
/// ACPI tables: the area in which a kernel that was not told looks for them.
pub(crate) const ACPI: u64 = 0xe_0000;
pub(crate) const ACPI_END: u64 = 0x10_0000;
/// In the last page of that area: the number that a machine has alone, 16 bytes, another one each time that it goes on where it was saved.
pub(crate) const GENERATION: u64 = 0xf_f000;
/// RAM above the first MiB.
pub(crate) const EXTENDED: u64 = 0x10_0000;

/// The 32-bit window of PCI devices, and its bytes.
pub(crate) const PCI_WINDOW: u64 = LOW_RAM_END;
pub(crate) const PCI_WINDOW_BYTES: u64 = 0x2000_0000;
/// The configuration space of bus 0, and its bytes: 32 devices of 8 functions with 4 KiB each.
pub(crate) const ECAM: u64 = 0xe000_0000;
pub(crate) const ECAM_BYTES: u64 = 1 << 20;
/// The 64-bit window begins at a multiple of this, after the RAM, and has so many bytes: room for what is plugged later.
pub(crate) const PCI_WINDOW_64_ALIGN: u64 = 1 << 36;
pub(crate) const PCI_WINDOW_64_BYTES: u64 = 1 << 36;

pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Pages that KVM needs on Intel for itself, above the I/O APIC, where no RAM is (KVM API, `KVM_SET_TSS_ADDR`).
pub(crate) const KVM_TSS: u64 = 0xfffb_d000;
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// The I/O APIC's pins; message-signalled interrupts have the numbers after them.
pub(crate) const IO_APIC_PINS: u32 = 24;

/// The first serial port, and its interrupt.
pub(crate) const SERIAL: u16 = 0x3f8;
pub(crate) const SERIAL_IRQ: u32 = 4;
/// The keyboard controller's command port: a kernel's oldest way to reset a PC.
pub(crate) const KEYBOARD: u16 = 0x64;
/// ACPI's registers of a machine without legacy hardware: sleep control and status, reset.
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
pub(crate) const SLEEP_STATUS: u16 = 0x601;
pub(crate) const RESET: u16 = 0x602;
/// The registers of what comes and goes while the machine runs, and their interrupt.
pub(crate) const PLUG: u16 = 0x620;
pub(crate) const PLUG_PORTS: u16 = 0x20;
pub(crate) const PLUG_IRQ: u32 = 10;
/// Where a guest's kernel tells that it panics (QEMU docs/specs/pvpanic.rst).
pub(crate) const PANIC: u16 = 0x505;

/// RAM by ranges of (address, bytes).
pub(crate) fn ram(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(LOW_RAM_END);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HIGH_RAM, bytes - low));
    }
    ranges
}

/// Memory that is gained later begins at a multiple of this: no kernel has larger units of it.
const GROWTH_ALIGN: u64 = 2 << 30;

/// The first address of the memory that a machine of so much RAM gains later.
pub(crate) fn growth(ram_bytes: u64) -> u64 {
    (HIGH_RAM + ram_bytes.saturating_sub(LOW_RAM_END)).next_multiple_of(GROWTH_ALIGN)
}

/// The first address of files as memory. None shares a unit of the kernel's with other memory.
pub(crate) fn files(ram_bytes: u64, growth_bytes: u64) -> u64 {
    (growth(ram_bytes) + growth_bytes).next_multiple_of(GROWTH_ALIGN)
}

/// The first address of the 64-bit window of PCI devices, for so much RAM, memory that is gained later and files as memory.
pub(crate) fn pci_window_64(ram_bytes: u64, growth_bytes: u64, files_bytes: u64) -> u64 {
    (files(ram_bytes, growth_bytes) + files_bytes).next_multiple_of(PCI_WINDOW_64_ALIGN)
}

/// What is at an address, as firmware tells it (ACPI 6.5, section 15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// Memory to use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
}

/// The memory map for a kernel: (address, bytes, what it is).
pub(crate) fn memory_map(bytes: u64) -> Vec<(u64, u64, Kind)> {
    let mut map = vec![(0, CONVENTIONAL_END, Kind::Ram), (ACPI, ACPI_END - ACPI, Kind::Reserved)];
    for (start, length) in ram(bytes) {
        let from = start.max(EXTENDED);
        map.push((from, start + length - from, Kind::Ram));
    }
    map.push((ECAM, ECAM_BYTES, Kind::Reserved));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_hole_below_4_gib() {
        assert_eq!(ram(256 << 20), [(0, 256 << 20)]);
        assert_eq!(ram(4 << 30), [(0, 3 << 30), (1 << 32, 1 << 30)]);
        assert_eq!((growth(256 << 20), growth(4 << 30)), (1 << 32, 6 << 30));
        assert_eq!(pci_window_64(256 << 20, 0, 0), 1 << 36);
        assert_eq!(pci_window_64(256 << 20, 64 << 30, 0), 2 << 36);
        assert_eq!(pci_window_64(64 << 30, 0, 0), 2 << 36);
        assert_eq!((files(256 << 20, 0), files(256 << 20, 5 << 20)), (1 << 32, 6 << 30));
        assert_eq!(pci_window_64(256 << 20, 0, 60 << 30), 1 << 36);
        assert_eq!(pci_window_64(256 << 20, 0, (60 << 30) + 1), 2 << 36);
    }

    #[test]
    fn the_map_has_no_overlap() {
        let mut map = memory_map(8 << 30);
        map.sort_by_key(|(start, _, _)| *start);
        assert!(map.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{map:x?}");
        let ram: u64 = map.iter().filter(|entry| entry.2 == Kind::Ram).map(|entry| entry.1).sum();
        assert_eq!(ram, (8 << 30) - (EXTENDED - CONVENTIONAL_END));
    }
}

//! ACPI tables (ACPI 6.5): by them a stock kernel finds every device. The machine has no legacy hardware to speak of, so
//! it is "hardware-reduced" (section 4.1): no PIC, no timer chip, no fixed events.

mod plug;

use acpi_tables::aml::{self, Path};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::layout;
use crate::Error;

const OEM: [u8; 6] = *b"CORACL";
const TABLE: [u8; 8] = *b"CORACLE ";
const REVISION: u32 = 1;
/// The device by which a guest learns that it goes on in another machine.
const GENERATION: &str = "_SB_.VGEN";
/// `\_S5`, the state "off", as this machine numbers it.
pub(crate) const OFF: u8 = 5;

struct Bytebuf(Vec<u8>);

impl AmlSink for Bytebuf {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytebuf(Vec::new());
    table.to_aml_bytes(&mut sink);
    sink.0
}

/// How many processors a machine has from its start, and at most.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Count {
    pub(crate) boot: u8,
    pub(crate) most: u8,
}

/// Writes the tables of a machine with these processors, whose 64-bit window of PCI devices begins there. Gives the address of their root.
pub(crate) fn write_tables(memory: &GuestMemoryMmap, processors: Count, window_64: u64) -> Result<u64, Error> {
    let mut place = Place { memory, next: layout::ACPI + Rsdp::len() as u64 };
    let dsdt = place.put(&dsdt(processors, window_64))?;
    let tables = [place.put(&fadt(dsdt))?, place.put(&madt(processors))?, place.put(&mcfg())?];
    let mut root = XSDT::new(OEM, TABLE, REVISION);
    for table in tables {
        root.add_entry(table);
    }
    let root = place.put(&bytes(&root))?;
    let pointer = bytes(&Rsdp::new(OEM, root));
    memory.write_slice(&pointer, GuestAddress(layout::ACPI)).map_err(|_| too_large())?;
    Ok(layout::ACPI)
}

fn too_large() -> Error {
    Error::Invalid("the machine's tables do not fit: it has too little memory or too many processors".into())
}

struct Place<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, Error> {
        let at = self.next.next_multiple_of(64);
        self.next = at + table.len() as u64;
        if self.next > layout::GENERATION {
            return Err(too_large());
        }
        self.memory.write_slice(table, GuestAddress(at)).map_err(|_| too_large())?;
        Ok(at)
    }
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut table = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    table.reset_reg = port(layout::RESET);
    table.reset_value = 1;
    table.sleep_control_reg = port(layout::SLEEP_CONTROL);
    table.sleep_status_reg = port(layout::SLEEP_STATUS);
    // No keyboard controller, no VGA, no clock chip (section 5.2.9.3); message-signalled interrupts are fine.
    table.iapc_boot_arch = (1 << 2 | 1 << 5).into();
    bytes(&table.finalize())
}

fn madt(processors: Count) -> Vec<u8> {
    let mut table = MADT::new(OEM, TABLE, REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for id in 0..processors.most {
        let later = id >= processors.boot;
        let status = if later { EnabledStatus::DisabledOnlineCapable } else { EnabledStatus::Enabled };
        table.add_structure(ProcessorLocalApic::new(id, id, status));
    }
    table.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    bytes(&table)
}

fn mcfg() -> Vec<u8> {
    let mut table = MCFG::new(OEM, TABLE, REVISION);
    table.add_ecam(layout::ECAM, 0, 0, 0);
    bytes(&table)
}

/// The namespace: the PCI root, the serial port, the panic port, the state "off".
fn dsdt(processors: Count, window_64: u64) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, REVISION);
    let mut put = |part: &dyn Aml| table.append_slice(&bytes(part));
    put_pci(&mut put, window_64);
    plug::put(&mut put, processors.boot..processors.most);
    let ports = aml::IO::new(layout::SERIAL, layout::SERIAL, 1, 8);
    let interrupt = aml::Interrupt::new(true, true, false, false, layout::SERIAL_IRQ);
    let serial = aml::ResourceTemplate::new(vec![&ports, &interrupt]);
    put(&aml::Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0501")),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(Path::new("_CRS"), &serial),
        ],
    ));
    let port = aml::IO::new(layout::PANIC, layout::PANIC, 1, 1);
    let panic = aml::ResourceTemplate::new(vec![&port]);
    put(&aml::Device::new(
        Path::new("_SB_.PEVT"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"QEMU0001"),
            &aml::Name::new(Path::new("_CRS"), &panic),
            &aml::Name::new(Path::new("_STA"), &0xf_u8),
        ],
    ));
    let half = |shift: u32| u32::try_from(layout::GENERATION >> shift & 0xffff_ffff).unwrap_or(0);
    let address = (half(0), half(32));
    put(&aml::Device::new(
        Path::new(GENERATION),
        vec![
            // Names by which drivers know it (Microsoft, Virtual Machine Generation ID; Linux: drivers/virt/vmgenid.c).
            &aml::Name::new(Path::new("_HID"), &"VMGENCTR"),
            &aml::Name::new(Path::new("_CID"), &"VM_GEN_COUNTER"),
            &aml::Name::new(Path::new("_DDN"), &"VM_Gen_Counter"),
            &aml::Name::new(Path::new("ADDR"), &aml::Package::new(vec![&address.0, &address.1])),
        ],
    ));
    put(&aml::Name::new(Path::new("_S5_"), &aml::Package::new(vec![&OFF, &aml::ZERO, &aml::ZERO, &aml::ZERO])));
    table.as_slice().to_vec()
}

fn put_pci(put: &mut impl FnMut(&dyn Aml), window_64: u64) {
    let window = |start: u64, bytes: u64| (start, start + bytes - 1);
    let low = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
    let (start, end) = window(layout::PCI_WINDOW, layout::PCI_WINDOW_BYTES);
    let memory =
        aml::AddressSpace::new_memory(aml::AddressSpaceCacheable::NotCacheable, true, low(start), low(end), None);
    let (start, end) = window(window_64, layout::PCI_WINDOW_64_BYTES);
    let memory_64 = aml::AddressSpace::new_memory(aml::AddressSpaceCacheable::NotCacheable, true, start, end, None);
    let buses = aml::AddressSpace::new_bus_number(0_u16, 0);
    let resources = aml::ResourceTemplate::new(vec![&buses, &memory, &memory_64]);
    put(&aml::Device::new(
        Path::new("_SB_.PCI0"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new(Path::new("_CID"), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new(Path::new("_SEG"), &aml::ZERO),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(Path::new("_CCA"), &aml::ONE),
            &aml::Name::new(Path::new("_CRS"), &resources),
        ],
    ));
    // The kernel uses the configuration space only where a device of the board claims it.
    let ecam = aml::Memory32Fixed::new(true, low(layout::ECAM), low(layout::ECAM_BYTES));
    let resources = aml::ResourceTemplate::new(vec![&ecam]);
    put(&aml::Device::new(
        Path::new("_SB_.MBRD"),
        vec![
            &aml::Name::new(Path::new("_HID"), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(Path::new("_CRS"), &resources),
        ],
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_found_from_their_root_and_sum_up_to_zero() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let root = write_tables(&memory, Count { boot: 3, most: 254 }, 1 << 36).unwrap();
        let read = |at: u64, bytes: usize| {
            let mut buffer = vec![0; bytes];
            memory.read_slice(&mut buffer, GuestAddress(at)).unwrap();
            buffer
        };
        let number = |at: u64| memory.read_obj::<u32>(GuestAddress(at)).unwrap();
        assert_eq!(read(root, 8), b"RSD PTR ");
        let xsdt = memory.read_obj::<u64>(GuestAddress(root + 24)).unwrap();
        let count = (number(xsdt + 4) - 36) / 8;
        let mut names = Vec::new();
        for index in 0..u64::from(count) {
            let table = memory.read_obj::<u64>(GuestAddress(xsdt + 36 + index * 8)).unwrap();
            let whole = read(table, number(table + 4) as usize);
            assert_eq!(whole.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "{:?}", &whole[..4]);
            names.push(String::from_utf8(whole[..4].to_vec()).unwrap());
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }
}

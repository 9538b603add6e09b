//! What ACPI's interpreter in the guest does when a device or a processor comes or goes: it reads the registers of [`crate::plug`] and tells
//! the kernel's drivers.
//!
//! ```text
//! interrupt ─▶ \_SB.GED._EVT ─┬─▶ \_SB.PCI0.SCAN ─▶ Notify(\_SB.PCI0.Sxx, come or go), Notify(\_SB.VGEN, changed)
//!                             └─▶ \_SB.CPUS.SCAN ─▶ Notify(\_SB.CPUS.Cxxx, come or go)
//! the kernel, when it has let go ─▶ _EJ0 of the object ─▶ the register GONE, or that of processors
//! ```

use acpi_tables::Aml;
use acpi_tables::aml::{self, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, OpRegionSpace, Path};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::{bytes, layout};
use crate::plug::{COME, DEVICE_CHECK, EJECT_REQUEST, GO, GONE, NEWS, PRESENT, PROCESSOR, PROCESSOR_GONE, RESTORED};

/// The registers by their names in the namespace, in their order; each has 32 bits, without gaps.
const REGISTERS: [(&[u8; 4], u16); 7] = [
    (b"COME", COME),
    (b"GO__", GO),
    (b"GONE", GONE),
    (b"CSEL", PROCESSOR),
    (b"CSTA", PRESENT),
    (b"CNEW", NEWS),
    (b"CGON", PROCESSOR_GONE),
];

/// `Notify` of the generation counter: it has changed (Microsoft, Virtual Machine Generation ID).
const GENERATION_CHANGED: u8 = 0x80;

/// What is encoded already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

/// A device's name on the bus.
fn slot(number: u8) -> String {
    format!("S{number:02X}_")
}

/// A processor's name in its container.
fn processor(number: u8) -> String {
    format!("C{number:03X}")
}

/// Adds what comes and goes to a namespace that has the PCI root: the slots of its bus, and the processors of `later` beside those that are
/// there from the start.
pub(super) fn put(put: &mut impl FnMut(&dyn Aml), later: std::ops::Range<u8>) {
    put_registers(put);
    for number in 1..32 {
        put_slot(put, number);
    }
    put_slot_scan(put);
    let has_processors = !later.is_empty();
    if has_processors {
        put_processors(put, later);
    }
    let interrupt = aml::Interrupt::new(true, false, false, false, layout::PLUG_IRQ);
    let resources = aml::ResourceTemplate::new(vec![&interrupt]);
    let devices = aml::MethodCall::new(Path::new("\\_SB_.PCI0.SCAN"), Vec::new());
    let processors = aml::MethodCall::new(Path::new("\\_SB_.CPUS.SCAN"), Vec::new());
    let mut scans: Vec<&dyn Aml> = vec![&devices];
    if has_processors {
        scans.push(&processors);
    }
    put(&aml::Device::new(
        Path::new("_SB_.GED_"),
        vec![
            &aml::Name::new(Path::new("_HID"), &"ACPI0013"),
            &aml::Name::new(Path::new("_UID"), &aml::ZERO),
            &aml::Name::new(Path::new("_CRS"), &resources),
            &aml::Method::new(Path::new("_EVT"), 1, true, scans),
        ],
    ));
}

fn put_registers(put: &mut impl FnMut(&dyn Aml)) {
    let fields = REGISTERS.map(|(name, _)| FieldEntry::Named(*name, 32)).to_vec();
    let (access, lock, update) = (FieldAccessType::DWord, FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
    let field = aml::Field::new(Path::new("PLUG"), access, lock, update, fields);
    let region = aml::OpRegion::new(Path::new("PLUG"), OpRegionSpace::SystemIO, &layout::PLUG, &layout::PLUG_PORTS);
    put(&aml::Scope::new(Path::new("_SB_"), vec![&region, &field]));
}

fn put_slot(put: &mut impl FnMut(&dyn Aml), number: u8) {
    let (address, bit, gone) = (u32::from(number) << 16, 1_u32 << number, Path::new("GONE"));
    let eject = aml::Store::new(&gone, &bit);
    put(&aml::Device::new(
        Path::new(&format!("_SB_.PCI0.{}", slot(number))),
        vec![
            &aml::Name::new(Path::new("_ADR"), &address),
            &aml::Name::new(Path::new("_SUN"), &number),
            &aml::Method::new(Path::new("_EJ0"), 1, true, vec![&eject]),
        ],
    ));
}

/// The method that reads what has come and is to go, and tells of each.
fn put_slot_scan(put: &mut impl FnMut(&dyn Aml)) {
    let (come, go) = (Path::new("COME"), Path::new("GO__"));
    let read = [aml::Store::new(&aml::Local(0), &come), aml::Store::new(&aml::Local(1), &go)];
    let mut body: Vec<u8> = read.iter().flat_map(|part| bytes(part)).collect();
    let is_set = aml::And::new(&aml::ZERO, &aml::Local(0), &RESTORED);
    let generation = Path::new(&format!("\\{}", super::GENERATION));
    body.extend(bytes(&aml::If::new(&is_set, vec![&aml::Notify::new(&generation, &GENERATION_CHANGED)])));
    for number in 1..32_u8 {
        for (local, event) in [(0, DEVICE_CHECK), (1, EJECT_REQUEST)] {
            let (bit, slot, local) = (1_u32 << number, Path::new(&slot(number)), aml::Local(local));
            let is_set = aml::And::new(&aml::ZERO, &local, &bit);
            body.extend(bytes(&aml::If::new(&is_set, vec![&aml::Notify::new(&slot, &event)])));
        }
    }
    put(&aml::Scope::new(
        Path::new("_SB_.PCI0"),
        vec![&aml::Method::new(Path::new("SCAN"), 0, true, vec![&Raw(body)])],
    ));
}

/// The processors that can come, in a container, with a method that reads what is new of them and tells it.
fn put_processors(put: &mut impl FnMut(&dyn Aml), later: std::ops::Range<u8>) {
    // 15 is there and works, 0 is neither (ACPI 6.5, section 6.3.7).
    let (select, present) = (Path::new("CSEL"), Path::new("CSTA"));
    let selected = aml::Store::new(&select, &aml::Arg(0));
    let state = aml::Multiply::new(&aml::ZERO, &present, &0xf_u8);
    let answer = aml::Return::new(&state);
    let is_there = aml::Method::new(Path::new("STA_"), 1, true, vec![&selected, &answer]);
    let mut parts = Vec::new();
    parts.extend(bytes(&aml::Name::new(Path::new("_HID"), &"ACPI0010")));
    parts.extend(bytes(&aml::Name::new(Path::new("_UID"), &aml::ONE)));
    parts.extend(bytes(&is_there));
    let mut notify = Vec::new();
    for number in later {
        parts.extend(one_processor(number));
        let object = Path::new(&processor(number));
        let is_it = aml::Equal::new(&aml::Local(1), &number);
        notify.extend(bytes(&aml::If::new(&is_it, vec![&aml::Notify::new(&object, &aml::Local(2))])));
    }
    let news = Path::new("CNEW");
    let next = aml::Store::new(&aml::Local(0), &news);
    let number = aml::And::new(&aml::Local(1), &aml::Local(0), &0xffff_u16);
    let event = aml::ShiftRight::new(&aml::Local(2), &aml::Local(0), &16_u8);
    let each: Vec<u8> = [bytes(&number), bytes(&event), notify, bytes(&next)].concat();
    let is_news = aml::NotEqual::new(&aml::Local(0), &aml::ZERO);
    let each = Raw(each);
    let all = aml::While::new(&is_news, vec![&each]);
    parts.extend(bytes(&aml::Method::new(Path::new("SCAN"), 0, true, vec![&next, &all])));
    put(&aml::Device::new(Path::new("_SB_.CPUS"), vec![&Raw(parts)]));
}

fn one_processor(number: u8) -> Vec<u8> {
    let there = aml::MethodCall::new(Path::new("STA_"), vec![&number]);
    let answer = aml::Return::new(&there);
    // As the table of interrupt controllers has it, but that it is there (section 6.2.10).
    let entry = aml::BufferData::new(bytes(&ProcessorLocalApic::new(number, number, EnabledStatus::Enabled)));
    let gone = Path::new("CGON");
    let eject = aml::Store::new(&gone, &number);
    bytes(&aml::Device::new(
        Path::new(&processor(number)),
        vec![
            &aml::Name::new(Path::new("_HID"), &"ACPI0007"),
            &aml::Name::new(Path::new("_UID"), &number),
            &aml::Method::new(Path::new("_STA"), 0, true, vec![&answer]),
            &aml::Name::new(Path::new("_MAT"), &entry),
            &aml::Method::new(Path::new("_EJ0"), 1, true, vec![&eject]),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_have_no_gaps_and_fit() {
        assert!(REGISTERS.iter().zip(0_u16..).all(|((_, offset), index)| *offset == index * 4));
        assert!(REGISTERS.len() as u16 * 4 <= layout::PLUG_PORTS);
    }
}

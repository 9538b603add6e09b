//! x86-64.

mod acpi;
pub(crate) mod boot;
mod cpuid;
pub(crate) mod layout;
mod processor;
mod state;

pub(crate) use acpi::{Count, OFF, write_tables};
pub(crate) use processor::{Processors, create_interrupt_controller};
pub(crate) use state::{Chips, Processor, check_state, clock, registers, tell_of_pause};

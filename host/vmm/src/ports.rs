//! The few ports of a PC that a machine has: serial port, power, reset, panic.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use coracle_monitor_api::Ended;
use serde::{Deserialize, Serialize};
use vm_superio::{Serial, SerialState, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::Error;
use crate::arch::layout;

/// Of ACPI's sleep control register: go into the state whose number is in bits 2 to 4.
const SLEEP_ENABLE: u8 = 1 << 5;
/// A keyboard controller's command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
/// Of the panic port: a guest's kernel has panicked.
const PANICKED: u8 = 1;

/// The serial port as the guest has set it up, for a machine that is saved: divisor, interrupts enabled and identified, line control and
/// status, modem control and status, scratch. Nothing is ever typed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved([u8; 9]);

struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Where the console's bytes go. A pipe that is full takes no more, and the guest does not wait for it.
struct Output(File);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// See the module.
pub(crate) struct Ports {
    /// All processors may write to it at once.
    serial: Option<Mutex<Serial<Line, vm_superio::serial::NoEvents, Output>>>,
}

impl Ports {
    /// With a serial port that writes to `console` and interrupts by the event, or without one.
    pub(crate) fn new(console: Option<(File, EventFd)>) -> Self {
        Self { serial: console.map(|(file, event)| Mutex::new(Serial::new(Line(event), Output(file)))) }
    }

    /// The serial port, where there is one.
    pub(crate) fn save(&self) -> Option<Saved> {
        let state = self.serial.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner).state();
        Some(Saved([
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
        ]))
    }

    /// The ports of a machine that goes on where another was saved.
    ///
    /// # Errors
    /// Where one of both has no serial port, or it can't be as it was.
    pub(crate) fn restored(console: Option<(File, EventFd)>, saved: Option<&Saved>) -> Result<Self, Error> {
        let ((file, event), saved) = match (console, saved) {
            (Some(console), Some(saved)) => (console, saved.0),
            (None, None) => return Ok(Self { serial: None }),
            (found, _) => {
                let has = if found.is_some() { "has" } else { "has no" };
                return Err(Error::Invalid(format!(
                    "the machine {has} console; that which was saved is the other way round"
                )));
            }
        };
        let [baud_divisor_low, baud_divisor_high, interrupt_enable, interrupt_identification, rest @ ..] = saved;
        let [line_control, line_status, modem_control, modem_status, scratch] = rest;
        let state = SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: Vec::new(),
        };
        let serial = Serial::from_state(&state, Line(event), vm_superio::serial::NoEvents, Output(file));
        let serial =
            serial.map_err(|error| Error::Invalid(format!("the serial port can't be as it was: {error:?}")))?;
        Ok(Self { serial: Some(Mutex::new(serial)) })
    }

    /// Interrupts the guest for its serial port, where it has one: it looks whether there is something for it.
    pub(crate) fn interrupt(&self) {
        if let Some(serial) = &self.serial {
            // An eventfd refuses a write only where 2^64 - 2 signals wait already.
            let _ = serial.lock().unwrap_or_else(PoisonError::into_inner).interrupt_evt().trigger();
        }
    }

    /// The guest reads. What is no port reads as ones.
    pub(crate) fn read(&self, port: u16, data: &mut [u8]) {
        let value = match (port, &self.serial) {
            (layout::SERIAL..=0x3ff, Some(serial)) if data.len() == 1 => {
                let offset = u8::try_from(port - layout::SERIAL).unwrap_or(0);
                serial.lock().unwrap_or_else(PoisonError::into_inner).read(offset)
            }
            // The events that a panic port knows.
            (layout::PANIC, _) => PANICKED,
            // Nothing has woken the machine; the keyboard controller is never busy.
            (layout::SLEEP_STATUS | layout::SLEEP_CONTROL | layout::KEYBOARD, _) => 0,
            _ => 0xff,
        };
        data.fill(value);
    }

    /// The guest writes. The machine's end, where the write is that.
    pub(crate) fn write(&self, port: u16, data: &[u8]) -> Option<Ended> {
        let &[value] = data else { return None };
        match (port, &self.serial) {
            (layout::SERIAL..=0x3ff, Some(serial)) => {
                let offset = u8::try_from(port - layout::SERIAL).unwrap_or(0);
                // What can't be written to the console is lost, and the guest goes on.
                let _ = serial.lock().unwrap_or_else(PoisonError::into_inner).write(offset, value);
                None
            }
            (layout::SLEEP_CONTROL, _) if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == crate::arch::OFF => {
                Some(Ended::Shutdown)
            }
            (layout::RESET, _) if value == 1 => Some(Ended::Reset),
            (layout::KEYBOARD, _) if value == PULSE_RESET => Some(Ended::Reset),
            (layout::PANIC, _) if value & PANICKED != 0 => Some(Ended::Panicked),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ends_are_told_apart() {
        let ports = Ports::new(None);
        assert_eq!(ports.write(layout::SLEEP_CONTROL, &[5 << 2 | 1 << 5]), Some(Ended::Shutdown));
        assert_eq!(ports.write(layout::SLEEP_CONTROL, &[3 << 2 | 1 << 5]), None);
        assert_eq!(ports.write(layout::RESET, &[1]), Some(Ended::Reset));
        assert_eq!(ports.write(layout::KEYBOARD, &[0xfe]), Some(Ended::Reset));
        assert_eq!(ports.write(layout::PANIC, &[1]), Some(Ended::Panicked));
        for port in 0..=u16::MAX {
            assert_eq!(ports.write(port, &[0]), None);
            assert_eq!(ports.write(port, &[1, 1]), None);
            ports.read(port, &mut [0; 8]);
        }
    }
}

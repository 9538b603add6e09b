//! Machines that are saved, and others that go on where they stood.
//!
//! ```text
//! state    head: what it is, version, length, checksum ─▶ JSON: shape, processors, chips, devices
//! memory   the guest's memory, part behind part, with holes where there are zeros ─▶ the number that is in the state, too
//! ```
//!
//! A machine that goes on maps the file of its memory for itself alone: nothing of it is read before the guest touches it, and any number of
//! machines share what none of them has written. What knows more of a guest than these files can hold is refused before the machine is
//! touched: servers of file systems, the kernel's own servers of links, devices of the host's.
//!
//! The files are the host's. They may be another version's, another machine's, cut off or edited: each is refused with what is wrong with it.
//! Who writes a state with a checksum of its own gets a guest in that state, and a guest may do what it likes already.

mod file;
mod memory;

use std::fs::File;

use coracle_monitor_api as api;
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::Error;
use crate::arch::{self, layout};
use crate::machine::Machine;
use crate::memory::Memory;
use crate::nursery;
use crate::pci;
use crate::plug;
use crate::ports;
use crate::vcpu;

/// By what state and memory know that they belong to each other.
type Number = [u8; 16];

/// What a machine must have in common with the one whose place it takes, beside its devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    cpus: u32,
    cpus_max: u32,
    memory_mib: u64,
    growth_mib: u64,
    sealed: bool,
    console: bool,
}

impl Shape {
    pub(crate) fn of(spec: &api::Machine) -> Self {
        Self {
            cpus: spec.cpus,
            cpus_max: spec.cpus_max,
            memory_mib: spec.memory_mib,
            growth_mib: spec.growth_mib,
            sealed: spec.access_platform,
            console: spec.console,
        }
    }

    /// What differs, for people.
    fn differences(&self, saved: &Self) -> Vec<String> {
        let pairs = [
            ("processors", u64::from(self.cpus), u64::from(saved.cpus)),
            ("processors at most", self.cpus_max.into(), saved.cpus_max.into()),
            ("MiB of memory", self.memory_mib, saved.memory_mib),
            ("MiB that it can gain", self.growth_mib, saved.growth_mib),
            ("sealed", self.sealed.into(), saved.sealed.into()),
            ("console", self.console.into(), saved.console.into()),
        ];
        let differing = pairs.into_iter().filter(|(_, own, saved)| own != saved);
        differing.map(|(what, own, saved)| format!("{what}: {saved} then, {own} now")).collect()
    }
}

/// A machine that is saved.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    number: Number,
    shape: Shape,
    processors: Vec<arch::Processor>,
    /// Those that the guest has let go of.
    parked: Vec<usize>,
    chips: arch::Chips,
    plug: plug::Saved,
    serial: Option<ports::Saved>,
    /// Of each slot of the bus.
    devices: Vec<Option<pci::Saved>>,
}

/// Whether a state can be read, whose checksum is right.
#[cfg(feature = "fuzzing")]
pub(crate) fn is_state(body: &[u8]) -> bool {
    file::take_body(body).is_ok()
}

/// A saved machine whose place is taken.
pub(crate) struct Snapshot {
    state: State,
    memory: File,
}

impl Snapshot {
    /// From its files, for a machine of this description.
    ///
    /// # Errors
    /// Where they are no such machine's: why.
    pub(crate) fn open(state: &File, memory: File, spec: &api::Machine) -> Result<Self, Error> {
        if spec.shared || spec.huge_pages {
            return Err(not_private());
        }
        let state = file::read(state)?;
        let differences = Shape::of(spec).differences(&state.shape);
        if !differences.is_empty() {
            return Err(Error::Invalid(format!("the saved machine is another one ({})", differences.join("; "))));
        }
        let (boot, most) = (spec.cpus as usize, spec.cpus_max.max(spec.cpus) as usize);
        if !(boot..=most).contains(&state.processors.len()) {
            return Err(Error::Invalid(format!("a machine with {} processors was saved", state.processors.len())));
        }
        memory::check(&memory, (spec.memory_mib + spec.growth_mib) << 20, &state.number)?;
        Ok(Self { state, memory })
    }

    /// Its memory, for this machine alone.
    pub(crate) fn memory(
        &self,
        ram: &[(u64, u64)],
        growth: Option<(u64, u64)>,
        nodes: &[u32],
    ) -> Result<Memory, Error> {
        Memory::saved(ram, growth, &self.memory, nodes)
    }

    /// How many processors it had made.
    pub(crate) fn processors(&self) -> u8 {
        u8::try_from(self.state.processors.len()).unwrap_or(u8::MAX)
    }

    /// Those that the guest has let go of.
    pub(crate) fn parked(&self) -> impl Iterator<Item = usize> + '_ {
        self.state.parked.iter().copied()
    }

    pub(crate) fn serial(&self) -> Option<&ports::Saved> {
        self.state.serial.as_ref()
    }

    /// Whether this host's processors are such as the guest found.
    pub(crate) fn check_processors(&self, factory: &arch::Processors) -> Result<(), Error> {
        self.state.chips.check(&factory.cpuid(0)?)
    }

    /// Puts a machine that was just made, and does not run yet, into its state.
    pub(crate) fn put(self, maker: &nursery::Maker, processors: &[VcpuFd]) -> Result<(), Error> {
        let (vm, shared) = (&maker.vm, &maker.shared);
        for (number, (state, processor)) in self.state.processors.iter().zip(processors).enumerate() {
            state.put(processor, number == 0)?;
        }
        self.state.chips.put(vm)?;
        // Behind the processors, whose APICs take the interrupts of devices.
        shared.bus.restore(&self.state.devices)?;
        shared.plug.restore(self.state.plug)?;
        // Whatever it was about to tell when the machine was saved.
        shared.ports.interrupt();
        self.state.chips.put_clock(vm)
    }
}

/// Gives the machine a number that no other has: whoever reads it again and finds another knows that it goes on elsewhere.
pub(crate) fn write_generation(memory: &Memory) -> Result<(), Error> {
    let place = GuestAddress(layout::GENERATION);
    let written = memory.ram.write_slice(&random_number()?, place);
    written.map_err(|_| Error::Invalid("the machine has too little memory".into()))
}

fn random_number() -> Result<Number, Error> {
    let mut number = Number::default();
    let filled = rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty());
    filled.map_err(Error::system("get random bytes"))?;
    Ok(number)
}

fn not_private() -> Error {
    Error::Invalid("a machine can't be saved whose memory other processes map, or is of huge pages".into())
}

impl Machine {
    /// Saves the machine into two files. Nothing goes on in it meanwhile; after that it runs again, if it ran before.
    ///
    /// # Errors
    /// Where it can't be saved, which is found out before it is touched, but for a guest that runs virtual machines itself; or the files
    /// can't be written. It goes on all the same.
    pub(crate) fn save(&mut self, state: &File, memory: &File) -> Result<(), Error> {
        let shape = self.shape.clone().ok_or_else(not_private)?;
        arch::check_state(&self.makes_processors.vm)?;
        let mut occupied = Vec::new();
        for (slot, number) in self.shared.bus.slots().iter().zip(1..) {
            let place = slot.place();
            occupied.push(place.is_some());
            if let Some(place) = place.as_ref().filter(|place| place.function.save().is_none()) {
                let name = place.function.name();
                return Err(Error::Invalid(format!(
                    "the machine can't be saved: of its device {number} ({name}) others know something, too"
                )));
            }
        }
        let was_paused = self.is_paused();
        self.pause();
        let saved = self.save_all(shape, &occupied, state, memory);
        if !was_paused {
            self.resume();
        }
        saved
    }

    fn save_all(&self, shape: Shape, occupied: &[bool], state_file: &File, memory_file: &File) -> Result<(), Error> {
        let (number, maker) = (random_number()?, &self.makes_processors);
        // Before the devices are held: a processor may have to ask one for the rest of what it was about to read.
        let processors = vcpu::states(&self.processors, &self.shared)?;
        let clock = arch::clock(&maker.vm)?;
        // Disks have threads of their own. What they have done since, and told by an interrupt, the other machine's devices tell again.
        let held = self.shared.bus.hold();
        if held.iter().map(|place| place.is_some()).ne(occupied.iter().copied()) {
            return Err(Error::Invalid("the guest has let go of a device that it was asked for: try again".into()));
        }
        memory::write(memory_file, &self.memory.map, &self.maker.reach.parts(), &number)?;
        let devices = held.iter().map(|place| place.as_ref().and_then(|place| place.function.save())).collect();
        let state = State {
            number,
            shape,
            processors,
            parked: vcpu::parked(&self.shared),
            chips: arch::Chips::of(&maker.vm, &maker.factory.cpuid(0)?, clock)?,
            plug: self.shared.plug.save(),
            serial: self.shared.ports.save(),
            devices,
        };
        file::write(state_file, &state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named() {
        let shape = Shape { cpus: 1, cpus_max: 4, memory_mib: 256, growth_mib: 1024, sealed: false, console: true };
        assert!(shape.differences(&shape).is_empty());
        let other = Shape { memory_mib: 512, console: false, ..shape.clone() };
        assert_eq!(shape.differences(&other), ["MiB of memory: 512 then, 256 now", "console: 0 then, 1 now"]);
    }
}

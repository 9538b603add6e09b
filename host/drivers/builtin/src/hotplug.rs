//! Devices that a running machine gains and loses: the monitor tells its guest of them by ACPI.

use std::time::Duration;

use coracle_machine::{Device, DeviceKind, Error, Limits, MachineSpec, Rate, Result};
use coracle_monitor_api::{self as api, Answer, Request};

use crate::control::{Client, Failure};
use crate::describe::{Descriptors, plugged};
use crate::vfio::{self, Passed};

/// How long the guest may take to let go of a device.
const EJECT_PATIENCE: Duration = Duration::from_secs(10);

/// The machine's devices, each with its number on the guest's bus; none where the guest has let go of it after nobody waited any more.
#[derive(Debug)]
pub(crate) struct Hotplug {
    devices: Vec<(Device, Option<u8>)>,
    /// Those from its start.
    from_start: Vec<Device>,
    /// Places that nobody asks for: that of the memory that it can gain.
    own: usize,
    cpus: u32,
    /// Those of the host's.
    passed: Passed,
    /// The monitor's process, and the most memory that its guest has, in bytes.
    monitor: i32,
    memory_bytes: u64,
}

/// Places on the guest's bus.
const SLOTS: usize = 31;

/// Why it could not be.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The monitor says so, or is gone.
    Monitor(Failure),
    /// It can't be.
    Error(Error),
}

pub(crate) type Outcome<T> = std::result::Result<T, Refused>;

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::Monitor(failure)
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// Whether both would have one name in the guest, or are the same thing of the host's.
fn are_one(one: &Device, other: &Device) -> bool {
    match (one, other) {
        (Device::Block { serial: one, .. }, Device::Block { serial: other, .. }) if one == other => true,
        (Device::Balloon, Device::Balloon) => true,
        (Device::SharedFs { tag: one, .. }, Device::SharedFs { tag: other, .. }) => one == other,
        _ => one.is_same(other),
    }
}

/// The most memory that a machine of this specification has, in bytes.
pub(crate) fn most_bytes(spec: &MachineSpec) -> u64 {
    spec.memory.max_mib.max(spec.memory.size_mib) << 20
}

/// Where the guest finds the device of a number, as [`coracle_machine::Machine::attach`] gives it.
pub(crate) fn place(number: u8) -> String {
    format!("{number:02x}")
}

impl Hotplug {
    /// Of a machine as it is from its start.
    pub(crate) fn of(spec: &MachineSpec, passed: Passed, monitor: i32) -> Self {
        let devices = spec.devices.iter().cloned().zip((1..).map(Some)).collect();
        let from_start = spec.devices.clone();
        let own = usize::from(spec.memory.max_mib > spec.memory.size_mib);
        Self { devices, from_start, own, cpus: spec.cpus.boot, passed, monitor, memory_bytes: most_bytes(spec) }
    }

    /// Whether the machine has the devices of its start, in their places, and no others.
    pub(crate) fn is_as_from_start(&mut self, control: &Client) -> bool {
        self.see_what_has_gone(control);
        let mut from_start = self.from_start.iter().zip(1_u8..);
        let is_there = |device: &Device, number| {
            self.devices.iter().any(|(other, found)| other == device && *found == Some(number))
        };
        self.devices.len() == self.from_start.len() && from_start.all(|(device, number)| is_there(device, number))
    }

    fn number(&self, device: &Device) -> Result<Option<u8>> {
        let found = self.devices.iter().find(|(other, _)| are_one(other, device));
        found.map(|(_, number)| *number).ok_or_else(|| {
            let name = match device {
                Device::Block { serial, .. } => format!("disk {serial}"),
                Device::SharedFs { tag, .. } => format!("file system {tag}"),
                Device::Vfio { address, .. } => format!("PCI device {address}"),
                Device::Net { mac, .. } => format!("network link {}", coracle_machine::mac_text(*mac)),
                other => format!("device {:?}", other.kind()),
            };
            Error::Invalid(format!("the machine has no {name}"))
        })
    }

    /// Adds a device, and gives its place. The guest sees it a moment later.
    pub(crate) async fn attach(&mut self, control: &Client, device: &Device) -> Outcome<Option<String>> {
        self.see_what_has_gone(control);
        if let Ok(Some(_)) = self.number(device) {
            return Err(Error::Invalid(format!("the machine has this {:?} already", device.kind())).into());
        }
        if self.devices.iter().filter(|(_, number)| number.is_some()).count() + self.own >= SLOTS {
            return Err(Error::Unsupported(format!("more than {SLOTS} devices")).into());
        }
        if device.kind() == DeviceKind::Vfio {
            vfio::allow_to_keep(self.monitor, self.memory_bytes)?;
        }
        let mut descriptors = Descriptors::sent();
        let described = plugged(device, self.cpus, &mut descriptors, &mut self.passed)?;
        let request = Request::Attach { device: described, descriptors: descriptors.all.len() };
        let number = match control.ask_with(&request, &descriptors.all).await {
            Ok(Answer::Attached(number)) => number,
            other => {
                self.passed.give_back(device);
                other?;
                return Err(Error::Monitor("the monitor has not answered what it was asked".into()).into());
            }
        };
        for (other, _) in self.devices.extract_if(.., |(_, other)| *other == Some(number)) {
            // Only what has gone, meanwhile, leaves its number to another.
            self.passed.give_back(&other);
        }
        self.devices.retain(|(other, _)| !are_one(other, device));
        self.devices.push((device.clone(), Some(number)));
        Ok(Some(place(number)))
    }

    /// Takes a device out, once the guest has let go of it. One that it keeps can be asked for again.
    pub(crate) async fn detach(&mut self, control: &Client, device: &Device) -> Outcome<()> {
        self.see_what_has_gone(control);
        if let Some(number) = self.number(device)? {
            let asked = control.ask(&Request::Detach { number }).await;
            if !control.has_ejected(number) {
                asked?;
            }
            match tokio::time::timeout(EJECT_PATIENCE, control.ejected(number)).await {
                Ok(ejected) => ejected?,
                Err(_) => return Err(Error::Monitor(format!("the guest keeps the device {number:02x}")).into()),
            }
        }
        self.devices.retain(|(other, _)| !are_one(other, device));
        self.passed.give_back(device);
        Ok(())
    }

    /// Takes note of what the guest has let go of after nobody waited for it any more.
    fn see_what_has_gone(&mut self, control: &Client) {
        for (device, number) in &mut self.devices {
            if number.take_if(|number| control.has_ejected(*number)).is_some() {
                self.passed.give_back(device);
            }
        }
    }

    /// Holds a disk or a link to these rates.
    pub(crate) async fn limit(&self, control: &Client, device: &Device, limits: Limits) -> Outcome<()> {
        let gone = || Error::Invalid("the guest has let go of this device".into());
        let number = self.number(device)?.ok_or_else(gone)?;
        let rate = |rate: Rate| api::Rate {
            bytes_per_second: rate.bytes_per_second,
            operations_per_second: rate.operations_per_second,
        };
        let Limits { to_guest, from_guest } = limits;
        control.ask(&Request::Limit { number, to_guest: rate(to_guest), from_guest: rate(from_guest) }).await?;
        Ok(())
    }

    /// Gives a disk, or the balloon, so many bytes.
    pub(crate) async fn resize(&self, control: &Client, device: &Device, bytes: u64) -> Outcome<()> {
        let gone = || Error::Invalid("the guest has let go of this device".into());
        let number = self.number(device)?.ok_or_else(gone)?;
        control.ask(&Request::ResizeDevice { number, bytes }).await?;
        Ok(())
    }
}

//! QEMU's words for network links, and the descriptors that go with them.

use std::fs::File;
use std::os::fd::OwnedFd;

use coracle_machine::{Accelerator, Descriptor, Device, Error, Forward, MachineSpec, NETS_MAX, Result, mac_text};

use crate::Config;

/// The descriptor of the first network link; the others follow.
pub(crate) const FIRST_FD: i32 = 5;

/// The kernel's server of network devices (linux/vhost.h).
const SERVER: &str = "/dev/vhost-net";

/// QEMU's name for a link of the host's, by its hardware address.
pub(crate) fn name(mac: [u8; 6]) -> String {
    format!("net-{}", mac_text(mac).replace(':', ""))
}

/// Opens the kernel's server once for each of so many pairs of queues. None where the host has none, or the machine's queues can't be
/// served by it: QEMU serves them then.
pub(crate) fn servers(config: &Config, access_platform: bool, pairs: usize) -> Option<Vec<OwnedFd>> {
    // An emulated processor rings no doorbell that a kernel hears; and of what a sealed guest lends, the kernel knows nothing.
    if config.accelerator != Accelerator::Kvm || access_platform {
        return None;
    }
    let open = |_| File::options().read(true).write(true).open(SERVER).map(OwnedFd::from);
    let opened: std::io::Result<Vec<_>> = (0..pairs).map(open).collect();
    opened.inspect_err(|error| log::debug!("QEMU serves network links: {SERVER} can't be opened: {error}")).ok()
}

/// The descriptors of a machine's links, each with the number at which QEMU finds it: the links' own in the order of the devices,
/// then the kernel's servers.
pub(crate) fn descriptors(config: &Config, spec: &MachineSpec) -> Result<Descriptors> {
    let all: Vec<_> = spec.devices.iter().map(ends).filter(|ends| !ends.is_empty()).collect();
    if all.len() > NETS_MAX {
        return Err(Error::Unsupported(format!("more than {NETS_MAX} network devices")));
    }
    let clone = |end: &Descriptor| end.try_clone().map_err(Error::system("hand a network link to QEMU"));
    let mut all: Vec<OwnedFd> = all.into_iter().flatten().map(clone).collect::<Result<_>>()?;
    let servers = servers(config, spec.access_platform, pairs(spec));
    let has_servers = servers.is_some();
    all.extend(servers.into_iter().flatten());
    Ok(Descriptors { all: (FIRST_FD..).zip(all).collect(), has_servers })
}

/// The descriptors of a device that are for a link.
fn ends(device: &Device) -> &[Descriptor] {
    match device {
        Device::Net { taps, .. } => taps,
        Device::NetStream { stream, .. } => std::slice::from_ref(stream),
        _ => &[],
    }
}

/// See [`descriptors`].
pub(crate) struct Descriptors {
    pub(crate) all: Vec<(i32, OwnedFd)>,
    /// Whether the kernel serves the taps.
    pub(crate) has_servers: bool,
}

fn pairs(spec: &MachineSpec) -> usize {
    let taps = |device: &Device| if let Device::Net { taps, .. } = device { taps.len() } else { 0 };
    spec.devices.iter().map(taps).sum()
}

/// Gives each link of a machine the numbers of its descriptors, in the order of the devices.
pub(crate) struct Numbers {
    own: i32,
    server: Option<i32>,
}

impl Numbers {
    pub(crate) fn of(spec: &MachineSpec, has_servers: bool) -> Self {
        let streams = spec.devices.iter().filter(|device| matches!(device, Device::NetStream { .. })).count();
        let own = i32::try_from(pairs(spec) + streams).unwrap_or(i32::MAX);
        Self { own: FIRST_FD, server: has_servers.then(|| FIRST_FD.saturating_add(own)) }
    }

    /// What is behind a link, in QEMU's words; and how many pairs of queues it has.
    pub(crate) fn end(&mut self, device: &Device) -> (String, usize) {
        match device {
            Device::NetUser { forwards, .. } => (user(forwards), 1),
            Device::NetStream { .. } => {
                (format!("stream,addr.type=fd,addr.str={},server=off", take(&mut self.own, 1)), 1)
            }
            Device::Net { taps, .. } => {
                let count = taps.len();
                let option = |one: &str, several: &str, text: String| {
                    let word = if count > 1 { several } else { one };
                    format!("{word}={text}")
                };
                let mut text = format!("tap,{}", option("fd", "fds", take(&mut self.own, count)));
                if let Some(server) = &mut self.server {
                    text.push_str(&format!(",vhost=on,{}", option("vhostfd", "vhostfds", take(server, count))));
                }
                (text, count)
            }
            _ => (String::new(), 0),
        }
    }
}

/// The next so many numbers, with colons between them.
fn take(next: &mut i32, count: usize) -> String {
    let numbers: Vec<String> = (*next..).take(count).map(|number| number.to_string()).collect();
    *next = next.saturating_add(i32::try_from(count).unwrap_or(0));
    numbers.join(":")
}

/// What the device of a link with so many pairs of queues is told beside the rest.
pub(crate) fn queues(pairs: usize, is_pci: bool) -> String {
    match (pairs, is_pci) {
        (..=1, _) => String::new(),
        (_, false) => ",mq=on".into(),
        // An interrupt for each queue, one for the queue of control, and one for changes of the configuration.
        (_, true) => format!(",mq=on,vectors={}", vectors(pairs)),
    }
}

/// The interrupts of a device with so many pairs of queues.
pub(crate) fn vectors(pairs: usize) -> usize {
    2 * pairs + 2
}

/// QEMU's own network, with the addresses that it has where nobody gives others.
fn user(forwards: &[Forward]) -> String {
    let mut text = "user,ipv6=off".to_owned();
    for Forward { is_udp, host, guest } in forwards {
        let protocol = if *is_udp { "udp" } else { "tcp" };
        text.push_str(&format!(",hostfwd={protocol}:{host}-:{guest}"));
    }
    text
}

//! QEMU's words for a machine's devices.

use std::ffi::OsString;

use coracle_machine::{Device, Error, MachineSpec, Result, mac_text};

use crate::command::{Found, VHOST_FD, VsockKind};
use crate::handed::Handed;
use crate::{Config, MachineType, net, vfio};

/// The bus for what is added while the machine runs, by QEMU's name: on the first one nothing can be. It is there from the start,
/// and has room for 31 devices.
pub(crate) const HOTPLUG_BUS: &str = "hotplug";
/// The bridge's slot on the first bus, and those on it: the first is its own.
pub(crate) const HOTPLUG_SLOT: u8 = 0x1e;
pub(crate) const HOTPLUG_SLOTS: std::ops::RangeInclusive<u8> = 1..=31;

/// Whether this machine has such a bus.
pub(crate) fn has_hotplug(config: &Config, spec: &MachineSpec) -> bool {
    config.machine_type == MachineType::Q35 && !spec.access_platform
}

/// Adds the arguments for all devices.
pub(crate) fn add(
    arguments: &mut Vec<OsString>,
    config: &Config,
    spec: &MachineSpec,
    (vsock, handed): (VsockKind, &Handed),
    found: &Found,
) -> Result<()> {
    let pci = config.machine_type == MachineType::Q35;
    // Those with places of their own first: QEMU puts the others around them.
    vfio::add(arguments, spec, handed.iommufd)?;
    let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| OsString::from(*word)));
    let bus = |device: &str| format!("{device}-{}", if pci { "pci" } else { "device" });
    let access = if spec.access_platform { ",iommu_platform=on" } else { "" };
    let modern = format!("{}{access}", if pci { ",disable-legacy=on" } else { "" });
    let mut numbers = net::Numbers::of(spec, found.has_net_servers);
    let mut slots = HOTPLUG_SLOTS;
    if has_hotplug(config, spec) {
        add(&["-device", &format!("pcie-pci-bridge,id={HOTPLUG_BUS},bus=pcie.0,addr={HOTPLUG_SLOT:#x}")]);
    }
    for (number, device) in spec.devices.iter().enumerate() {
        match device {
            Device::Balloon => {
                let balloon = bus("virtio-balloon");
                add(&["-device", &format!("{balloon},free-page-reporting=on,deflate-on-oom=on{modern}")]);
            }
            Device::Rng => add(&["-device", &format!("{}{modern}", bus("virtio-rng"))]),
            Device::Vsock => match vsock {
                VsockKind::Kernel(cid) => {
                    add(&["-device", &format!("{},guest-cid={cid},vhostfd={VHOST_FD}{modern}", bus("vhost-vsock"))]);
                }
                VsockKind::Server => {
                    let number = handed.vsock.unwrap_or(-1);
                    add(&["-chardev", &format!("socket,id=vsock,fd={number}")]);
                    add(&["-device", &format!("{},chardev=vsock{access}", bus("vhost-user-vsock"))]);
                }
            },
            Device::SharedFs { tag, queue_size, .. } => {
                add(&["-chardev", &format!("socket,id=fs{number},fd={}", handed.device(number))]);
                let fs = bus("vhost-user-fs");
                add(&["-device", &format!("{fs},chardev=fs{number},tag={tag},queue-size={queue_size}{access}")]);
            }
            Device::Net { mac, .. } | Device::NetStream { mac, .. } | Device::NetUser { mac, .. } => {
                let (end, pairs) = numbers.end(device);
                // Without the ROM for booting over the network, which is a package of its own.
                let rom = if pci { ",romfile=" } else { "" };
                // A link of the host's may go while the machine runs.
                let (name, place) = match (net::name(*mac), device) {
                    (name, Device::Net { .. }) if has_hotplug(config, spec) => {
                        let slot = slots.next().ok_or_else(no_slot)?;
                        (name.clone(), format!(",id={name},bus={HOTPLUG_BUS},addr={slot:#x}"))
                    }
                    _ => (format!("net{number}"), String::new()),
                };
                let (net, mac) = (bus("virtio-net"), mac_text(*mac));
                add(&["-netdev", &format!("{end},id={name}")]);
                let queues = net::queues(pairs, pci);
                add(&["-device", &format!("{net},netdev={name},mac={mac}{queues}{place}{rom}{modern}")]);
            }
            Device::Block { read_only, direct, serial, .. } => {
                let on = |flag: bool| if flag { "on" } else { "off" };
                let (node, kind, discard) = (disk_name(serial)?, handed.driver(number), discard(*read_only));
                let set = handed.device(number);
                add(&["-add-fd", &format!("fd={set},set={set}")]);
                add(&[
                    "-blockdev",
                    &format!(
                        "driver=raw,node-name={node},read-only={},discard={discard},cache.direct={},\
                         file.driver={kind},file.filename=/dev/fdset/{set}",
                        on(*read_only),
                        on(*direct)
                    ),
                ]);
                let disk = bus("virtio-blk");
                add(&["-device", &format!("{disk},id={node},drive={node},serial={serial}{modern}")]);
            }
            Device::Vfio { .. } if vfio::is_possible(config, spec) => {}
            other => return Err(Error::Unsupported(format!("the device {:?}", other.kind()))),
        }
    }
    Ok(())
}

/// Where no place is left.
pub(crate) fn no_slot() -> Error {
    let count = HOTPLUG_SLOTS.count();
    Error::Unsupported(format!("more than {count} links and disks that come and go"))
}

/// QEMU's name for a disk, by its serial number.
pub(crate) fn disk_name(serial: &str) -> Result<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if serial.is_empty() || serial.len() > SERIAL_BYTES_MAX || !serial.bytes().all(is_plain) {
        return Err(Error::Invalid(format!("{serial:?} is no serial number of a disk")));
    }
    Ok(format!("disk-{serial}"))
}

/// The most bytes that a virtio disk has for its serial number (virtio 1.3, 5.2.6, `VIRTIO_BLK_T_GET_ID`).
const SERIAL_BYTES_MAX: usize = 20;

/// What QEMU does with what the guest frees: it is freed on the host.
pub(crate) fn discard(read_only: bool) -> &'static str {
    if read_only { "ignore" } else { "unmap" }
}

//! Devices that a running machine gains and loses: ACPI tells its guest of them.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::Duration;

use coracle_machine::{Descriptor, Device, DeviceKind, Error, Limits, MachineSpec, PciAddress, Result};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::devices::{HOTPLUG_BUS, HOTPLUG_SLOT, HOTPLUG_SLOTS, discard, disk_name, no_slot};
use crate::events::{DEVICES, reported};
use crate::{Config, handed, net, qmp, vfio};

/// How long the guest may take to let go of a device.
const EJECT_PATIENCE: Duration = Duration::from_secs(10);

/// A QEMU that is a user of its own: what it was given of the host's devices, and what of its memory it must be able to keep in place for them.
#[derive(Debug)]
pub(crate) struct Jailed {
    pub(crate) given: vfio::Given,
    pub(crate) pid: i32,
    pub(crate) memory_bytes: u64,
}

/// The devices that can go, by QEMU's names, each with its slot on the bridge's bus.
#[derive(Debug)]
pub(crate) struct Hotplug {
    added: HashMap<String, u8>,
    config: Config,
    jailed: Option<Jailed>,
    /// Whether QEMU has what its kernel's IOMMUFD is asked by.
    has_iommufd: bool,
}

impl Hotplug {
    /// Of a machine with these devices: links of the host's are where they can be taken out.
    pub(crate) fn of(config: &Config, spec: &MachineSpec, jailed: Option<Jailed>) -> Self {
        let nets = spec.devices.iter().filter(|device| matches!(device, Device::Net { .. }));
        // In the order of QEMU's arguments.
        let added = nets.filter_map(|device| name(device).ok()).zip(HOTPLUG_SLOTS).collect();
        Self { added, config: config.clone(), jailed, has_iommufd: vfio::wants_iommufd(spec) }
    }

    /// Adds a device, and gives its place. The guest sees it a moment later.
    pub(crate) async fn attach(&mut self, control: &qmp::Client, device: &Device) -> Result<Option<String>> {
        let name = name(device)?;
        let taken: Vec<u8> = self.added.values().copied().collect();
        let slot = HOTPLUG_SLOTS.into_iter().find(|slot| !taken.contains(slot)).ok_or_else(no_slot)?;
        if self.added.contains_key(&name) {
            return Err(Error::Invalid(format!("the machine has the device {name} already")));
        }
        let mut front = match device {
            Device::Block { serial, .. } => {
                add_disk(control, &name, device).await?;
                json!({ "driver": "virtio-blk-pci", "drive": name, "serial": serial })
            }
            Device::Net { mac, taps } => {
                self.add_taps(control, &name, taps).await?;
                let mac = coracle_machine::mac_text(*mac);
                let mut front = json!({ "driver": "virtio-net-pci", "netdev": name, "mac": mac, "romfile": "" });
                if let (Some(front), 2..) = (front.as_object_mut(), taps.len()) {
                    front.insert("mq".into(), true.into());
                    front.insert("vectors".into(), net::vectors(taps.len()).into());
                }
                front
            }
            Device::Vfio { address, by_iommufd } => {
                if let Err(error) = self.let_take(control, *address, *by_iommufd).await {
                    self.take_back(*address);
                    return Err(error);
                }
                vfio::front(*address, *by_iommufd)
            }
            other => return Err(Error::Unsupported(format!("attaching {:?}", other.kind()))),
        };
        if let Some(front) = front.as_object_mut() {
            front.insert("id".into(), name.clone().into());
            front.insert("bus".into(), HOTPLUG_BUS.into());
            front.insert("addr".into(), format!("{slot:#x}").into());
            if device.kind() != DeviceKind::Vfio {
                front.insert("disable-legacy".into(), "on".into());
            }
        }
        if let Err(error) = control.execute("device_add", front).await {
            // The first error is the one to tell.
            let _ = self.remove_back(control, device, &name).await;
            return Err(error.into());
        }
        self.added.insert(name, slot);
        Ok(Some(format!("{HOTPLUG_SLOT:02x}/{slot:02x}")))
    }

    /// Takes a device out that can go, once the guest has let go of it. One that it keeps can be asked for again.
    pub(crate) async fn detach(
        &mut self,
        control: &qmp::Client,
        events: &broadcast::Sender<qmp::Event>,
        device: &Device,
    ) -> Result<()> {
        let name = name(device)?;
        if !self.added.contains_key(&name) {
            return Err(Error::Invalid(format!("the machine has no device {name} that could be taken out")));
        }
        // Listened to before it is asked for.
        let mut events = events.subscribe();
        let end = Instant::now() + EJECT_PATIENCE;
        if is_there(control, &name).await? {
            // Where it was asked before that is refused, and what there is counts.
            let asked = control.execute("device_del", json!({ "id": name })).await;
            while is_there(control, &name).await? {
                let rest = end.saturating_duration_since(Instant::now());
                if rest.is_zero() {
                    let why = asked.err().map(|error| format!(": {error}")).unwrap_or_default();
                    return Err(Error::Monitor(format!("the guest keeps the device {name}{why}")));
                }
                reported(&mut events, "DEVICE_DELETED", Some(&name), rest).await;
            }
        }
        self.remove_back(control, device, &name).await?;
        self.added.remove(&name);
        Ok(())
    }

    /// Lets QEMU take a device of the host's.
    async fn let_take(&mut self, control: &qmp::Client, address: PciAddress, by_iommufd: bool) -> Result<()> {
        if let Some(jailed) = &self.jailed {
            jailed.given.give(address, by_iommufd)?;
            let keep = Error::system("let QEMU keep the guest's memory in place (RLIMIT_MEMLOCK)");
            coracle_process::lock_memory(jailed.pid, jailed.memory_bytes).map_err(keep)?;
        }
        if by_iommufd && !self.has_iommufd {
            let asked = vfio::open_iommufd()?;
            control.execute_with("getfd", json!({ "fdname": "iommufd" }), asked.as_fd()).await?;
            control.execute("object-add", vfio::iommufd()).await?;
            self.has_iommufd = true;
        }
        Ok(())
    }

    fn take_back(&self, address: PciAddress) {
        if let Some(jailed) = &self.jailed {
            jailed.given.take(address);
        }
    }

    /// Takes out what was behind a device.
    async fn remove_back(&self, control: &qmp::Client, device: &Device, name: &str) -> Result<()> {
        match device {
            Device::Net { .. } => drop(control.execute("netdev_del", json!({ "id": name })).await?),
            Device::Vfio { address, .. } => self.take_back(*address),
            _ => drop(control.execute("blockdev-del", json!({ "node-name": name })).await?),
        }
        Ok(())
    }

    /// The end of a network link that is a tap: each of its queues, and the kernel's server of it where there is one.
    async fn add_taps(&self, control: &qmp::Client, name: &str, taps: &[Descriptor]) -> Result<()> {
        let mut ends = Vec::with_capacity(taps.len());
        for tap in taps {
            ends.push(tap.try_clone().map_err(Error::system("hand a network link to QEMU"))?);
        }
        let servers = net::servers(&self.config, false, taps.len());
        let mut netdev = json!({ "type": "tap", "id": name });
        let mut handed = Vec::new();
        let outcome = async {
            for (option, fds) in [("fd", Some(&ends)), ("vhostfd", servers.as_ref())] {
                let Some(fds) = fds else { continue };
                let first = handed.len();
                for (number, fd) in fds.iter().enumerate() {
                    let own = format!("{name}-{option}-{number}");
                    control.execute_with("getfd", json!({ "fdname": own }), fd.as_fd()).await?;
                    handed.push(own);
                }
                let option = if fds.len() > 1 { format!("{option}s") } else { option.to_owned() };
                if let (Some(netdev), Some(own)) = (netdev.as_object_mut(), handed.get(first..)) {
                    netdev.insert(option, own.join(":").into());
                }
            }
            if let (Some(netdev), true) = (netdev.as_object_mut(), servers.is_some()) {
                netdev.insert("vhost".into(), true.into());
            }
            control.execute("netdev_add", netdev).await
        };
        if let Err(error) = outcome.await {
            for own in handed {
                // It is closed where it was not taken.
                let _ = control.execute("closefd", json!({ "fdname": own })).await;
            }
            return Err(error.into());
        }
        Ok(())
    }
}

/// QEMU's name for a device that is added.
fn name(device: &Device) -> Result<String> {
    match device {
        Device::Block { serial, .. } => disk_name(serial),
        Device::Net { mac, .. } => Ok(net::name(*mac)),
        Device::Vfio { address, .. } => Ok(vfio::name(*address)),
        other => Err(Error::Unsupported(format!("attaching or detaching {:?}", other.kind()))),
    }
}

/// Hands a disk's file to QEMU and makes a node of its block layer of it.
async fn add_disk(control: &qmp::Client, name: &str, device: &Device) -> Result<()> {
    let Device::Block { path, read_only, direct, .. } = device else {
        return Err(Error::Invalid(format!("{name} is no disk")));
    };
    let (file, is_device) = handed::disk(path.clone(), *read_only, *direct).await?;
    let told = control.execute_with("add-fd", json!({ "opaque": name }), file.as_fd()).await?;
    let set = told.get("fdset-id").and_then(Value::as_i64);
    let set = set.ok_or_else(|| Error::Monitor("QEMU gave no number to a descriptor".into()))?;
    let node = json!({
        "driver": "raw", "node-name": name, "read-only": read_only, "discard": discard(*read_only),
        "cache": { "direct": direct },
        "file": { "driver": handed::driver(is_device), "filename": format!("/dev/fdset/{set}") },
    });
    let added = control.execute("blockdev-add", node).await;
    handed::let_go(control, set).await?;
    added?;
    Ok(())
}

async fn is_there(control: &qmp::Client, name: &str) -> Result<bool> {
    let folder = DEVICES.trim_end_matches('/');
    let all = control.execute("qom-list", json!({ "path": folder })).await?;
    Ok(all.as_array().into_iter().flatten().any(|one| one.get("name").and_then(Value::as_str) == Some(name)))
}

/// Gives a disk so many bytes, of which it has no more now.
pub(crate) async fn resize_disk(control: &qmp::Client, name: &str, bytes: u64) -> Result<()> {
    let nodes = control.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let is_own = |node: &&Value| node.get("node-name").and_then(Value::as_str) == Some(name);
    let own = nodes.as_array().into_iter().flatten().find(is_own);
    let size = own.and_then(|node| node.pointer("/image/virtual-size")?.as_u64());
    let size = size.ok_or_else(|| Error::Invalid(format!("the machine has no disk {name}")))?;
    if bytes < size {
        return Err(Error::Invalid(format!("the disk {name} has {size} bytes: with {bytes} it would lose some")));
    }
    control.execute("block_resize", json!({ "node-name": name, "size": bytes })).await?;
    Ok(())
}

/// Holds a disk to these rates.
pub(crate) async fn limit_disk(control: &qmp::Client, name: &str, limits: Limits) -> Result<()> {
    if !is_there(control, name).await? {
        return Err(Error::Invalid(format!("the machine has no disk {name}")));
    }
    let Limits { to_guest, from_guest } = limits;
    // On PCI the disk is a part of the device, and what stands behind it is the part's.
    let (device, part) = (format!("{DEVICES}{name}"), format!("{DEVICES}{name}/virtio-backend"));
    let has_part = control.execute("qom-list", json!({ "path": part })).await.is_ok();
    // QEMU takes no more than this of anything (util/throttle.c).
    let most = |rate: u64| rate.min(1_000_000_000_000_000);
    let rates = json!({
        "id": if has_part { part } else { device }, "bps": 0, "iops": 0,
        "bps_rd": most(to_guest.bytes_per_second), "iops_rd": most(to_guest.operations_per_second),
        "bps_wr": most(from_guest.bytes_per_second), "iops_wr": most(from_guest.operations_per_second),
    });
    control.execute("block_set_io_throttle", rates).await?;
    Ok(())
}

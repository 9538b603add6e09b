//! Devices that a running machine gains and loses: ACPI tells its guest of them.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use coracle_machine::{Descriptor, Device, Error, MachineSpec, Result};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::time::Instant;

use crate::devices::{HOTPLUG_BUS, discard, disk_name, file_driver, net_name};
use crate::events::{DEVICES, reported};
use crate::qmp;

/// How long the guest may take to let go of a device.
const EJECT_PATIENCE: Duration = Duration::from_secs(10);

/// The devices that can go, by QEMU's names.
#[derive(Debug)]
pub(crate) struct Hotplug {
    added: HashSet<String>,
}

impl Hotplug {
    /// Of a machine with these devices: links of the host's are where they can be taken out.
    pub(crate) fn of(spec: &MachineSpec) -> Self {
        let nets = spec.devices.iter().filter(|device| matches!(device, Device::Net { .. }));
        Self { added: nets.filter_map(|device| name(device).ok()).collect() }
    }

    /// Adds a device. The guest sees it a moment later.
    pub(crate) async fn attach(&mut self, control: &qmp::Client, device: &Device) -> Result<()> {
        let name = name(device)?;
        if self.added.contains(&name) {
            return Err(Error::Invalid(format!("the machine has the device {name} already")));
        }
        let mut front = match device {
            Device::Block { path, read_only, direct, serial } => {
                let node = block_node(&name, path, *read_only, *direct)?;
                control.execute("blockdev-add", node).await?;
                json!({ "driver": "virtio-blk-pci", "drive": name, "serial": serial })
            }
            Device::Net { mac, tap } => {
                add_tap(control, &name, tap).await?;
                let mac = coracle_machine::mac_text(*mac);
                json!({ "driver": "virtio-net-pci", "netdev": name, "mac": mac, "romfile": "" })
            }
            other => return Err(Error::Unsupported(format!("attaching {:?}", other.kind()))),
        };
        for (key, value) in [("id", &*name), ("bus", HOTPLUG_BUS), ("disable-legacy", "on")] {
            if let Some(front) = front.as_object_mut() {
                front.insert(key.into(), value.into());
            }
        }
        if let Err(error) = control.execute("device_add", front).await {
            // The first error is the one to tell.
            let _ = remove_back(control, device, &name).await;
            return Err(error.into());
        }
        self.added.insert(name);
        Ok(())
    }

    /// Takes a device out that can go, once the guest has let go of it. One that it keeps can be asked for again.
    pub(crate) async fn detach(
        &mut self,
        control: &qmp::Client,
        events: &broadcast::Sender<qmp::Event>,
        device: &Device,
    ) -> Result<()> {
        let name = name(device)?;
        if !self.added.contains(&name) {
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
        remove_back(control, device, &name).await?;
        self.added.remove(&name);
        Ok(())
    }
}

/// QEMU's name for a device that is added.
fn name(device: &Device) -> Result<String> {
    match device {
        Device::Block { serial, .. } => disk_name(serial),
        Device::Net { mac, .. } => Ok(net_name(*mac)),
        other => Err(Error::Unsupported(format!("attaching or detaching {:?}", other.kind()))),
    }
}

/// A node of QEMU's block layer.
fn block_node(name: &str, path: &Path, read_only: bool, direct: bool) -> Result<Value> {
    let file = path.to_str().ok_or_else(|| Error::Invalid(format!("QEMU can't take the path {}", path.display())))?;
    Ok(json!({
        "driver": "raw", "node-name": name, "read-only": read_only, "discard": discard(read_only),
        "cache": { "direct": direct }, "file": { "driver": file_driver(path), "filename": file },
    }))
}

/// The end of a network link that is a tap.
async fn add_tap(control: &qmp::Client, name: &str, tap: &Descriptor) -> Result<()> {
    let fd = tap.try_clone().map_err(Error::system("hand a network link to QEMU"))?;
    control.execute_with("getfd", json!({ "fdname": name }), fd.as_fd()).await?;
    let added = control.execute("netdev_add", json!({ "type": "tap", "id": name, "fd": name })).await;
    if let Err(error) = added {
        // It is closed where it was not taken.
        let _ = control.execute("closefd", json!({ "fdname": name })).await;
        return Err(error.into());
    }
    Ok(())
}

/// Takes out what was behind a device.
async fn remove_back(control: &qmp::Client, device: &Device, name: &str) -> Result<()> {
    let (command, arguments) = match device {
        Device::Net { .. } => ("netdev_del", json!({ "id": name })),
        _ => ("blockdev-del", json!({ "node-name": name })),
    };
    control.execute(command, arguments).await?;
    Ok(())
}

async fn is_there(control: &qmp::Client, name: &str) -> Result<bool> {
    let folder = DEVICES.trim_end_matches('/');
    let all = control.execute("qom-list", json!({ "path": folder })).await?;
    Ok(all.as_array().into_iter().flatten().any(|one| one.get("name").and_then(Value::as_str) == Some(name)))
}

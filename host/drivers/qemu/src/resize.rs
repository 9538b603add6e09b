//! A machine that grows and shrinks: memory by virtio-mem, processors by ACPI.

use std::time::Duration;

use coracle_machine::{Error, MachineSpec, Result};
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::command::GROWTH;
use crate::events::{DEVICES, reported};
use crate::qmp;

/// How long the guest may take to take memory without the size having changed, and how long over all of it.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_OVER_ALL: Duration = Duration::from_secs(60);
/// How long it may take to let go of a processor.
const EJECT_PATIENCE: Duration = Duration::from_secs(5);

/// What processors are called that were added, with a number behind it.
const ADDED: &str = "added-cpu";

/// The unit in which a guest of Linux plugs memory, in MiB: two of the pages in which its kernel keeps free memory.
const UNIT_MIB: u64 = 4;

/// A machine's size.
#[derive(Debug)]
pub(crate) struct Size {
    /// Whether it can change.
    grows: bool,
    least_cpus: u32,
    most_cpus: u32,
    least_mib: u64,
    most_mib: u64,
    /// What the guest is to have above the least, in bytes.
    wanted_bytes: u64,
    /// Processors above the least, by QEMU's names for them, the oldest first.
    added: Vec<String>,
}

impl Size {
    pub(crate) fn of(spec: &MachineSpec, grows: bool) -> Self {
        Self {
            grows,
            least_cpus: spec.cpus.boot,
            most_cpus: spec.cpus.max,
            least_mib: spec.memory.size_mib,
            most_mib: spec.memory.max_mib,
            wanted_bytes: 0,
            added: Vec::new(),
        }
    }

    fn memory_bytes(&self) -> u64 {
        (self.least_mib << 20) + self.wanted_bytes
    }

    pub(crate) fn cpus(&self) -> u32 {
        self.least_cpus + u32::try_from(self.added.len()).unwrap_or(0)
    }

    /// Makes it so.
    pub(crate) async fn change(
        &mut self,
        control: &qmp::Client,
        events: &broadcast::Sender<qmp::Event>,
        cpus: u32,
        memory_mib: u64,
    ) -> Result<()> {
        if !self.grows {
            return Err(Error::Unsupported("resizing".into()));
        }
        if !(self.least_cpus..=self.most_cpus).contains(&cpus) {
            let (least, most) = (self.least_cpus, self.most_cpus);
            return Err(Error::Invalid(format!("{cpus} processors: it has {least} at least and {most} at most")));
        }
        if !(self.least_mib..=self.most_mib).contains(&memory_mib) {
            let (least, most) = (self.least_mib, self.most_mib);
            return Err(Error::Invalid(format!("{memory_mib} MiB: it has {least} at least and {most} at most")));
        }
        // A guest can let go of a processor whenever it likes, and one that was asked to may have taken its time.
        self.added = added(control).await?;
        // The guest needs memory for what its processors keep each: that comes first, and goes last.
        if memory_mib << 20 > self.memory_bytes() {
            self.change_memory(control, events, memory_mib).await?;
        }
        while self.cpus() < cpus {
            self.add_cpu(control).await?;
        }
        while self.cpus() > cpus && self.take_cpu(control, events).await? {}
        if (memory_mib << 20) < self.memory_bytes() {
            self.change_memory(control, events, memory_mib).await?;
        }
        Ok(())
    }

    async fn change_memory(
        &mut self,
        control: &qmp::Client,
        events: &broadcast::Sender<qmp::Event>,
        memory_mib: u64,
    ) -> Result<()> {
        let most = self.most_mib - self.least_mib;
        let wanted = (memory_mib - self.least_mib).next_multiple_of(UNIT_MIB).min(most) << 20;
        // Listened to before it is asked for.
        let mut events = events.subscribe();
        let request = json!({ "path": path(), "property": "requested-size", "value": wanted });
        control.execute("qom-set", request).await?;
        let gives = wanted <= self.wanted_bytes;
        self.wanted_bytes = wanted;
        if gives {
            // What is in use the guest can't give, and tries again by itself for as long as less is wanted: nobody waits for that.
            return Ok(());
        }
        let take = async {
            while taken(control).await? < wanted {
                if !reported(&mut events, "MEMORY_DEVICE_SIZE_CHANGE", None, PATIENCE).await {
                    break;
                }
            }
            Ok(())
        };
        // A guest that goes up and down for ever is left alone.
        tokio::time::timeout(PATIENCE_OVER_ALL, take).await.unwrap_or(Ok(()))
    }

    async fn add_cpu(&mut self, control: &qmp::Client) -> Result<()> {
        let all = control.execute("query-hotpluggable-cpus", Value::Null).await?;
        // They come with the highest number first.
        let mut free = all.as_array().into_iter().flatten().rev().filter(|cpu| cpu.get("qom-path").is_none());
        let Some(free) = free.next() else { return Err(Error::Monitor("QEMU has no place for a processor".into())) };
        let name =
            (0..).map(|number| format!("{ADDED}{number}")).find(|name| !self.added.contains(name)).unwrap_or_default();
        let mut device = free.get("props").cloned().unwrap_or_else(|| json!({}));
        if let Some(device) = device.as_object_mut() {
            device.insert("id".into(), name.clone().into());
            device.insert("driver".into(), free.get("type").cloned().unwrap_or_default());
        }
        control.execute("device_add", device).await?;
        self.added.push(name);
        Ok(())
    }

    /// Takes the last processor out; false where the guest keeps it.
    async fn take_cpu(&mut self, control: &qmp::Client, events: &broadcast::Sender<qmp::Event>) -> Result<bool> {
        let Some(name) = self.added.last() else { return Ok(false) };
        let mut events = events.subscribe();
        control.execute("device_del", json!({ "id": name })).await?;
        reported(&mut events, "DEVICE_DELETED", Some(name), EJECT_PATIENCE).await;
        // Which reports were missed nobody knows: what there is counts.
        let before = self.added.len();
        self.added = added(control).await?;
        Ok(self.added.len() < before)
    }
}

/// What the guest has taken above what it has from its start, in bytes.
pub(crate) async fn taken(control: &qmp::Client) -> Result<u64> {
    let size = control.execute("qom-get", json!({ "path": path(), "property": "size" })).await?;
    size.as_u64().ok_or_else(|| Error::Monitor(format!("QEMU says a size of {size}")))
}

/// Processors that were added, by QEMU's names for them, the oldest first.
async fn added(control: &qmp::Client) -> Result<Vec<String>> {
    let all = control.execute("query-hotpluggable-cpus", Value::Null).await?;
    let name = |cpu: &Value| {
        let name = cpu.get("qom-path")?.as_str()?.strip_prefix(DEVICES)?;
        name.strip_prefix(ADDED)?.parse::<u32>().ok().map(|number| (number, name.to_owned()))
    };
    let mut names: Vec<(u32, String)> = all.as_array().into_iter().flatten().filter_map(name).collect();
    names.sort();
    Ok(names.into_iter().map(|(_, name)| name).collect())
}

fn path() -> String {
    format!("{DEVICES}{GROWTH}")
}

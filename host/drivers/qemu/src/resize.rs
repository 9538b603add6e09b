//! A machine that grows and shrinks: memory by virtio-mem, processors by ACPI.

use coracle_machine::{Error, MachineSpec, Result, Sizes};
use serde_json::{Value, json};
use tokio::sync::broadcast;

use crate::command::GROWTH;
use crate::events::{DEVICES, reported};
use crate::qmp;

/// What processors are called that were added, with a number behind it.
const ADDED: &str = "added-cpu";

/// A machine's size.
#[derive(Debug)]
pub(crate) struct Size {
    /// Those that it can have; none where it has one.
    sizes: Option<Sizes>,
    /// What the guest is to have above the least, in bytes.
    wanted_bytes: u64,
    /// Processors above the least, by QEMU's names for them, the oldest first.
    added: Vec<String>,
    least_cpus: u32,
}

impl Size {
    pub(crate) fn of(spec: &MachineSpec, grows: bool) -> Self {
        let sizes = Sizes::of(spec).filter(|_| grows);
        Self { sizes, wanted_bytes: 0, added: Vec::new(), least_cpus: spec.cpus.boot }
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
        let sizes = self.sizes.as_ref().ok_or_else(|| Error::Unsupported("resizing".into()))?;
        let wanted = sizes.gained_bytes(cpus, memory_mib)?;
        // A guest can let go of a processor whenever it likes, and one that was asked to may have taken its time.
        self.added = added(control).await?;
        // The guest needs memory for what its processors keep each: that comes first, and goes last.
        if wanted > self.wanted_bytes {
            self.change_memory(control, events, wanted).await?;
        }
        while self.cpus() < cpus {
            self.add_cpu(control).await?;
        }
        while self.cpus() > cpus && self.take_cpu(control, events).await? {}
        if wanted < self.wanted_bytes {
            self.change_memory(control, events, wanted).await?;
        }
        Ok(())
    }

    async fn change_memory(
        &mut self,
        control: &qmp::Client,
        events: &broadcast::Sender<qmp::Event>,
        wanted: u64,
    ) -> Result<()> {
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
                if !reported(&mut events, "MEMORY_DEVICE_SIZE_CHANGE", None, Sizes::PATIENCE).await {
                    break;
                }
            }
            Ok(())
        };
        // A guest that goes up and down for ever is left alone.
        tokio::time::timeout(Sizes::PATIENCE_OVER_ALL, take).await.unwrap_or(Ok(()))
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
        reported(&mut events, "DEVICE_DELETED", Some(name), Sizes::EJECT_PATIENCE).await;
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

/// What the guest has left of its memory from the start, in bytes, where it leaves some to the host.
pub(crate) async fn left(control: &qmp::Client) -> Result<u64> {
    let said = control.execute("query-balloon", Value::Null).await?;
    let left = said.get("actual").and_then(Value::as_u64);
    left.ok_or_else(|| Error::Monitor(format!("QEMU says of the balloon {said}")))
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

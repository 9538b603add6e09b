//! What of the host's a pod's machine has for containers, disks and PCI devices: from its start, or as long as a container uses it. What
//! several use is there once.

use std::path::{Path, PathBuf};

use coracle_machine::{Device, DeviceKind, Limits, Machine, MachineSpec};
use coracle_protocol::agent::Storage;
use tokio::sync::Mutex;

use crate::{Error, Result};

/// See the module.
#[derive(Debug)]
pub(crate) struct Devices {
    /// What the machine takes while it runs.
    takes: Vec<DeviceKind>,
    /// Files that it has as memory, each with its place in the guest: disks among those from its start.
    as_memory: Vec<(PathBuf, String)>,
    /// What each of its disks may do.
    limits: Limits,
    /// Held while one is attached or detached.
    held: Mutex<Vec<Held>>,
}

#[derive(Debug)]
struct Held {
    device: Device,
    /// Containers that use it.
    users: usize,
    kind: Kind,
    /// Where the guest finds it, where that is known.
    place: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// It stays for as long as the machine.
    FromBoot,
    /// The same, and what it holds may be another's by now: nobody uses it again.
    Spent,
    /// It came with a container, and goes with the last that uses it.
    Added,
}

impl Held {
    fn is(&self, wanted: &Device) -> bool {
        self.device.is_same(wanted)
    }
}

impl Devices {
    /// Those that the machine has from its start, which of them are its memory, and what its disks may do.
    pub(crate) fn new(
        takes: Vec<DeviceKind>,
        from_boot: &[Device],
        as_memory: Vec<(PathBuf, String)>,
        limits: Limits,
    ) -> Self {
        let held = |device: &Device| Held { device: device.clone(), users: 0, kind: Kind::FromBoot, place: None };
        Self { takes, as_memory, limits, held: Mutex::new(from_boot.iter().map(held).collect()) }
    }

    /// Whether a root can be made of these: the machine has them for it, or would take them.
    pub(crate) async fn can_have(&self, wanted: &[Device]) -> bool {
        let held = self.held.lock().await;
        wanted.iter().all(|device| match held.iter().find(|one| one.is(device)) {
            Some(one) if is_readonly(device) => one.device == *device,
            // Two roots can't be written to one disk.
            Some(one) => one.users == 0 && one.kind != Kind::Spent,
            None => self.takes.contains(&device.kind()),
        })
    }

    /// Has the guest read as memory those of a container's disks that its machine has so.
    pub(crate) fn read_as_memory(&self, storages: &mut [Storage]) {
        for (layer, place) in &self.as_memory {
            coracle_storage::read_as_memory(storages, layer, place);
        }
    }

    /// The host's files behind the disks among them.
    pub(crate) async fn paths(&self) -> Vec<PathBuf> {
        self.held.lock().await.iter().filter_map(|one| one.device.path()).map(Into::into).collect()
    }

    /// Gives a container its devices; all of them, or none. Each comes with its place in the guest, where that is known
    /// ([`Machine::attach`]).
    ///
    /// # Errors
    /// What the machine says; [`Error::Unsupported`] where it takes no more.
    pub(crate) async fn attach(&self, machine: &dyn Machine, wanted: &[Device]) -> Result<Vec<Option<String>>> {
        let mut held = self.held.lock().await;
        let mut places = Vec::with_capacity(wanted.len());
        for device in wanted {
            match self.take(&mut held, machine, device).await {
                Ok(place) => places.push(place),
                Err(error) => {
                    let_go(&mut held, machine, wanted.get(..places.len()).unwrap_or_default()).await;
                    return Err(error);
                }
            }
        }
        Ok(places)
    }

    async fn take(&self, held: &mut Vec<Held>, machine: &dyn Machine, wanted: &Device) -> Result<Option<String>> {
        let refused = || refused(wanted);
        // One that the guest has kept is asked for once more.
        if let Some(at) = held.iter().position(|one| one.users == 0 && one.kind == Kind::Added && one.is(wanted)) {
            machine.detach(wanted.clone()).await?;
            held.remove(at);
        }
        match held.iter_mut().find(|one| one.is(wanted)) {
            Some(one) if one.kind == Kind::Spent => Err(refused()),
            Some(one) if one.device == *wanted => {
                one.users += 1;
                Ok(one.place.clone())
            }
            // It is there, and not the same: read-only for one and not for the other.
            Some(_) => Err(Error::Invalid(format!("{} is used by the pod already, and otherwise", shown(wanted)))),
            None if !self.takes.contains(&wanted.kind()) => Err(refused()),
            None => {
                let place = machine.attach(wanted.clone()).await?;
                if let Err(error) = limit(machine, std::slice::from_ref(wanted), self.limits).await {
                    if let Err(error) = machine.detach(wanted.clone()).await {
                        log::warn!("{} stays in the machine: {error}", shown(wanted));
                    }
                    return Err(error);
                }
                held.push(Held { device: wanted.clone(), users: 1, kind: Kind::Added, place: place.clone() });
                Ok(place)
            }
        }
    }

    /// Lets go of a container's devices.
    pub(crate) async fn detach(&self, machine: &dyn Machine, devices: &[Device]) {
        let_go(&mut *self.held.lock().await, machine, devices).await;
    }
}

/// A guest's kernel keeps a 64th of such memory's size of its own, of which it has this part to spare at most.
const PART_OF_MEMORY: u64 = 64 / 8;

/// Whether layers may be memory of a machine with so much from its start: not where disks are held to rates, which memory is not, and not where
/// the guest's own books of them would leave it too little.
fn can_be_memory(layers: &[PathBuf], memory_mib: u64, limits: Limits) -> bool {
    let bytes: u64 = layers.iter().filter_map(|layer| layer.metadata().ok()).map(|data| data.len()).sum();
    limits == Limits::default() && bytes <= (memory_mib << 20) * PART_OF_MEMORY
}

/// Makes the disks of these layers memory of the machine, where they can be that.
pub(crate) fn as_memory(spec: &mut MachineSpec, layers: &[PathBuf], limits: Limits) {
    if !can_be_memory(layers, spec.memory.size_mib, limits) {
        return;
    }
    for device in &mut spec.devices {
        if let Device::Block { path, read_only: true, .. } = device
            && layers.contains(path)
        {
            *device = Device::Pmem { path: std::mem::take(path) };
        }
    }
}

/// The files that are memory of a machine with these devices, each with its place in the guest.
pub(crate) fn places(machine: &dyn Machine, devices: &[Device]) -> Vec<(PathBuf, String)> {
    let place = |device: &Device| match device {
        Device::Pmem { path } => Some((path.clone(), machine.place_of(device)?)),
        _ => None,
    };
    devices.iter().filter_map(place).collect()
}

/// Holds the disks among a machine's devices to what they may do.
///
/// # Errors
/// What the machine says.
pub(crate) async fn limit(machine: &dyn Machine, devices: &[Device], limits: Limits) -> Result<()> {
    if limits == Limits::default() {
        return Ok(());
    }
    for disk in devices.iter().filter(|device| device.kind() == DeviceKind::Block) {
        machine.limit(disk.clone(), limits).await?;
    }
    Ok(())
}

/// What a device is called, for people.
fn shown(device: &Device) -> String {
    match device {
        Device::Vfio { address, .. } => format!("the PCI device {address}"),
        other => format!("the disk {}", other.path().unwrap_or(Path::new("")).display()),
    }
}

/// A device that the machine has not, and takes not.
fn refused(device: &Device) -> Error {
    match device {
        Device::Vfio { address, .. } => Error::Unsupported(format!(
            "the PCI device {address}: the pod's machine, which runs already, takes none. The container that boots it can have it"
        )),
        other => coracle_storage::Error::OnlyDisks(other.path().unwrap_or(Path::new("")).into()).into(),
    }
}

async fn let_go(held: &mut Vec<Held>, machine: &dyn Machine, devices: &[Device]) {
    for device in devices.iter().rev() {
        let Some(at) = held.iter().position(|one| one.device == *device) else { continue };
        let Some(one) = held.get_mut(at) else { continue };
        one.users = one.users.saturating_sub(1);
        match (one.users, one.kind) {
            (0, Kind::Added) => match machine.detach(device.clone()).await {
                Ok(()) => drop(held.remove(at)),
                // It stays in the machine; whoever wants it next asks for it again.
                Err(error) => log::warn!("{} stays in the machine: {error}", shown(device)),
            },
            // Layers are what they are; what was written to may be gone, or another's.
            (0, Kind::FromBoot) if is_written(device) => one.kind = Kind::Spent,
            _ => {}
        }
    }
}

/// Whether it is a disk that is written to.
fn is_written(device: &Device) -> bool {
    matches!(device, Device::Block { read_only: false, .. })
}

fn is_readonly(device: &Device) -> bool {
    matches!(device, Device::Block { read_only: true, .. })
}

#[cfg(test)]
mod tests {
    use coracle_machine::fake::FakeDriver;
    use coracle_machine::{Architecture, Cpus, Driver, Kernel, KernelForm, Memory, MemoryKind, Platform};

    use super::*;

    fn disk(name: &str, read_only: bool) -> Device {
        let path = PathBuf::from(format!("/d/{name}"));
        Device::Block { serial: coracle_storage::serial(&path), path, read_only, direct: false }
    }

    fn spec(folder: &Path) -> MachineSpec {
        MachineSpec {
            name: "m".into(),
            folder: folder.into(),
            architecture: Architecture::X86_64,
            platform: Platform::Plain,
            firmware: None,
            kernel: Kernel { path: folder.into(), form: KernelForm::PvhElf },
            initrd: "".into(),
            command_line: String::new(),
            cpus: Cpus { boot: 1, max: 1 },
            memory: Memory { size_mib: 128, max_mib: 128, kind: MemoryKind::Private, huge_pages: false },
            devices: Vec::new(),
            console: false,
            access_platform: false,
            host_cpus: Vec::new(),
            host_nodes: Vec::new(),
        }
    }

    async fn machine() -> (tempfile::TempDir, Box<dyn Machine>) {
        let folder = tempfile::tempdir().unwrap();
        let spec = spec(folder.path());
        let machine = FakeDriver::new(std::sync::Arc::new(|_| Box::pin(std::future::pending()))).boot(spec).await;
        (folder, machine.unwrap())
    }

    #[test]
    fn layers_stay_disks_where_they_are_large_or_held_to_rates() {
        let folder = tempfile::tempdir().unwrap();
        let layer = folder.path().join("layer");
        std::fs::File::create(&layer).unwrap().set_len(2 << 30).unwrap();
        let can = |memory_mib, limits| can_be_memory(std::slice::from_ref(&layer), memory_mib, limits);
        assert!(can(256, Limits::default()) && !can(255, Limits::default()));
        let rate = coracle_machine::Rate { bytes_per_second: 1, operations_per_second: 0 };
        assert!(!can(256, Limits { to_guest: rate, ..Limits::default() }));
    }

    #[test]
    fn layers_become_memory_and_nothing_else() {
        let devices = [Device::Rng, disk("layer", true), disk("volume", true), disk("writable", false)];
        let mut spec = MachineSpec { devices: devices.to_vec(), ..spec(Path::new("/m")) };
        as_memory(&mut spec, &["/d/layer".into(), "/d/writable".into()], Limits::default());
        assert_eq!(spec.devices[1], Device::Pmem { path: "/d/layer".into() });
        assert_eq!((&spec.devices[0], &spec.devices[2..]), (&devices[0], &devices[2..]));
    }

    #[tokio::test]
    async fn disks_from_boot_are_used_once_where_they_are_written_to() {
        let (_folder, machine) = machine().await;
        let (layer, writable) = (disk("layer", true), disk("writable", false));
        let all = [layer.clone(), writable.clone()];
        let disks = Devices::new(Vec::new(), &all, Vec::new(), Limits::default());
        assert!(disks.can_have(&all).await && !disks.can_have(&[disk("other", true)]).await);
        disks.attach(&*machine, &all).await.unwrap();
        disks.detach(&*machine, &all).await;
        assert!(disks.can_have(std::slice::from_ref(&layer)).await, "a layer is what it is");
        assert!(!disks.can_have(&all).await);
        let refused = disks.attach(&*machine, &all).await.unwrap_err();
        assert!(matches!(&refused, Error::Unsupported(text) if text.contains("/d/writable")), "{refused}");
        // What was given before the one that could not be is given back.
        assert!(disks.held.lock().await.iter().all(|one| one.users == 0));
        assert_eq!(disks.paths().await, [Path::new("/d/layer"), Path::new("/d/writable")]);
        let refused = disks.attach(&*machine, &[disk("layer", false)]).await.unwrap_err();
        assert!(refused.to_string().contains("otherwise"), "{refused}");
    }
}

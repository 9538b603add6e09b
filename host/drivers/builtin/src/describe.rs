//! From the port's specification to the monitor's description, with the descriptors that it names.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use coracle_machine::{Device, DeviceKind, Error, KernelForm, MachineSpec, MemoryKind, Result, Sizes};
use coracle_monitor_api as api;

use crate::snapshot;
use crate::vfio::Passed;

/// The guest's context identifier: there is one guest behind each monitor's sockets.
pub(crate) const GUEST_CID: u32 = 3;
/// The socket on which host programs reach the guest, in the jail's root.
pub(crate) const PROGRAMS_SOCKET: &str = "vsock.sock";

/// Descriptors for the monitor, by the numbers at which it finds them.
#[derive(Debug)]
pub(crate) struct Descriptors {
    pub(crate) all: Vec<OwnedFd>,
    /// The number of the first.
    pub(crate) first: i32,
}

impl Descriptors {
    /// Those that it inherits.
    fn inherited() -> Self {
        Self { all: Vec::new(), first: api::CONTROL_FD + 1 }
    }

    /// Those that come with a message.
    pub(crate) fn sent() -> Self {
        Self { all: Vec::new(), first: 0 }
    }

    pub(crate) fn add(&mut self, fd: impl Into<OwnedFd>) -> i32 {
        self.all.push(fd.into());
        self.first + i32::try_from(self.all.len()).unwrap_or(i32::MAX) - 1
    }
}

/// Describes the machine, which begins with its kernel or where another was saved. `programs` listens in `root`, which becomes the monitor's
/// root, for the user `user`.
pub(crate) fn describe(
    spec: &MachineSpec,
    saved: Option<&Path>,
    programs: UnixListener,
    jail: api::Jail,
    passed: &mut Passed,
) -> Result<(api::Machine, Descriptors)> {
    if spec.firmware.is_some() {
        return Err(Error::Unsupported("firmware".into()));
    }
    refuse_what_can_not_be(spec)?;
    let mut fds = Descriptors::inherited();
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm =
        kvm.map_err(|error| Error::Missing(format!("/dev/kvm can't be opened ({error}): run `coracle check`")))?;
    let kvm_fd = fds.add(kvm);
    let start = match saved {
        Some(folder) => snapshot::start(folder, &mut fds)?,
        None => kernel(spec, &mut fds)?,
    };
    // A name inside the jail, whose root is the folder that the socket is in.
    let path = if jail.enabled { format!("/{PROGRAMS_SOCKET}") } else { format!("{}/{PROGRAMS_SOCKET}", jail.root) };
    let mut vsock = Some((programs, path));
    let mut devices = Vec::with_capacity(spec.devices.len());
    for device in &spec.devices {
        devices.push(match device {
            Device::Rng => api::Device::Rng,
            Device::Balloon => api::Device::Balloon,
            Device::Vsock => {
                let (programs, path) =
                    vsock.take().ok_or_else(|| Error::Invalid("a machine has one vsock device".into()))?;
                api::Device::Vsock { cid: u64::from(GUEST_CID), programs_fd: fds.add(programs), path }
            }
            Device::Pmem { path } => {
                let file = readable("the file", path, "it has to be there before the machine")?;
                api::Device::Pmem { file_fd: fds.add(file) }
            }
            other => plugged(other, spec.cpus.boot, &mut fds, passed)?,
        });
    }
    let machine = api::Machine {
        kvm_fd,
        start,
        cpus: spec.cpus.boot,
        cpus_max: spec.cpus.max,
        memory_mib: spec.memory.size_mib,
        growth_mib: spec.memory.max_mib.saturating_sub(spec.memory.size_mib),
        shared: spec.memory.kind == MemoryKind::Shared,
        huge_pages: spec.memory.huge_pages,
        host_nodes: spec.host_nodes.clone(),
        access_platform: spec.access_platform,
        console: spec.console,
        devices,
        jail,
    };
    Ok((machine, fds))
}

/// How a machine begins with its kernel.
fn kernel(spec: &MachineSpec, fds: &mut Descriptors) -> Result<api::Start> {
    let image = "run `coracle image build` or set `guest.folder`";
    let kernel_fd = fds.add(readable("the guest's kernel", &spec.kernel.path, image)?);
    let initrd_fd = fds.add(readable("the guest's initrd", &spec.initrd, image)?);
    let form = match spec.kernel.form {
        KernelForm::PvhElf => api::KernelForm::PvhElf,
        KernelForm::BzImage => api::KernelForm::BzImage,
        other => return Err(Error::Unsupported(format!("a kernel of the form {other:?}"))),
    };
    Ok(api::Start::Kernel { kernel_fd, form, initrd_fd, command_line: command_line(spec) })
}

/// Refuses what a machine can't have: of a sealed one, whatever reaches more of its memory than it lends, or its driver makes no use of.
fn refuse_what_can_not_be(spec: &MachineSpec) -> Result<()> {
    let open = [DeviceKind::SharedFs, DeviceKind::Vfio, DeviceKind::Balloon];
    let refused = spec.devices.iter().map(Device::kind).find(|kind| open.contains(kind));
    if let Some(kind) = refused.filter(|_| spec.access_platform) {
        return Err(Error::Unsupported(format!("the device {kind:?} of a sealed machine (`machine.sealed`)")));
    }
    if spec.access_platform && Sizes::of(spec).is_some() {
        return Err(Error::Unsupported("a sealed machine that grows (`machine.sealed`)".into()));
    }
    let has_file = spec.devices.iter().any(|device| device.kind() == DeviceKind::Pmem);
    if has_file && !has_files_as_memory(spec) {
        return Err(Error::Unsupported("a file as memory of a machine whose memory others reach".into()));
    }
    let nodes = Path::new("/sys/devices/system/node");
    match spec.host_nodes.iter().find(|node| nodes.exists() && !nodes.join(format!("node{node}")).exists()) {
        Some(node) => Err(Error::Invalid(format!("the host has no node {node} (`machine.host_nodes`)"))),
        None => Ok(()),
    }
}

/// Whether a machine can have files as memory: nobody reaches its memory who was not given them, too.
pub(crate) fn has_files_as_memory(spec: &MachineSpec) -> bool {
    let reaches = |device: &Device| matches!(device.kind(), DeviceKind::SharedFs | DeviceKind::Vfio);
    !spec.access_platform && !spec.devices.iter().any(reaches)
}

/// Describes a device that a machine of so many processors can have from its start or gain later.
pub(crate) fn plugged(device: &Device, cpus: u32, fds: &mut Descriptors, passed: &mut Passed) -> Result<api::Device> {
    match device {
        Device::SharedFs { tag, socket, queue_size } => {
            let server = UnixStream::connect(socket).map_err(|error| {
                Error::Missing(format!("the socket {} can't be connected to: {error}", socket.display()))
            })?;
            Ok(api::Device::Fs { tag: tag.clone(), server_fd: fds.add(server), queue_size: *queue_size })
        }
        Device::Vfio { address, by_iommufd } => passed.take(*address, *by_iommufd, fds),
        Device::Block { path, read_only, direct, serial } => {
            let file_fd = fds.add(open_disk(path, *read_only, *direct)?);
            let queues = u16::try_from(cpus).unwrap_or(1);
            let serial = serial.clone();
            Ok(api::Device::Block { file_fd, read_only: *read_only, direct: *direct, serial, queues })
        }
        Device::Net { mac, taps } => {
            let mut tap_fds = Vec::with_capacity(taps.len());
            for tap in taps {
                tap_fds.push(fds.add(tap.try_clone().map_err(Error::system("hand a tap to the monitor"))?));
            }
            // For all of them, or the monitor serves them itself.
            let vhosts: Option<Vec<_>> = taps.iter().map(|_| open_vhost()).collect();
            let vhost_fds = vhosts.into_iter().flatten().map(|vhost| fds.add(vhost)).collect();
            Ok(api::Device::Net { mac: *mac, tap_fds, vhost_fds })
        }
        other => Err(Error::Unsupported(format!("the device {:?}", other.kind()))),
    }
}

/// The kernel's command line: the specification's, and what this machine adds.
fn command_line(spec: &MachineSpec) -> String {
    // By ACPI's register, so that a restart is told from a processor that crashes.
    let mut line = format!("{} reboot=a", spec.command_line);
    if spec.console {
        line.push_str(" console=ttyS0");
    }
    line
}

/// The kernel's own server of network devices, where this host has it and lets this process use it. The monitor can do
/// without.
pub(crate) fn open_vhost() -> Option<File> {
    let opened = File::options().read(true).write(true).open("/dev/vhost-net");
    opened.inspect_err(|error| log::debug!("/dev/vhost-net can't be opened: {error}")).ok()
}

fn open_disk(path: &Path, read_only: bool, direct: bool) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(!read_only);
    if direct {
        options.custom_flags(libc::O_DIRECT);
    }
    options.open(path).map_err(|error| Error::Missing(format!("the disk {} can't be opened: {error}", path.display())))
}

pub(crate) fn readable(what: &str, path: &Path, mend: &str) -> Result<File> {
    File::open(path)
        .map_err(|error| Error::Missing(format!("{what} {} can't be read ({error}): {mend}", path.display())))
}

#[cfg(test)]
mod tests {
    use coracle_machine::{Architecture, Cpus, Kernel, Memory, Platform};

    use super::*;

    fn spec(devices: Vec<Device>) -> MachineSpec {
        MachineSpec {
            name: "m".into(),
            folder: "/m".into(),
            architecture: Architecture::X86_64,
            platform: Platform::Plain,
            firmware: None,
            kernel: Kernel { path: "/k".into(), form: KernelForm::PvhElf },
            initrd: "/i".into(),
            command_line: String::new(),
            cpus: Cpus { boot: 1, max: 1 },
            memory: Memory { size_mib: 128, max_mib: 128, kind: MemoryKind::Private, huge_pages: false },
            devices,
            console: false,
            access_platform: true,
            host_cpus: Vec::new(),
            host_nodes: Vec::new(),
        }
    }

    #[test]
    fn a_sealed_machine_has_nothing_that_reaches_all_of_its_memory() {
        assert!(refuse_what_can_not_be(&spec(vec![Device::Vsock, Device::Rng])).is_ok());
        let passed = Device::Vfio { address: "0000:01:00.0".parse().unwrap(), by_iommufd: false };
        let shared = Device::SharedFs { tag: "t".into(), socket: "/s".into(), queue_size: 64 };
        for device in [passed, shared, Device::Balloon] {
            let refused = refuse_what_can_not_be(&spec(vec![Device::Rng, device.clone()]));
            assert!(matches!(refused, Err(Error::Unsupported(_))), "{device:?}");
            let open = MachineSpec { access_platform: false, ..spec(vec![device]) };
            assert!(refuse_what_can_not_be(&open).is_ok());
        }
        let grows = MachineSpec { cpus: Cpus { boot: 1, max: 2 }, ..spec(Vec::new()) };
        assert!(matches!(refuse_what_can_not_be(&grows), Err(Error::Unsupported(_))));
        let nowhere = MachineSpec { host_nodes: vec![100_000], access_platform: false, ..spec(Vec::new()) };
        if Path::new("/sys/devices/system/node").exists() {
            assert!(matches!(refuse_what_can_not_be(&nowhere), Err(Error::Invalid(_))));
        }
    }
}

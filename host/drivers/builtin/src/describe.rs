//! From the port's specification to the monitor's description, with the descriptors that it names.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use coracle_machine::{Device, Error, KernelForm, MachineSpec, MemoryKind, Result};
use coracle_monitor_api as api;

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

/// Describes the machine. `programs` listens in `root`, which becomes the monitor's root, for the user `user`.
pub(crate) fn describe(
    spec: &MachineSpec,
    programs: UnixListener,
    jail: api::Jail,
    passed: &mut Passed,
) -> Result<(api::Machine, Descriptors)> {
    if spec.firmware.is_some() {
        return Err(Error::Unsupported("firmware".into()));
    }
    let mut fds = Descriptors::inherited();
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let kvm =
        kvm.map_err(|error| Error::Missing(format!("/dev/kvm can't be opened ({error}): run `coracle check`")))?;
    let kvm_fd = fds.add(kvm);
    let image = "run `coracle image build` or set `guest.folder`";
    let kernel_fd = fds.add(readable("the guest's kernel", &spec.kernel.path, image)?);
    let initrd_fd = fds.add(readable("the guest's initrd", &spec.initrd, image)?);
    let kernel = match spec.kernel.form {
        KernelForm::PvhElf => api::KernelForm::PvhElf,
        KernelForm::BzImage => api::KernelForm::BzImage,
        other => return Err(Error::Unsupported(format!("a kernel of the form {other:?}"))),
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
            Device::SharedFs { tag, socket, queue_size } => {
                let server = UnixStream::connect(socket).map_err(|error| {
                    Error::Missing(format!("the socket {} can't be connected to: {error}", socket.display()))
                })?;
                api::Device::Fs { tag: tag.clone(), server_fd: fds.add(server), queue_size: *queue_size }
            }
            other => plugged(other, spec.cpus.boot, &mut fds, passed)?,
        });
    }
    let machine = api::Machine {
        kvm_fd,
        kernel_fd,
        kernel,
        initrd_fd,
        command_line: command_line(spec),
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

/// Describes a device that a machine of so many processors can have from its start or gain later.
pub(crate) fn plugged(device: &Device, cpus: u32, fds: &mut Descriptors, passed: &mut Passed) -> Result<api::Device> {
    match device {
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
fn open_vhost() -> Option<File> {
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

fn readable(what: &str, path: &Path, mend: &str) -> Result<File> {
    File::open(path)
        .map_err(|error| Error::Missing(format!("{what} {} can't be read ({error}): {mend}", path.display())))
}

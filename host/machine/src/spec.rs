use std::path::PathBuf;

use crate::PciAddress;

/// Everything that a machine is from its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSpec {
    /// A name for the monitor's process list.
    pub name: String,
    /// A folder of the machine's own, for sockets. Its path is short (a socket's address has 107 bytes).
    pub folder: PathBuf,
    /// The processor's architecture.
    pub architecture: Architecture,
    /// A plain machine, or a confidential one.
    pub platform: Platform,
    /// Firmware, where the machine doesn't start its kernel directly.
    pub firmware: Option<PathBuf>,
    /// The kernel.
    pub kernel: Kernel,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// The kernel's command line, the same for every machine of a class. A driver may add its console.
    pub command_line: String,
    /// Processors.
    pub cpus: Cpus,
    /// Memory.
    pub memory: Memory,
    /// Devices.
    pub devices: Vec<Device>,
    /// Whether the guest's console is kept.
    pub console: bool,
    /// Whether devices reach no more of the guest's memory than what it lends them (virtio 1.3, 6.1, `VIRTIO_F_ACCESS_PLATFORM`). Such a
    /// machine gains and loses no devices.
    pub access_platform: bool,
    /// Processors of the host on which it runs, each of its own on one of them; empty for any.
    pub host_cpus: Vec<u32>,
    /// Nodes of the host (NUMA) whose memory it has; empty for any.
    pub host_nodes: Vec<u32>,
}

/// A processor's architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Architecture {
    /// x86-64.
    X86_64,
}

/// What protects a machine from its host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Platform {
    /// Nothing.
    Plain,
}

/// The kernel and its form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The file.
    pub path: PathBuf,
    /// Its form.
    pub form: KernelForm,
}

/// The form of a kernel's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelForm {
    /// An ELF file with a PVH entry note.
    PvhElf,
    /// A bzImage (x86 boot protocol).
    BzImage,
}

/// Processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpus {
    /// From the start.
    pub boot: u32,
    /// At most.
    pub max: u32,
}

/// Memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Its size from the start.
    pub size_mib: u64,
    /// Its size at most; the same where it can't grow.
    pub max_mib: u64,
    /// Its kind.
    pub kind: MemoryKind,
    /// Whether it is made of the host's huge pages of 2 MiB, which the administrator must have reserved.
    pub huge_pages: bool,
}

/// Who can map a machine's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryKind {
    /// The monitor alone.
    Private,
    /// Device servers too (vhost-user needs it).
    Shared,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The socket device over which the agent is reached. Every machine has one.
    Vsock,
    /// Randomness from the host.
    Rng,
    /// What gives memory back to the host that the guest has freed, and what the guest is asked for.
    Balloon,
    /// A file system that a vhost-user server at `socket` shares (virtio-fs).
    SharedFs {
        /// The name by which the guest mounts it.
        tag: String,
        /// The server's socket, which listens.
        socket: PathBuf,
        /// Entries of the request queue.
        queue_size: u16,
    },
    /// A disk: a file or block device of the host's with the disk's bytes.
    Block {
        /// The file.
        path: PathBuf,
        /// Whether the guest may not write.
        read_only: bool,
        /// Whether the host's page cache is passed by.
        direct: bool,
        /// A name that the guest can read, at most 20 bytes.
        serial: String,
    },
    /// A file of the host's that is read-only memory of the guest's (virtio-pmem): all machines that have it read the same pages of the host's,
    /// and keep no copy. From the machine's start only, and not beside a shared file system or a device of the host's. It must not become
    /// shorter while the machine is there.
    Pmem {
        /// The file.
        path: PathBuf,
    },
    /// A network link whose other end is a tap of the host.
    Net {
        /// The guest's hardware address.
        mac: [u8; 6],
        /// The tap (Linux: Documentation/networking/tuntap.rst), with a virtio-net header before each packet: a descriptor for each pair
        /// of queues.
        taps: Vec<Descriptor>,
    },
    /// A PCI device of the host's that the machine has for itself (VFIO): it is on the host's driver `vfio-pci`.
    Vfio {
        /// Where it is on the host.
        address: PciAddress,
        /// Whether it is asked for by IOMMUFD, and not by its IOMMU group.
        by_iommufd: bool,
    },
    /// A network link whose other end is a program that gives the guest a network without privileges: a connected stream socket with
    /// frames, each behind its length in four bytes, the most significant first.
    NetStream {
        /// The guest's hardware address.
        mac: [u8; 6],
        /// The socket.
        stream: Descriptor,
    },
    /// A network link whose other end is the monitor itself, which does what the guest asks for as a user of the host:
    /// 10.0.2.15/24, the host at 10.0.2.2, names at 10.0.2.3.
    NetUser {
        /// The guest's hardware address.
        mac: [u8; 6],
        /// Ports of the host that lead to the guest.
        forwards: Vec<Forward>,
    },
}

/// A port of the host that leads to one of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Whether it is of UDP, and not of TCP.
    pub is_udp: bool,
    /// The host's address and port.
    pub host: std::net::SocketAddr,
    /// The guest's port.
    pub guest: u16,
}

/// A hardware address as text: six pairs of hexadecimal digits with colons between them.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A descriptor of the host's that a device uses.
#[derive(Debug, Clone)]
pub struct Descriptor(std::sync::Arc<std::os::fd::OwnedFd>);

impl Descriptor {
    /// Takes it.
    #[must_use]
    pub fn new(fd: std::os::fd::OwnedFd) -> Self {
        Self(std::sync::Arc::new(fd))
    }

    /// Another descriptor of the same.
    ///
    /// # Errors
    /// Where the process has no room for one.
    pub fn try_clone(&self) -> std::io::Result<std::os::fd::OwnedFd> {
        self.0.try_clone()
    }
}

impl PartialEq for Descriptor {
    fn eq(&self, other: &Self) -> bool {
        std::sync::Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Descriptor {}

/// A device's kind, for [`Capabilities`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceKind {
    /// See [`Device::Vsock`].
    Vsock,
    /// See [`Device::Rng`].
    Rng,
    /// See [`Device::Balloon`].
    Balloon,
    /// See [`Device::SharedFs`].
    SharedFs,
    /// See [`Device::Block`].
    Block,
    /// See [`Device::Pmem`].
    Pmem,
    /// See [`Device::Net`].
    Net,
    /// See [`Device::Vfio`].
    Vfio,
    /// See [`Device::NetStream`].
    NetStream,
    /// See [`Device::NetUser`].
    NetUser,
}

impl Device {
    /// Whether both are the same thing of the host's, however it is used.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Block { path: one, .. }, Self::Block { path: other, .. }) => one == other,
            (Self::Vfio { address: one, .. }, Self::Vfio { address: other, .. }) => one == other,
            (Self::Net { mac: one, .. }, Self::Net { mac: other, .. }) => one == other,
            _ => false,
        }
    }

    /// The host's file behind it.
    #[must_use]
    pub fn path(&self) -> Option<&std::path::Path> {
        match self {
            Self::Block { path, .. } | Self::Pmem { path } => Some(path),
            _ => None,
        }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        match self {
            Self::Vsock => DeviceKind::Vsock,
            Self::Rng => DeviceKind::Rng,
            Self::Balloon => DeviceKind::Balloon,
            Self::SharedFs { .. } => DeviceKind::SharedFs,
            Self::Block { .. } => DeviceKind::Block,
            Self::Pmem { .. } => DeviceKind::Pmem,
            Self::Net { .. } => DeviceKind::Net,
            Self::Vfio { .. } => DeviceKind::Vfio,
            Self::NetStream { .. } => DeviceKind::NetStream,
            Self::NetUser { .. } => DeviceKind::NetUser,
        }
    }
}

/// The most network devices of a machine. Every driver takes so many, beside what a pod's machine has else.
pub const NETS_MAX: usize = 16;

/// The most pairs of queues of a network device. Every driver takes so many.
pub const NET_QUEUES_MAX: u32 = 8;

/// The most that may pass one way in a second; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rate {
    /// Bytes.
    pub bytes_per_second: u64,
    /// Requests of a disk, packets of a link.
    pub operations_per_second: u64,
}

/// The most that a device may do. A moment's worth may pass at once after it has done nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// What the guest reads, or receives.
    pub to_guest: Rate,
    /// What it writes, or sends.
    pub from_guest: Rate,
}

/// What a machine can do: a function of driver, specification and architecture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Devices that it can have from its start.
    pub coldplug: Vec<DeviceKind>,
    /// Devices that it can gain and lose.
    pub hotplug: Vec<DeviceKind>,
    /// Devices that can be held to a rate.
    pub limits: Vec<DeviceKind>,
    /// Whether its size can change, between that from the start and that at most.
    pub resize: bool,
    /// Whether its guest can be asked to leave memory to the host.
    pub balloon: bool,
    /// Whether it can be paused.
    pub pause: bool,
    /// Whether it can be saved, and another started where it stood.
    pub snapshot: bool,
}

/// What runs a machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The kernel's KVM: a security boundary.
    Kvm,
    /// Emulation: no security boundary.
    Emulation,
}

impl Accelerator {
    /// Its name as users see it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Emulation => "emulation",
        }
    }
}

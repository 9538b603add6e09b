//! What the driver `builtin` and the monitor's process say to each other.
//!
//! The driver starts the monitor with one socket at descriptor [`CONTROL_FD`]. Each message is one line of JSON, at most
//! [`LINE_BYTES_MAX`] long. The first request is [`Request::Boot`]; the monitor answers each request in order with one
//! [`Message::Reply`], and tells the machine's end by [`Message::Ended`], after which it exits. A socket whose other end is
//! gone ends the monitor.
//!
//! What a machine needs of the host comes as open descriptors, by the numbers at which the monitor has inherited them: it
//! opens no file. What comes later ([`Request::Attach`]) has its descriptors with the message's first byte (`SCM_RIGHTS`), and names
//! them by their place, from 0 on.

use serde::{Deserialize, Serialize};

/// The control socket's number in the monitor's process.
pub const CONTROL_FD: i32 = 3;

/// The longest message, in bytes.
pub const LINE_BYTES_MAX: usize = 256 * 1024;

/// The most descriptors that come with a message.
pub const DESCRIPTORS_MAX: usize = 32;

/// What the driver asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Make the machine and let it run.
    Boot(Box<Machine>),
    /// Save the machine, in which nothing goes on meanwhile: it runs again after that, if it ran before, whether it was saved or not. Two
    /// descriptors come with it: an empty file for its state and one for its memory, to read and write.
    Save,
    /// Stop its processors.
    Pause,
    /// Let them go on.
    Resume,
    /// Say what it has used.
    Stats,
    /// Add a device.
    Attach {
        /// The device.
        device: Device,
        /// How many descriptors come with it.
        descriptors: usize,
    },
    /// Ask the guest to let go of a device. That it has is told by [`Message::Ejected`], if it ever does.
    Detach {
        /// Its number on the guest's bus: of the devices from the start, in their order, from 1 on.
        number: u8,
    },
    /// Have the guest use so much memory, in bytes; between what it has from its start and that with all that it can gain.
    ResizeMemory {
        /// All of it.
        bytes: u64,
    },
    /// Tell by one [`Message::Memory`] when the guest uses another amount of memory than this, in bytes. At most one is under way: a later
    /// request replaces an earlier one.
    TellMemory {
        /// What is known.
        known: u64,
    },
    /// Add a processor.
    AddProcessor,
    /// Ask the guest to let go of its last processor. That it has is told by [`Message::Processors`], if it ever does.
    TakeProcessor,
    /// Ask the guest for no processor any more: what it has it keeps.
    KeepProcessors,
    /// Hold a disk or a link to these rates from now on.
    Limit {
        /// Its number on the guest's bus.
        number: u8,
        /// What the guest reads or receives.
        to_guest: Rate,
        /// What it writes or sends.
        from_guest: Rate,
    },
    /// Give a device so many bytes: a disk, and what is behind it where that is a file, no fewer than it has; the balloon those that the guest
    /// is asked to leave to the host.
    ResizeDevice {
        /// Its number on the guest's bus.
        number: u8,
        /// How many.
        bytes: u64,
    },
}

/// The most that may pass one way in a second; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Rate {
    /// Bytes.
    pub bytes_per_second: u64,
    /// Requests of a disk, packets of a link.
    pub operations_per_second: u64,
}

/// What the monitor says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// The answer to the request that waits longest.
    Reply(Result<Answer, Fault>),
    /// The guest has let go of the device of this number, and it is gone.
    Ejected(u8),
    /// The guest uses so many bytes of memory.
    Memory(u64),
    /// The guest has let go of a processor, and has so many left.
    Processors(u32),
    /// The machine has ended.
    Ended(Ended),
}

/// What a request gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done.
    Done,
    /// Of [`Request::Stats`].
    Stats(Box<Stats>),
    /// Of [`Request::Attach`]: the device's number on the guest's bus.
    Attached(u8),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// For people.
    pub text: String,
    /// Whether what was asked for can't be had here, or the machine's files are not usable; else something failed.
    pub invalid: bool,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// The guest has switched it off.
    Shutdown,
    /// The guest has reset it.
    Reset,
    /// The guest's kernel has said that it panicked.
    Panicked,
    /// The guest has driven a processor into a state from which it can't go on (a triple fault), or KVM can't go on with it.
    Crashed(String),
    /// The monitor itself has failed.
    Failed(String),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Shutdown => formatter.write_str("the guest has shut down"),
            Self::Reset => formatter.write_str("the guest has restarted"),
            Self::Panicked => formatter.write_str("the guest's kernel panicked"),
            Self::Crashed(text) => write!(formatter, "the guest's processor stopped: {text}"),
            Self::Failed(text) => write!(formatter, "the monitor failed: {text}"),
        }
    }
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm_fd: i32,
    /// How it begins.
    pub start: Start,
    /// Processors from the start.
    pub cpus: u32,
    /// Processors at most.
    pub cpus_max: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Memory that it can gain while it runs, in MiB.
    pub growth_mib: u64,
    /// Whether processes that serve devices may map it.
    pub shared: bool,
    /// Whether it is made of huge pages of the host, which must be reserved there.
    pub huge_pages: bool,
    /// Nodes of the host (NUMA) that it comes from; none is any.
    pub host_nodes: Vec<u32>,
    /// Whether devices reach only what the guest lends them (virtio 1.3, section 6.1, `VIRTIO_F_ACCESS_PLATFORM`).
    pub access_platform: bool,
    /// Whether the guest's first serial port goes to the monitor's standard output.
    pub console: bool,
    /// Devices.
    pub devices: Vec<Device>,
    /// The monitor's jail.
    pub jail: Jail,
}

/// How a machine begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// With a kernel.
    Kernel {
        /// The kernel's file.
        kernel_fd: i32,
        /// Its form.
        form: KernelForm,
        /// The initial RAM disk's file.
        initrd_fd: i32,
        /// The kernel's command line.
        command_line: String,
    },
    /// Where another of the same description stood when it was saved ([`Request::Save`]).
    Saved {
        /// The file with that machine's state, to read.
        state_fd: i32,
        /// That with its memory, to read. It may serve many machines; it must not be changed while one of them is there.
        memory_fd: i32,
    },
}

/// See the machine port's specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelForm {
    /// An ELF file with a PVH entry.
    PvhElf,
    /// A bzImage.
    BzImage,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// Sockets.
    Vsock {
        /// The guest's context identifier.
        cid: u64,
        /// The socket on which host programs name a port of the guest's; it listens.
        programs_fd: i32,
        /// That socket's path as the monitor sees it in its jail; what the guest dials is at `<path>_<port>`.
        path: String,
    },
    /// Randomness.
    Rng,
    /// What takes memory back that the guest has freed.
    Balloon,
    /// A file system served over vhost-user.
    Fs {
        /// The name by which the guest mounts it.
        tag: String,
        /// A connection to the server.
        server_fd: i32,
        /// Entries of the request queue.
        queue_size: u16,
    },
    /// A network link.
    Net {
        /// The guest's hardware address.
        mac: [u8; 6],
        /// The tap's descriptors, one a pair of queues.
        tap_fds: Vec<i32>,
        /// `/dev/vhost-net`, opened once a tap, where the host's kernel serves the queues; none where the monitor does.
        vhost_fds: Vec<i32>,
    },
    /// A disk.
    Block {
        /// The file or block device, open; for writing too, unless `read_only`.
        file_fd: i32,
        /// Whether the guest may not write.
        read_only: bool,
        /// Whether the file was opened for direct I/O.
        direct: bool,
        /// A name that the guest can read, at most 20 bytes.
        serial: String,
        /// How many queues.
        queues: u16,
    },
    /// A file that is read-only memory of the guest's. From the machine's start only, without devices that other processes serve or that are
    /// the host's.
    Pmem {
        /// The file or block device, open for reading. It must not become shorter.
        file_fd: i32,
    },
    /// A PCI device of the host's.
    Vfio {
        /// The device.
        device_fd: i32,
        /// Whether its memory accesses are led by IOMMUFD, and not by a container of groups.
        by_iommufd: bool,
        /// By which; none where it is that of an earlier device, which is there still.
        iommu: Option<Iommu>,
    },
    /// A console of virtio's, whose output goes to this descriptor.
    Console {
        /// Where its output goes.
        output_fd: i32,
    },
}

/// By what the memory accesses of the host's devices are led.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Iommu {
    /// A container of groups (`/dev/vfio/vfio`), whose kind was set.
    Container {
        /// Its descriptor.
        fd: i32,
    },
    /// An address space of IOMMUFD (`/dev/iommu`).
    Iommufd {
        /// Its descriptor.
        fd: i32,
        /// The address space's number.
        ioas: u32,
    },
}

/// What the monitor may still reach once it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jail {
    /// Without it the monitor keeps what its starter has. For measurements only.
    pub enabled: bool,
    /// The folder that becomes the monitor's root: the machine's sockets, and nothing else.
    pub root: String,
    /// User and group under which it runs, where it is started as root. Otherwise it makes a user namespace.
    pub user: u32,
}

/// What a machine has used.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Stats {
    /// Exits of all processors by their reason.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Processor time of each processor's thread, in nanoseconds.
    pub cpu_nanoseconds: Vec<u64>,
    /// What devices' drivers in the guest say, by name: the guest's own words.
    pub guest: std::collections::BTreeMap<String, u64>,
    /// Devices in the machine's order.
    pub devices: Vec<DeviceStats>,
    /// Memory that the guest has, in bytes.
    pub memory_bytes: u64,
    /// Of it, what the host has given so far; none where that can't be told: of a machine that goes on where another was saved.
    pub memory_resident_bytes: Option<u64>,
    /// Processors that the guest has.
    pub cpus: u32,
    /// From the monitor's start to the first entry into the guest, in microseconds.
    pub start_microseconds: u64,
}

/// What has passed through a device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceStats {
    /// Its kind.
    pub name: String,
    /// From the guest.
    pub operations_out: u64,
    /// From the guest.
    pub bytes_out: u64,
    /// To the guest.
    pub operations_in: u64,
    /// To the guest.
    pub bytes_in: u64,
    /// Refused or dropped.
    pub errors: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_lines() {
        let ended = Message::Ended(Ended::Crashed("triple fault".into()));
        let line = serde_json::to_string(&ended).unwrap();
        assert_eq!(line, r#"{"ended":{"crashed":"triple fault"}}"#);
        assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), ended);
        let reply = Message::Reply(Err(Fault { text: "two\nlines".into(), invalid: true }));
        let line = serde_json::to_string(&reply).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Message>(&line).unwrap(), reply);
    }
}

//! From a specification to a running machine.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use coracle_machine::{Device, Error, MachineSpec, Result};
use coracle_process::{CapabilitySet, Confinement, Output, Ring, Role, Spawn};
use tokio::net::UnixStream;
use tracing::Instrument;

use crate::command::{self, QMP_FD, VHOST_FD};
use crate::handed::Handed;
use crate::hotplug::Jailed;
use crate::machine::{Parts, QemuMachine};
use crate::{Config, clock, handed, net, place, qmp, vfio, vsock};

/// How much of the console and of QEMU's messages is kept, in bytes.
const CONSOLE_BYTES: usize = 64 * 1024;
const MESSAGES_BYTES: usize = 8 * 1024;

/// Boots. When this future is dropped, its parts are, and with them their processes and files.
pub(crate) async fn boot(config: &Config, spec: MachineSpec) -> Result<QemuMachine> {
    check_files(config, &spec)?;
    let mut vsock = vsock::prepare(config, &spec)?;
    let hello = match vsock.address.listen(vsock.hello_port) {
        Ok(hello) => hello,
        Err(error) => {
            vsock.remove_files();
            return Err(error);
        }
    };
    let device = vsock.device.take();
    let kind = vsock.kind;
    // From here on everything is owned by something that cleans up when it is dropped.
    let mut parts = Parts::new(vsock, hello, spec.folder.clone());
    let clock_rate = if command::needs_clock_rate(config) { clock::tsc_mhz() } else { None };
    let nets = net::descriptors(config, &spec)?;
    let first_free = nets.all.iter().map(|(number, _)| number + 1).max().unwrap_or(net::FIRST_FD);
    let found = command::Found { tsc_mhz: clock_rate, has_net_servers: nets.has_servers };
    let confinement = confinement(config, &spec)?;
    let is_confined = confinement.is_some();
    let mut handed = Handed::of(&spec, kind, first_free);
    let opened = handed.open(&spec, is_confined).await?;
    let arguments = command::arguments(config, &spec, (kind, &handed), &found)?;
    let (ours, theirs) =
        std::os::unix::net::UnixStream::pair().map_err(Error::system("make QEMU's control channel"))?;
    ours.set_nonblocking(true).map_err(Error::system("make QEMU's control channel"))?;
    let (console, messages) =
        (Ring::new(CONSOLE_BYTES).logged("guest::console"), Ring::new(MESSAGES_BYTES).logged("monitor"));
    let mut spawn = Spawn::new(program(config)).arguments(arguments).descriptor(QMP_FD, OwnedFd::from(theirs));
    if is_confined {
        parts.given.give_all(&spec)?;
        spawn = spawn.in_own_pid_namespace();
    }
    spawn.capabilities = Some(if is_confined { Role::Qemu.bounds().capabilities } else { unconfined() });
    spawn.confinement = confinement;
    if let Some(device) = device {
        spawn = spawn.descriptor(VHOST_FD, device);
    }
    for (number, fd) in nets.all.into_iter().chain(opened) {
        spawn = spawn.descriptor(number, fd);
    }
    spawn.stdout = Output::Ring(console.clone());
    spawn.stderr = Output::Ring(messages.clone());
    let qemu =
        tracing::debug_span!("spawn").in_scope(|| spawn.start()).map_err(|error| not_started(&error, is_confined))?;
    let ended = qemu.wait();
    parts.qemu = Some(qemu);
    let stream = UnixStream::from_std(ours).map_err(Error::system("watch QEMU's control channel"))?;
    let connected = tokio::select! {
        biased;
        connected = qmp::Client::connect(stream).instrument(tracing::debug_span!("qmp")) => connected.ok(),
        _ = ended => None,
    };
    let Some((control, events)) = connected else {
        // QEMU closes the channel before its last words have passed the pipe: its end orders both.
        if let Some(qemu) = &parts.qemu {
            qemu.kill();
            qemu.wait().await;
        }
        parts.drain_messages().await;
        return Err(Error::Monitor(format!("QEMU did not start: {}", messages.last_lines(5).join("; "))));
    };
    let pid = parts.qemu.as_ref().and_then(|qemu| i32::try_from(qemu.pid()).ok()).unwrap_or_default();
    for set in handed.sets(&spec) {
        handed::let_go(&control, set).await?;
    }
    place::pin(pid, &control, &spec.host_cpus).await?;
    let given = parts.given.clone();
    let jailed = is_confined.then(|| Jailed { given, pid, memory_bytes: most_bytes(&spec) });
    Ok(QemuMachine::start(config, &spec, parts, (control, events), (console, messages), jailed))
}

/// QEMU's program: not through a link in a folder that it does not see, where it is one.
fn program(config: &Config) -> PathBuf {
    let is_seen = config.program.starts_with("/usr") || config.program.starts_with("/bin");
    if is_seen { config.program.clone() } else { config.program.canonicalize().unwrap_or(config.program.clone()) }
}

fn not_started(error: &coracle_process::Error, is_confined: bool) -> Error {
    let mend = match error {
        coracle_process::Error::Start { source, .. } if is_confined => match source.kind() {
            std::io::ErrorKind::PermissionDenied => {
                ": it runs as a user of its own in namespaces of its own: everybody must be able to start it, and the host must let root make those; \
                 or set `jail = false` in the table [qemu]"
            }
            std::io::ErrorKind::Unsupported => ": its jail takes Linux 5.12; or set `jail = false` in the table [qemu]",
            _ => "",
        },
        _ => "",
    };
    Error::Missing(format!("QEMU: {error}{mend}"))
}

/// What QEMU may where it is not confined: it locks memory that a device of the host's reaches, opens what an administrator's arguments name, and
/// listens at low ports where it serves a user's network.
fn unconfined() -> CapabilitySet {
    CapabilitySet::IPC_LOCK | CapabilitySet::DAC_OVERRIDE | CapabilitySet::NET_BIND_SERVICE
}

/// The most memory that the guest will have, in bytes.
fn most_bytes(spec: &MachineSpec) -> u64 {
    spec.memory.max_mib.max(spec.memory.size_mib) << 20
}

/// How QEMU is confined. None where that is off, or this process can't: an ordinary user's QEMU is that user's. One that serves a user's network
/// itself, where there is no passt, is the host's in that network, and stays what it is.
fn confinement(config: &Config, spec: &MachineSpec) -> Result<Option<Confinement>> {
    let serves_network = spec.devices.iter().any(|device| matches!(device, Device::NetUser { .. }));
    if !config.jail || serves_network || !Confinement::is_possible() {
        return Ok(None);
    }
    let confinement = Confinement::of_monitor(&config.program).map_err(Error::system("confine QEMU"))?;
    let uses_kvm = config.accelerator == coracle_machine::Accelerator::Kvm;
    let confinement = if uses_kvm { confinement.with_kvm() } else { confinement };
    Ok(Some(if vfio::has_any(spec) { confinement.keeping(most_bytes(spec)) } else { confinement }))
}

/// Says what is missing before anything is started. Disks, kernel and initrd are looked at when they are opened.
fn check_files(config: &Config, spec: &MachineSpec) -> Result<()> {
    if let Err(error) = std::fs::File::open(&config.program) {
        let program = config.program.display();
        let mend = "install qemu-system-x86 or set `qemu.path`";
        return Err(Error::Missing(format!("QEMU's program {program} can't be read ({error}): {mend}")));
    }
    for device in &spec.devices {
        if let Device::SharedFs { socket, .. } = device {
            readable_socket(socket)?;
        }
    }
    Ok(())
}

fn readable_socket(socket: &Path) -> Result<()> {
    match std::fs::symlink_metadata(socket) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Missing(format!("the socket {} is not there: {error}", socket.display()))),
    }
}

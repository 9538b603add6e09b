//! From a specification to a running machine.

use std::os::fd::OwnedFd;
use std::path::Path;

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
    let found = command::Found { tsc_mhz: clock_rate, has_net_servers: nets.has_servers, first_free };
    let arguments = command::arguments(config, &spec, kind, &found)?;
    let (ours, theirs) =
        std::os::unix::net::UnixStream::pair().map_err(Error::system("make QEMU's control channel"))?;
    ours.set_nonblocking(true).map_err(Error::system("make QEMU's control channel"))?;
    let (console, messages) =
        (Ring::new(CONSOLE_BYTES).logged("guest::console"), Ring::new(MESSAGES_BYTES).logged("monitor"));
    // Not through a link in a folder that it does not see.
    let program = config.program.canonicalize().unwrap_or_else(|_| config.program.clone());
    let mut spawn = Spawn::new(&program).arguments(arguments).descriptor(QMP_FD, OwnedFd::from(theirs));
    let confinement = confinement(config, &spec, &program);
    if let Some(confinement) = &confinement {
        vfio::give_all(&spec, confinement.user())?;
        spawn = spawn.in_own_pid_namespace();
    }
    spawn.capabilities = Some(if confinement.is_some() { Role::Qemu.bounds().capabilities } else { unconfined() });
    let user = confinement.as_ref().map(Confinement::user);
    spawn.confinement = confinement;
    if let Some(device) = device {
        spawn = spawn.descriptor(VHOST_FD, device);
    }
    let handed = Handed::of(&spec, kind, first_free);
    for (number, fd) in nets.all.into_iter().chain(handed.open(&spec)?) {
        spawn = spawn.descriptor(number, fd);
    }
    spawn.stdout = Output::Ring(console.clone());
    spawn.stderr = Output::Ring(messages.clone());
    let qemu = tracing::debug_span!("spawn")
        .in_scope(|| spawn.start())
        .map_err(|error| Error::Missing(format!("QEMU: {error}")))?;
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
    let jailed = user.map(|user| Jailed { user, pid, memory_bytes: most_bytes(&spec) });
    Ok(QemuMachine::start(config, &spec, parts, (control, events), (console, messages), jailed))
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

/// How QEMU is confined. None where that is off, or this process may not: an ordinary user's QEMU is that user's.
fn confinement(config: &Config, spec: &MachineSpec, program: &Path) -> Option<Confinement> {
    if !config.jail || !rustix::process::geteuid().is_root() {
        return None;
    }
    let mut confinement = Confinement::of_monitor(program).in_group_of(Path::new("/dev/kvm"));
    if spec.devices.iter().any(|device| matches!(device, Device::NetUser { .. })) {
        confinement = confinement.with_network();
    }
    if vfio::has_any(spec) {
        confinement = confinement.keeping(most_bytes(spec));
    }
    Some(confinement)
}

/// Says what is missing before anything is started.
fn check_files(config: &Config, spec: &MachineSpec) -> Result<()> {
    let readable = |what: &str, path: &Path, mend: &str| match std::fs::File::open(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(Error::Missing(format!("{what} {} can't be read ({error}): {mend}", path.display()))),
    };
    readable("QEMU's program", &config.program, "install qemu-system-x86 or set `qemu.path`")?;
    readable("the guest's kernel", &spec.kernel.path, "run `coracle image build` or set `guest.folder`")?;
    readable("the guest's initrd", &spec.initrd, "run `coracle image build` or set `guest.folder`")?;
    for device in &spec.devices {
        match device {
            Device::SharedFs { socket, .. } => readable_socket(socket)?,
            Device::Block { path, .. } => readable("the disk", path, "it has to be there before the machine")?,
            _ => {}
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

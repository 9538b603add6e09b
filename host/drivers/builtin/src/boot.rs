//! From a specification to a running machine.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use coracle_machine::{AgentAddress, DeviceKind, Error, GuestListener, MachineSpec, Result};
use coracle_monitor_api as api;
use coracle_process::{Output, Ring, Spawn};
use tokio::net::UnixStream;
use tracing::Instrument;

use crate::Config;
use crate::control::{Client, Failure};
use crate::describe::{GUEST_CID, PROGRAMS_SOCKET, describe};
use crate::hotplug::most_bytes;
use crate::machine::{BuiltinMachine, Parts};
use crate::vfio::{self, Passed};

/// How much of the console and of the monitor's messages is kept, in bytes.
const CONSOLE_BYTES: usize = 64 * 1024;
const MESSAGES_BYTES: usize = 8 * 1024;

/// Boots, or starts the machine where another stood when it was saved into the folder `saved`. When this future is dropped, its parts are,
/// and with them the process and its files.
pub(crate) async fn boot(config: &Config, spec: MachineSpec, saved: Option<&Path>) -> Result<BuiltinMachine> {
    let Some((program, first)) = config.monitor.split_first() else {
        return Err(Error::Missing("no program is configured for the built-in monitor".into()));
    };
    let root = Root::make(spec.folder.join("vsock"))?;
    let address = AgentAddress::Hybrid(root.path.join(PROGRAMS_SOCKET));
    let programs = UnixListener::bind(root.path.join(PROGRAMS_SOCKET)).map_err(Error::system("listen for programs"))?;
    let hello = listen(&address, root.user)?;
    let jail = api::Jail { enabled: config.jail, root: root.path.display().to_string(), user: root.user };
    let mut passed = Passed::default();
    let (description, descriptors) = describe(&spec, saved, programs, jail, &mut passed)?;
    let (ours, theirs) =
        std::os::unix::net::UnixStream::pair().map_err(Error::system("make the monitor's control channel"))?;
    ours.set_nonblocking(true).map_err(Error::system("make the monitor's control channel"))?;
    let (console, messages) =
        (Ring::new(CONSOLE_BYTES).logged("guest::console"), Ring::new(MESSAGES_BYTES).logged("monitor"));
    let mut spawn = Spawn::new(program).arguments(first.iter().cloned()).argument(&spec.folder);
    spawn = spawn.descriptor(api::CONTROL_FD, OwnedFd::from(theirs));
    for (number, fd) in (descriptors.first..).zip(descriptors.all) {
        spawn = spawn.descriptor(number, fd);
    }
    // Only who may make namespaces can give one away.
    if config.jail && rustix::process::geteuid().is_root() {
        spawn = spawn.in_own_pid_namespace();
    }
    spawn.stdout = Output::Ring(console.clone());
    spawn.stderr = Output::Ring(messages.clone());
    let monitor = tracing::debug_span!("spawn")
        .in_scope(|| spawn.start())
        .map_err(|error| Error::Missing(format!("the built-in monitor: {error}")))?;
    let mut parts = Parts { monitor, root };
    let pid = i32::try_from(parts.monitor.pid()).unwrap_or_default();
    if spec.devices.iter().any(|device| device.kind() == DeviceKind::Vfio) {
        vfio::allow_to_keep(pid, most_bytes(&spec))?;
    }
    let stream = UnixStream::from_std(ours).map_err(Error::system("watch the monitor's control channel"))?;
    let (control, ended) = Client::new(stream);
    let request = api::Request::Boot(Box::new(description));
    match control.ask(&request).instrument(tracing::debug_span!("machine_boot")).await {
        Ok(_) => {}
        Err(Failure::Refused(fault)) if fault.invalid => return Err(Error::Missing(fault.text)),
        Err(Failure::Refused(fault)) => return Err(Error::Monitor(fault.text)),
        Err(Failure::Closed) => {
            parts.end().await;
            let last = messages.last_lines(5).join("; ");
            let status = parts.monitor.wait().await;
            return Err(Error::Monitor(format!("the built-in monitor did not start ({status}): {last}")));
        }
    }
    if !spec.host_cpus.is_empty() {
        crate::machine::run_on(pid, &spec.host_cpus)?;
    }
    Ok(BuiltinMachine::start(spec, parts, control, ended, address, hello, console, messages, passed, saved.is_some()))
}

/// Listens for the guest's greeting, at a socket that the monitor's user may connect to.
fn listen(address: &AgentAddress, user: u32) -> Result<GuestListener> {
    let hello = address.listen(GUEST_CID)?;
    if let AgentAddress::Hybrid(path) = address {
        let mut name = path.clone().into_os_string();
        name.push(format!("_{GUEST_CID}"));
        own(Path::new(&name), user)?;
    }
    Ok(hello)
}

/// Gives a file to the monitor's user, where this process may.
fn own(path: &Path, user: u32) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    std::os::unix::fs::lchown(path, Some(user), Some(user)).map_err(Error::system("give the monitor its sockets"))
}

/// The folder that becomes the monitor's root: the machine's sockets and nothing else. It goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Root {
    path: PathBuf,
    user: u32,
}

impl Root {
    fn make(path: PathBuf) -> Result<Self> {
        let user = coracle_process::monitor_user();
        std::fs::create_dir(&path).map_err(Error::system(format!("make {}", path.display())))?;
        let root = Self { path, user };
        let mode = std::fs::Permissions::from_mode(0o700);
        std::fs::set_permissions(&root.path, mode).map_err(Error::system("close the monitor's folder"))?;
        own(&root.path, user)?;
        Ok(root)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            log::warn!("the monitor's folder {} stays: {error}", self.path.display());
        }
    }
}

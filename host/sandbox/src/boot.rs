//! Boot: from nothing to an agent that answers.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coracle_faults as faults;
use coracle_machine::{
    Architecture, Cpus, Device, DeviceKind, GuestStream, Machine, MachineSpec, Memory, MemoryKind, NET_QUEUES_MAX,
    Platform,
};
use coracle_network::{Model, Options};
use coracle_process::{Child, ExitStatus, Ring};
use coracle_protocol::agent::{CreateSandboxRequest, Storage};
use coracle_protocol::{hello, ports};
use tokio::io::AsyncReadExt;
use tokio::sync::Mutex;
use tracing::{Instrument, debug_span};

use crate::agent::{Agent, Patience};
use crate::devices::{self, Devices};
use crate::files::Files;
use crate::forward::Forward;
use crate::mirror::Mirrors;
use crate::network::Network;
use crate::pod::Pod;
use crate::size::{Place, Range, Size};
use crate::state::Phase;
use crate::to_its_end::to_its_end;
use crate::{Config, Error, Result, Sandbox, Trace, clock, mount, network, oom, user_network};

/// How many lines of the guest's console an error carries.
const CONSOLE_LINES: usize = 10;

/// What a pod is set up with.
#[derive(Debug, Clone, Default)]
pub(crate) struct Setup {
    /// Processors that its containers ask for.
    pub(crate) cpus: Option<u32>,
    /// Memory that its containers ask for, in MiB.
    pub(crate) memory_mib: Option<u64>,
    /// The guest's host name, which containers of a pod share. Empty: the guest's own.
    pub(crate) hostname: String,
    /// The pod's name where it has containers beside one another.
    pub(crate) sandbox_id: String,
    /// The network namespace whose links the pod takes over.
    pub(crate) network: Option<PathBuf>,
    /// Kernel settings of the namespaces that the pod's containers share.
    pub(crate) sysctls: HashMap<String, String>,
    /// Whether its containers need files of the host.
    pub(crate) shares_files: bool,
    /// What the machine has for its first container.
    pub(crate) devices: Vec<Device>,
    /// The files of those disks that the machine may have as memory.
    pub(crate) layers: Vec<PathBuf>,
}

/// Boots the pod's machine. When the future is dropped, nothing is left of it.
pub(crate) async fn boot(sandbox: &Sandbox, setup: &Setup) -> Result<Arc<Pod>> {
    let config = &sandbox.config;
    let shares_files = setup.shares_files && config.shares_files;
    let Files { shared, virtiofsd, storage, device } =
        Files::of(config, shares_files).instrument(debug_span!("files")).await?;
    faults::at("host.boot.files").await?;
    let (network, mut devices) = take_network(sandbox, setup).instrument(debug_span!("network")).await?;
    faults::at("host.boot.network").await?;
    let served = match (&setup.network, &config.user_network) {
        (None, Some(wanted)) => {
            let (served, device) = user_network::start(wanted)?;
            devices.push(device);
            Some(served)
        }
        _ => None,
    };
    devices.extend(device);
    devices.extend(setup.devices.iter().cloned());
    let mut spec = machine_spec(config, setup, devices);
    let capabilities = sandbox.driver.capabilities(&spec);
    // What goes back of huge pages is another's, and was reserved for this one.
    // And what a device of the host's may reach must stay where it is.
    let is_passed = spec.devices.iter().any(|device| device.kind() == DeviceKind::Vfio);
    if capabilities.coldplug.contains(&DeviceKind::Balloon) && !config.huge_pages && !config.sealed && !is_passed {
        spec.devices.push(Device::Balloon);
    }
    if config.layers_as_memory && capabilities.coldplug.contains(&DeviceKind::Pmem) {
        devices::as_memory(&mut spec, &setup.layers, config.disk_limits);
    }
    let own = spec.devices.clone();
    let least = Size { cpus: spec.cpus.boot, memory_mib: spec.memory.size_mib };
    let range = capabilities.resize.then(|| Range {
        base: Size { cpus: config.vcpus, memory_mib: config.memory_mib },
        least,
        most: Size { cpus: spec.cpus.max, memory_mib: spec.memory.max_mib },
    });
    let booted = sandbox.driver.boot(spec).instrument(debug_span!("machine")).await;
    let machine = match booted {
        Ok(machine) => machine,
        Err(error) => return Err(server_failed(virtiofsd.as_ref()).await.unwrap_or_else(|| error.into())),
    };
    if let Err(error) = devices::limit(&*machine, &own, config.disk_limits).await {
        machine.stop().await?;
        return Err(error);
    }
    faults::at("host.boot.machine").await?;
    let passt = served.as_ref().and_then(|served| served.passt.as_ref());
    let servers = [("virtiofsd", virtiofsd.as_ref()), ("passt", passt)];
    let greeted = greet(config, &*machine, &servers).instrument(debug_span!("greeting")).await;
    let lifeline = match greeted {
        Ok(lifeline) => lifeline,
        Err(error) => {
            let console = machine.console(CONSOLE_LINES);
            machine.stop().await?;
            return Err(with_console(error, &console));
        }
    };
    faults::at("host.boot.greeting").await?;
    let told = Told { network: network.as_ref(), is_user: served.is_some(), servers: &servers };
    let reached = reach(config, &*machine, create_sandbox(config, setup, storage), &told);
    let agent = match reached.instrument(debug_span!("agent")).await {
        Ok(agent) => agent,
        Err(error) => {
            machine.stop().await?;
            return Err(error);
        }
    };
    faults::at("host.boot.agent").await?;
    let virtiofsd = virtiofsd.map(|(child, _)| child);
    let forward = forward(network.as_ref(), &*machine).await;
    let places = devices::places(&*machine, &own);
    let pod = Arc::new(Pod {
        machine,
        agent,
        range,
        size: Some(least).into(),
        swap_bytes: Mutex::default(),
        placed: Mutex::new(Some(Place::default())),
        updates: Mutex::default(),
        shared: shared.as_ref().map(|shared| mount::host_side(&shared.folder)),
        devices: Devices::new(capabilities.hotplug.clone(), &setup.devices, places, config.disk_limits),
        mirrors: Mirrors::default(),
        virtiofsd,
        has_shm: !setup.sandbox_id.is_empty(),
        network,
        gains_links: capabilities.hotplug.contains(&DeviceKind::Net),
        served,
        _forward: forward,
        sysctls: setup.sysctls.clone(),
        series: std::sync::Mutex::default(),
        _lifeline: lifeline.into(),
    });
    if let Some(shared) = shared {
        shared.keep();
    }
    watch(sandbox, &pod);
    clock::follow(sandbox, &pod, config.clock_period);
    if let Some(trace) = config.trace.clone() {
        fetch_spans(&pod, trace);
    }
    Ok(pod)
}

/// What forwards ports of the pod's network to the guest's loopback, where it has one.
async fn forward(network: Option<&Network>, machine: &dyn Machine) -> Option<Forward> {
    let network = network.filter(|network| network.has_links())?;
    match network.forward(machine.agent_address().clone()).await {
        Ok(forward) => Some(forward),
        // A pod whose kernel can't do that is a pod all the same.
        Err(error) => {
            log::warn!("ports of this pod can't be forwarded: {error}");
            None
        }
    }
}

/// Fetches the guest's spans as they end, for as long as its agent gives any.
fn fetch_spans(pod: &Arc<Pod>, trace: Trace) {
    let weak = Arc::downgrade(pod);
    tokio::spawn(async move {
        let (mut left, mut since) = (GUEST_SPANS_MAX, tokio::time::Instant::now());
        while let Some(pod) = weak.upgrade() {
            let Ok(bytes) = pod.agent.spans().await else { return };
            if since.elapsed() > GUEST_SPANS_PERIOD {
                (left, since) = (GUEST_SPANS_MAX, tokio::time::Instant::now());
            }
            // An answer costs its bytes as well, whatever is in it.
            left = match left.checked_sub((trace.guest)(&bytes).max(1 + bytes.len() / 1024)) {
                Some(left) => left,
                None => {
                    log::warn!("the guest tells more than {GUEST_SPANS_MAX} spans within an hour: no more are taken");
                    return;
                }
            };
        }
    });
}

/// The most spans that are taken of a guest within so long: one that tells more is lying.
const GUEST_SPANS_MAX: usize = 100_000;
const GUEST_SPANS_PERIOD: Duration = Duration::from_secs(3600);

/// Takes over the links of the pod's namespace, where it has one; each comes back as a device, too.
async fn take_network(sandbox: &Sandbox, setup: &Setup) -> Result<(Option<Network>, Vec<Device>)> {
    let config = &sandbox.config;
    let Some(path) = &setup.network else { return Ok((None, Vec::new())) };
    if config.network.model == Model::None {
        // It is left alone, and whatever is in it.
        return Ok((None, Vec::new()));
    }
    let plain = sandbox.driver.capabilities(&machine_spec(config, setup, Vec::new()));
    let has_functions = plain.coldplug.contains(&DeviceKind::Vfio);
    // On its own: given up halfway it would leave links that nobody knows of. What it has taken is given back with it.
    let (path, folder) = (path.clone(), config.folder.clone());
    let held = Arc::clone(&sandbox.links).read_owned().await;
    let options = with_queues(config.network, processors(config, setup));
    let take = async move { Network::take(&path, &folder, options, has_functions, held).await };
    let (network, devices) = to_its_end(take).await?;
    Ok((Some(network), devices))
}

/// The unit in which a kernel takes memory that it gains, in MiB (Linux' memory blocks on x86-64).
const GROWTH_UNIT_MIB: u64 = 128;

/// The processors that a machine has from its start.
fn processors(config: &Config, setup: &Setup) -> u32 {
    setup.cpus.unwrap_or(config.vcpus).max(config.vcpus)
}

/// With as many queues as there are processors to use them, where it was not said how many.
fn with_queues(options: Options, processors: u32) -> Options {
    let wanted = if options.queues == 0 { processors } else { options.queues.into() };
    Options { queues: u16::try_from(wanted.clamp(1, NET_QUEUES_MAX)).unwrap_or(1), ..options }
}

fn machine_spec(config: &Config, setup: &Setup, more: Vec<Device>) -> MachineSpec {
    let cpus = processors(config, setup);
    let memory_mib = config.memory_mib + setup.memory_mib.unwrap_or(0);
    // Huge pages were reserved for what there is, and nobody knows how many are left.
    let room = if config.huge_pages || config.sealed { 0 } else { config.memory_max_mib.saturating_sub(memory_mib) };
    let most = memory_mib + room / GROWTH_UNIT_MIB * GROWTH_UNIT_MIB;
    // What a server of files has to map.
    let has_server = more.iter().any(|device| device.kind() == DeviceKind::SharedFs);
    let mut devices = vec![Device::Vsock, Device::Rng];
    devices.extend(more);
    MachineSpec {
        name: config.name.clone(),
        folder: config.folder.clone(),
        architecture: Architecture::X86_64,
        platform: Platform::Plain,
        firmware: None,
        kernel: config.kernel.clone(),
        initrd: config.initrd.clone(),
        command_line: config.command_line.clone(),
        cpus: Cpus { boot: cpus, max: if config.sealed { cpus } else { cpus.max(config.vcpus_max) } },
        memory: Memory {
            size_mib: memory_mib,
            max_mib: most,
            kind: if has_server { MemoryKind::Shared } else { MemoryKind::Private },
            huge_pages: config.huge_pages,
        },
        devices,
        // What it says there anybody on the host could read.
        console: !config.sealed,
        access_platform: config.sealed,
        host_cpus: config.host_cpus.clone(),
        host_nodes: config.host_nodes.clone(),
    }
}

/// A process that serves the machine, where it has one: its name, itself and what it says.
type Server<'a> = (&'static str, Option<&'a (Child, Ring)>);

/// Waits for the end of any of the servers.
async fn server_ends(servers: &[Server<'_>]) -> Error {
    let ends = servers.iter().filter_map(|(name, server)| {
        let (child, messages) = (*server)?;
        Some(Box::pin(async move {
            let status = child.wait().await;
            Error::Failed(format!("{name} ended with {status}: {}", messages.last_lines(3).join("; ")))
        }))
    });
    let ends: Vec<_> = ends.collect();
    if ends.is_empty() {
        return std::future::pending().await;
    }
    futures::future::select_all(ends).await.0
}

/// Waits for the guest's first words, or for whatever makes them impossible.
async fn greet(config: &Config, machine: &dyn Machine, servers: &[Server<'_>]) -> Result<GuestStream> {
    let server_ends = async {
        let error = server_ends(servers).await;
        match ends_now(machine, SERVER_END_PATIENCE).await {
            Some(reason) => Error::Failed(format!("the guest did not come up: {reason}")),
            None => error,
        }
    };
    let words = async {
        loop {
            let mut stream = machine.guest_connection().await?;
            // One that breaks is no greeting: a guest that waited too long for it has given it up and dials again.
            let Some(line) = first_line(&mut stream).await else { continue };
            hello::check(&line, &config.version).map_err(|error| Error::Missing(error.to_string()))?;
            return Ok(stream);
        }
    };
    tokio::select! {
        biased;
        stream = words => stream,
        end = machine.wait() => Err(Error::Failed(format!("the guest did not come up: {}", end.reason))),
        error = server_ends => Err(error),
        () = tokio::time::sleep(config.boot_timeout) => {
            let seconds = config.boot_timeout.as_secs();
            Err(Error::Timeout(format!("the guest did not come up within {seconds} s (`guest.boot_timeout_seconds`)")))
        }
    }
}

/// The end of the file server, where it is the reason that a machine did not start: that one only misses what it was to be connected to.
async fn server_failed(virtiofsd: Option<&(Child, Ring)>) -> Option<Error> {
    let (child, messages) = virtiofsd?;
    let status = tokio::time::timeout(SERVER_END_PATIENCE, child.wait()).await.ok()?;
    // When its client goes it ends as it should.
    if status == ExitStatus::Code(0) {
        return None;
    }
    Some(Error::Failed(format!("virtiofsd ended with {status}: {}", messages.last_lines(3).join("; "))))
}

/// The first line of a stream, or as much as a greeting may have; `None` where it ends before.
async fn first_line(stream: &mut GuestStream) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    while !line.ends_with(b"\n") && line.len() < hello::LINE_BYTES {
        line.push(stream.read_u8().await.ok()?);
    }
    Some(line)
}

/// How long files, links and the monitor's start may take together, beside the guest's greeting and the agent's first answers, which have the
/// boot's deadline each.
const HOST_PATIENCE: Duration = Duration::from_secs(10);

/// How long a boot may take in all. Memory of huge pages is cleared before the guest runs, and memory that a device of the host's reaches is put in
/// place: so much memory, in MiB, takes a second for each GiB more, of which half is usual.
fn patience(boot_timeout: Duration, made_at_once_mib: u64) -> Duration {
    2 * boot_timeout + HOST_PATIENCE + Duration::from_secs(made_at_once_mib >> 10)
}

/// The memory that is made before the guest runs, in MiB.
fn made_at_once_mib(config: &Config, setup: &Setup) -> u64 {
    let is_made = config.huge_pages || setup.devices.iter().any(|device| device.kind() == DeviceKind::Vfio);
    if is_made { config.memory_mib + setup.memory_mib.unwrap_or(0) } else { 0 }
}

/// How long the machine's own end may follow the end of a server of its devices: then it is the reason to tell.
const SERVER_END_PATIENCE: Duration = Duration::from_secs(1);

/// The same after the agent's connection has broken: a guest whose agent has ended takes its time to end.
pub(crate) const AGENT_END_PATIENCE: Duration = Duration::from_secs(5);

/// The machine's reason, where it is ending, too.
pub(crate) async fn ends_now(machine: &dyn Machine, patience: Duration) -> Option<String> {
    tokio::time::timeout(patience, machine.wait()).await.ok().map(|end| end.reason)
}

fn with_console(error: Error, lines: &[String]) -> Error {
    if lines.is_empty() {
        return error;
    }
    let lines = format!("; the guest's console ends with:\n  {}", lines.join("\n  "));
    match error {
        Error::Failed(text) => Error::Failed(text + &lines),
        Error::Timeout(text) => Error::Timeout(text + &lines),
        other => other,
    }
}

/// The networks of which the guest is told.
struct Told<'a> {
    network: Option<&'a Network>,
    /// Whether it has that of the host's user.
    is_user: bool,
    servers: &'a [Server<'a>],
}

/// Connects to the agent and sets the pod up, unless the machine ends or the time is over.
async fn reach(
    config: &Config,
    machine: &dyn Machine,
    request: CreateSandboxRequest,
    networks: &Told<'_>,
) -> Result<Agent> {
    let work = async {
        let stream = machine.agent_address().connect(ports::AGENT).await?;
        let agent = Agent::new(stream, config.agent_timeout, config.trace.as_ref().map(|trace| trace.current));
        let sandbox = agent
            .call("CreateSandbox", Patience::Bounded, async |agent, ctx| agent.create_sandbox(ctx, &request).await);
        tokio::try_join!(sandbox, clock::set(&agent))?;
        if let Some(network) = networks.network {
            network.tell(&agent).await?;
        }
        if networks.is_user {
            network::tell(&agent, &coracle_network::user::contents()).await?;
        }
        Ok(agent)
    };
    tokio::select! {
        biased;
        agent = work => agent,
        end = machine.wait() => Err(Error::Ended(end.reason)),
        error = server_ends(networks.servers) => Err(error),
        () = tokio::time::sleep(config.boot_timeout) => {
            Err(Error::Timeout("the agent greets and does not answer (`guest.boot_timeout_seconds`)".into()))
        }
    }
}

fn create_sandbox(config: &Config, setup: &Setup, shared_fs: Option<Storage>) -> CreateSandboxRequest {
    let is_pod = !setup.sandbox_id.is_empty();
    CreateSandboxRequest {
        hostname: setup.hostname.clone(),
        sandbox_id: setup.sandbox_id.clone(),
        guest_hook_path: config.hook_folder.clone(),
        storages: shared_fs.into_iter().chain(is_pod.then(coracle_storage::shm)).collect(),
        ..Default::default()
    }
}

/// Starts what listens for the machine's events.
fn watch(sandbox: &Sandbox, pod: &Arc<Pod>) {
    let end = pod.machine.wait();
    let weak = Arc::downgrade(pod);
    let server = pod.virtiofsd.as_ref().map(Child::wait);
    let passt = pod.served.as_ref().and_then(|served| served.passt.as_ref());
    let passt = passt.map(|(child, messages)| (child.wait(), messages.clone()));
    let handle = sandbox.clone();
    tokio::spawn(async move {
        let server = async {
            match server {
                Some(end) => end.await,
                None => std::future::pending().await,
            }
        };
        let passt = async {
            match passt {
                Some((end, messages)) => (end.await, messages),
                None => std::future::pending().await,
            }
        };
        let reason = tokio::select! {
            biased;
            end = end => end.reason,
            status = server => {
                let mut reason = None;
                if let Some(pod) = weak.upgrade() {
                    reason = ends_now(&*pod.machine, SERVER_END_PATIENCE).await;
                    // Without its files the guest can do nothing right.
                    let _ = pod.machine.stop().await;
                }
                reason.unwrap_or_else(|| format!("virtiofsd ended with {status}"))
            }
            (status, messages) = passt => {
                let mut reason = None;
                if let Some(pod) = weak.upgrade() {
                    reason = ends_now(&*pod.machine, SERVER_END_PATIENCE).await;
                    // A pod that says nothing of it would be cut off for ever.
                    let _ = pod.machine.stop().await;
                }
                reason.unwrap_or_else(|| format!("passt ended with {status}: {}", messages.last_lines(3).join("; ")))
            }
        };
        handle.tell(move |state| state.machine_ended(&reason));
    });
    oom::follow(sandbox.clone(), pod);
}

/// The pod, booted where it is not: by this caller, or refused while another one does.
pub(crate) async fn ensure(sandbox: &Sandbox, setup: Setup) -> Result<Arc<Pod>> {
    let present = sandbox
        .ask(|state| match &state.phase {
            Phase::Up(pod) => Ok(Some(Arc::clone(pod))),
            Phase::Absent => {
                state.phase = Phase::Booting;
                Ok(None)
            }
            Phase::Booting => Err(Error::State("the pod's machine is being booted".into())),
            Phase::Ended(reason) => Err(Error::Ended(reason.clone())),
        })
        .await??;
    if let Some(pod) = present {
        return Ok(pod);
    }
    let guard = BootGuard { sandbox: Some(sandbox.clone()) };
    let deadline = patience(sandbox.config.boot_timeout, made_at_once_mib(&sandbox.config, &setup));
    let booted = tokio::time::timeout(deadline, boot(sandbox, &setup).instrument(debug_span!("boot"))).await;
    let pod = booted.unwrap_or_else(|_| {
        let seconds = deadline.as_secs();
        Err(Error::Timeout(format!("the pod's machine was not up within {seconds} s: its monitor or the host hangs")))
    })?;
    let up = Arc::clone(&pod);
    let stopped = sandbox
        .ask(move |state| {
            if matches!(state.phase, Phase::Booting) {
                state.phase = Phase::Up(up);
                return false;
            }
            true
        })
        .await?;
    guard.defuse();
    if stopped {
        pod.machine.stop().await?;
        return Err(Error::Ended("the pod was stopped".into()));
    }
    Ok(pod)
}

/// Puts the phase back where the boot fails or is given up.
struct BootGuard {
    sandbox: Option<Sandbox>,
}

impl BootGuard {
    fn defuse(mut self) {
        self.sandbox = None;
    }
}

impl Drop for BootGuard {
    fn drop(&mut self) {
        let Some(sandbox) = &self.sandbox else { return };
        sandbox.tell(|state| {
            if matches!(state.phase, Phase::Booting) {
                state.phase = Phase::Absent;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_that_makes_much_memory_at_once_has_longer() {
        let timeout = Duration::from_secs(60);
        assert_eq!(patience(timeout, 0), Duration::from_secs(130));
        assert_eq!(patience(timeout, 64 << 10), Duration::from_secs(194));
    }
}

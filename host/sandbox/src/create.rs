//! Create: the first container boots the machine, every one is planned, mounted, and made by the agent.

use std::collections::HashMap;
use std::sync::Arc;

use coracle_ext4::AfterCrash;
use coracle_faults as faults;
use coracle_machine::Device;
use coracle_protocol::agent::{CreateContainerRequest, RemoveContainerRequest};
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_protocol::protobuf::{Message, MessageField};
use coracle_protocol::{REQUEST_BYTES_MAX, oci};
use coracle_storage::{ContainerPlan, Wanted};
use tokio::sync::oneshot;
use tracing::Instrument;

use crate::agent::{GUEST_GRACE, Patience};
use crate::boot;
use crate::io::{self, Connected, Ports};
use crate::passthrough::{self, Passed};
use crate::pod::Pod;
use crate::size::{self, Limits};
use crate::state::{Container, Process, State};
use crate::to_its_end::to_its_end;
use crate::{CreateRequest, Error, Result, Sandbox, copy, mirror, mount, spec, swap};

/// The annotation by which Kubernetes names the file of a container's last words.
const TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";

impl Sandbox {
    /// Makes a container whose process waits for its start.
    ///
    /// # Errors
    /// Whatever a step says; then nothing of the container is left.
    pub async fn create(&self, request: CreateRequest) -> Result<()> {
        let CreateRequest { id, mut spec, root, rootfs, stdio } = request;
        let swap_bytes = match &self.config.swap_folder {
            Some(_) => swap::wanted(&spec, self.config.memory_mib << 20)?,
            None => 0,
        };
        if swap_bytes > 0 {
            let linux = spec.Linux.as_mut();
            swap::allow(linux.and_then(|linux| linux.Resources.as_mut()), swap_bytes);
        }
        let streams = io::Wanted::from(&stdio);
        let process = Process::new(streams.terminal, stdio, None);
        let (name, limits) = (id.clone(), Limits::of(&spec).with_swap(swap_bytes));
        let mut cancelled = self.ask(move |state| reserve(state, name, process, Some(limits))).await??;
        let wanted = Wanted {
            id: id.clone(),
            root,
            rootfs,
            mounts: spec.Mounts.clone(),
            devices: spec::block_devices(&spec),
            rules: spec::device_rules(&spec),
            copies_files: !self.config.shares_files,
            termination_log: spec.Annotations.get(TERMINATION_PATH).cloned().unwrap_or_default(),
            direct_volumes: self.config.direct_volumes.clone(),
            empty_dir_mib: self.config.empty_dir_mib,
            huge_pages: spec::huge_pages(&spec),
            ..Wanted::default()
        };
        let plan = Plan { id: id.clone(), spec, wanted, streams };
        let sandbox = self.clone();
        let make = async move {
            let outcome = make(&sandbox, &plan, &mut cancelled).await;
            let told = outcome.as_ref().map(drop).map_err(Error::clone);
            sandbox.ask(move |state| finish(state, &plan.id, outcome.map(Some))).await?;
            // The machine may have grown for it.
            if let (Err(_), Some(pod)) = (&told, sandbox.ask(|state| state.pod()).await?) {
                size::fit(&sandbox, &pod);
            }
            told
        };
        to_its_end(make).instrument(tracing::debug_span!("create", container = id)).await
    }
}

struct Plan {
    id: String,
    spec: oci::Spec,
    wanted: Wanted,
    streams: io::Wanted,
}

/// What a create leaves to the container.
pub(crate) struct Made {
    storage: ContainerPlan,
    connected: Connected,
}

/// A name becomes a part of paths, on both sides: anything but a name is refused before it is used.
pub(crate) fn check_name(name: &str) -> Result<()> {
    if coracle_protocol::names::is_name(name) {
        return Ok(());
    }
    let shown: String = name.escape_default().take(64).collect();
    Err(Error::Invalid(format!("\"{shown}\" is no name for a container or process")))
}

/// Takes the name `id`, for a container with these limits, or for the one that stands for the pod and has none.
pub(crate) fn reserve(
    state: &mut State,
    id: String,
    init: Process,
    limits: Option<Limits>,
) -> Result<oneshot::Receiver<()>> {
    check_name(&id)?;
    if state.stopping {
        return Err(Error::Ended("the pod is being stopped".into()));
    }
    if state.containers.contains_key(&id) {
        return Err(Error::Exists(format!("container {id}")));
    }
    let (sender, receiver) = oneshot::channel();
    let container = Container {
        init,
        is_pod: limits.is_none(),
        execs: HashMap::new(),
        creating: Some(sender),
        paused: false,
        limits: limits.unwrap_or_default(),
        deleting: false,
        stats: None,
        storage: None,
    };
    state.containers.insert(id, container);
    Ok(receiver)
}

/// Notes how a create has ended; what it has mounted is the container's from then on.
pub(crate) fn finish(state: &mut State, id: &str, outcome: Result<Option<Made>>) {
    match outcome {
        Ok(made) => {
            if let Ok(container) = state.container(id) {
                container.creating = None;
                if let Some(Made { storage, connected }) = made {
                    container.storage = Some(storage);
                    container.init.connected = Some(connected);
                }
            }
            // The machine may have ended between the agent's answer and this.
            if state.end_reason().is_some() {
                state.exited(&crate::ProcessId { container: id.to_owned(), exec: String::new() }, 137);
            }
        }
        Err(_) => {
            state.containers.remove(id);
        }
    }
}

/// `work`, unless the create is given up before its end.
pub(crate) async fn unless<T>(
    cancelled: &mut oneshot::Receiver<()>,
    id: &str,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        _ = cancelled => Err(Error::State(format!("container {id} was killed while it was being created"))),
        outcome = work => outcome,
    }
}

async fn make(sandbox: &Sandbox, plan: &Plan, cancelled: &mut oneshot::Receiver<()>) -> Result<Made> {
    faults::at("host.create.plan").await?;
    spec::check(&plan.spec)?;
    let (wanted, characters) = (plan.wanted.clone(), spec::character_devices(&plan.spec));
    // It looks at files, and makes some, which takes its time.
    let needs = tokio::task::spawn_blocking(move || {
        let passed = passthrough::plan(&characters)?;
        let needs = wanted.needs()?;
        for disk in &needs.empty_disks {
            coracle_ext4::make(&disk.path, disk.size_mib, AfterCrash::Used)
                .map_err(|error| Error::Failed(error.to_string()))?;
        }
        Ok::<_, Error>((needs, passed))
    });
    let (needs, passed) = needs.await.map_err(|error| Error::Failed(error.to_string()))??;
    let setup = spec::setup(&plan.spec, needs, &passed)?;
    let pod = unless(cancelled, &plan.id, boot::ensure(sandbox, setup)).await?;
    faults::at("host.create.machine").await?;
    // The first one has the machine that was booted for it; each further one adds to it.
    unless(cancelled, &plan.id, until_end(&pod, size::grow(sandbox, &pod, None))).await?;
    unless(cancelled, &plan.id, until_end(&pod, swap::grow(sandbox, &pod))).await?;
    // Not given up halfway: what a thread is mounting could not be undone by anybody.
    let mounted = Mounted::new(sandbox, &pod, plan, &passed).await?;
    faults::at("host.create.mounts").await?;
    unless(cancelled, &plan.id, until_end(&pod, copy::files(&pod, &mounted.plan.copies))).await?;
    unless(cancelled, &plan.id, until_end(&pod, mirror::follow(&pod, &mounted.plan.mirrors))).await?;
    let connecting = until_end(&pod, io::connect(&pod, plan.streams));
    let connected = unless(cancelled, &plan.id, connecting).await?;
    faults::at("host.create.streams").await?;
    let request = request(plan, &mounted.plan, &pod, connected.ports, sandbox.config.labels)?;
    let (asked, id) = (Arc::clone(&pod), plan.id.clone());
    let call = async move {
        let create = async |agent: &AgentServiceClient, ctx| agent.create_container(ctx, &request).await;
        asked.agent.call("CreateContainer", Patience::Bounded, create).await.map(drop)
    };
    let mut call = tokio::spawn(call.in_current_span());
    let created = async { (&mut call).await.map_err(|error| Error::Failed(error.to_string()))? };
    let outcome = unless(cancelled, &plan.id, until_end(&pod, created)).await;
    if outcome.is_err() {
        let finished = call.is_finished();
        let (leftover, outcome) = (Arc::clone(&pod), outcome.clone());
        let clear = async move {
            // Given up here, and perhaps made there.
            let outcome = if finished { outcome } else { call.await.unwrap_or(Ok(())) };
            clear(&leftover, id, &outcome).await;
        };
        // Whoever has given it up is answered at once; else the name is the container's until nothing of it is left.
        let mut cleared = tokio::spawn(clear.in_current_span());
        if finished {
            let done = async { (&mut cleared).await.map_err(|error| Error::Failed(error.to_string())) };
            let _ = unless(cancelled, &plan.id, until_end(&pod, done)).await;
        }
    }
    outcome?;
    faults::reached("host.create.made").await;
    Ok(Made { storage: mounted.keep(), connected })
}

/// How often the agent is asked to remove what it may be making still.
const REMOVALS_MAX: usize = 5;

/// Has the agent remove what it may have made of a container whose create had this outcome, for nobody will ask for it any more, and the next
/// one of its name would be refused.
async fn clear(pod: &Pod, id: String, outcome: &Result<()>) {
    match outcome {
        // Nobody is there to ask.
        Err(Error::Ended(_) | Error::Unreachable(_)) => return,
        // Slow, and perhaps making it until the guest gives it up as well.
        Err(Error::Timeout(_)) => tokio::time::sleep(2 * GUEST_GRACE).await,
        _ => {}
    }
    let request = RemoveContainerRequest { container_id: id, ..Default::default() };
    for _ in 0..REMOVALS_MAX {
        let remove = async |agent: &AgentServiceClient, ctx| agent.remove_container(ctx, &request).await;
        match pod.agent.call("RemoveContainer", Patience::Bounded, remove).await {
            Ok(_) | Err(Error::NotFound(_)) => return,
            // It is being created.
            Err(Error::State(_)) => tokio::time::sleep(GUEST_GRACE).await,
            Err(error) => {
                log::warn!("what the guest has of container {} stays: {error}", request.container_id);
                return;
            }
        }
    }
    log::warn!("what the guest has of container {} stays: it is being created for ever", request.container_id);
}

/// What the agent is asked for.
fn request(
    plan: &Plan,
    storage: &ContainerPlan,
    pod: &Pod,
    ports: Ports,
    labels: bool,
) -> Result<CreateContainerRequest> {
    let mut request = CreateContainerRequest {
        container_id: plan.id.clone(),
        OCI: MessageField::some(spec::for_guest(plan.spec.clone(), storage, plan.streams.terminal, labels)),
        storages: storage.storages.clone(),
        devices: storage.guest_devices.clone(),
        sandbox_pidns: spec::shares_pids(&plan.spec),
        stdin_port: ports.stdin,
        stdout_port: ports.stdout,
        stderr_port: ports.stderr,
        ..Default::default()
    };
    let linux = request.OCI.mut_or_insert_default().Linux.mut_or_insert_default();
    for (name, value) in &pod.sysctls {
        linux.Sysctl.entry(name.clone()).or_insert_with(|| value.clone());
    }
    if request.compute_size() > REQUEST_BYTES_MAX {
        // All that the guest can do without.
        log::warn!("container {}: its annotations are too large for the guest, which does not get them", plan.id);
        request.OCI.mut_or_insert_default().Annotations.clear();
    }
    let bytes = request.compute_size();
    if bytes > REQUEST_BYTES_MAX {
        return Err(Error::Invalid(format!(
            "container {}: its specification takes {bytes} bytes on the way to the guest, and {REQUEST_BYTES_MAX} are \
             the most that the protocol carries",
            plan.id
        )));
    }
    Ok(request)
}

/// A request's answer, or the machine's end where that comes first.
pub(crate) async fn until_end<T>(pod: &Arc<Pod>, request: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        biased;
        answer = request => match answer {
            // The connection breaks a moment before the end is known, and the end is the better reason.
            Err(Error::Unreachable(text)) => match boot::ends_now(&*pod.machine, boot::AGENT_END_PATIENCE).await {
                Some(reason) => Err(Error::Ended(reason)),
                None => Err(Error::Unreachable(text)),
            },
            answer => answer,
        },
        end = pod.machine.wait() => Err(Error::Ended(end.reason)),
    }
}

/// A container's mounts and devices, undone where the create fails or is given up.
struct Mounted {
    pod: Arc<Pod>,
    plan: ContainerPlan,
    shares: Arc<mount::Shares>,
    kept: bool,
}

impl Mounted {
    async fn new(sandbox: &Sandbox, pod: &Arc<Pod>, plan: &Plan, passed: &[Passed]) -> Result<Self> {
        let root = coracle_storage::root_disks(&plan.id, &plan.wanted.rootfs)?;
        let has_disks = match &root {
            Some(root) => pod.devices.can_have(&root.devices).await,
            None => false,
        };
        let (shared, pod_shm) = (pod.shared.clone(), pod.has_shm);
        let wanted = Wanted { has_disks, disks_in_use: pod.devices.paths().await, pod_shm, ..plan.wanted.clone() };
        let shares = Arc::clone(&sandbox.shares);
        let made = Arc::clone(&shares);
        // A look at a source, and a mount, may take their time (a network file system): they get a thread.
        let work = move || {
            let plan = coracle_storage::container(shared.as_deref(), &wanted)?;
            mount::apply(&plan, &made).map(|()| plan)
        };
        let mut plan = tokio::task::spawn_blocking(work).await.map_err(|error| Error::Failed(error.to_string()))??;
        pod.devices.read_as_memory(&mut plan.storages);
        plan.devices.extend(passed.iter().flat_map(Passed::devices));
        let attach = async {
            faults::at("host.create.attach").await?;
            pod.devices.attach(&*pod.machine, &plan.devices).await
        };
        let places = match attach.await {
            Ok(places) => places,
            Err(error) => {
                mount::undo(&plan, &shares);
                return Err(error);
            }
        };
        let place =
            |device: &Device| plan.devices.iter().position(|own| own == device).and_then(|at| places.get(at)?.clone());
        let told = passthrough::told(passed, place);
        plan.guest_devices.extend(told);
        Ok(Self { pod: Arc::clone(pod), plan, shares, kept: false })
    }

    fn keep(mut self) -> ContainerPlan {
        self.kept = true;
        self.plan.clone()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        mount::undo(&self.plan, &self.shares);
        let (pod, disks) = (Arc::clone(&self.pod), std::mem::take(&mut self.plan.devices));
        if !disks.is_empty() {
            tokio::spawn(async move { pod.devices.detach(&*pod.machine, &disks).await });
        }
    }
}

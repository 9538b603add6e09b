//! Start: a container's first process, or one beside it.

use std::sync::Arc;
use std::time::Duration;

use coracle_faults as faults;
use coracle_protocol::agent::{
    ExecProcessRequest, GetDiagnosticDataRequest, StartContainerRequest, WaitProcessRequest,
};
use coracle_protocol::oci;
use coracle_protocol::protobuf::MessageField;
use tokio::sync::oneshot;
use tracing::Instrument;

use crate::agent::Patience;
use crate::boot;
use crate::create::until_end;
use crate::io::{self, Connected, Stdio, Wanted};
use crate::pod::Pod;
use crate::state::{State, Status};
use crate::to_its_end::to_its_end;
use crate::{Error, ProcessId, Result, Sandbox};

/// How long the end of a process waits for what it said at last. Who hears of the end may read no further: containerd 1.6 closes
/// its ends of the outputs then. A child may hold them open for as long as it likes, so there is an end to it.
const LAST_WORDS_PATIENCE: Duration = Duration::from_secs(1);

impl Sandbox {
    /// Starts a process that was created.
    ///
    /// # Errors
    /// What the agent says; a first process that can't be started has then ended with 255.
    pub async fn start(&self, process: &ProcessId) -> Result<()> {
        let (sandbox, id) = (self.clone(), process.clone());
        let span = tracing::debug_span!("start", container = process.container, exec = process.exec);
        to_its_end(async move { start(&sandbox, &id).await }).instrument(span).await
    }
}

/// What a start needs.
struct Begun {
    pod: Arc<Pod>,
    stdio: Stdio,
    /// Of a first process.
    connected: Option<Connected>,
    /// Of an exec.
    spec: Option<oci::Process>,
}

/// Takes it, so that nobody else starts the process too. Nothing where there is no process to start.
fn begin(state: &mut State, id: &ProcessId) -> Result<Option<Begun>> {
    let pod = state.up()?;
    if state.container(&id.container)?.creating.is_some() {
        return Err(Error::State(format!("container {} is being created", id.container)));
    }
    if !id.exec.is_empty() && state.container(&id.container)?.init.status != Status::Running {
        return Err(Error::State(format!("container {} does not run", id.container)));
    }
    let is_pod = state.container(&id.container)?.is_pod;
    let process = state.process(id)?;
    if process.status == Status::Stopped {
        return Err(Error::State("the process has ended before its start".into()));
    }
    let stdio = process.stdio.take().ok_or_else(|| Error::State("the process was started already".into()))?;
    if is_pod {
        process.status = Status::Running;
        return Ok(None);
    }
    let connected = process.connected.take();
    Ok(Some(Begun { pod, stdio, connected, spec: process.spec.take() }))
}

async fn start(sandbox: &Sandbox, id: &ProcessId) -> Result<()> {
    let name = id.clone();
    let Some(Begun { pod, stdio, connected, spec }) = sandbox.ask(move |state| begin(state, &name)).await?? else {
        return Ok(());
    };
    let wanted = Wanted::from(&stdio);
    let run = async {
        faults::at("host.start.begun").await?;
        match (connected, spec) {
            (Some(connected), _) => {
                // On its own: given up halfway it would leave links that nobody knows of.
                let looked = Arc::clone(&pod);
                let scan = async move {
                    match &looked.network {
                        Some(network) => network.rescan(&*looked.machine, &looked.agent, looked.gains_links).await,
                        None => Ok(()),
                    }
                };
                if pod.network.is_some() {
                    to_its_end(scan).await?;
                }
                start_first(&pod, id).await.map(|()| connected)
            }
            (None, Some(spec)) => start_exec(&pod, id, spec, wanted).await,
            (None, None) => Err(Error::State(format!("container {} was not made", id.container))),
        }
    };
    let name = id.clone();
    let connected = match until_end(&pod, run).await {
        Ok(connected) => connected,
        Err(error) => {
            // As after SIGKILL where the machine took it along, as after a failed exec where it never ran.
            let status = if matches!(error, Error::Ended(_)) { 137 } else { 255 };
            sandbox.tell(move |state| state.exited(&name, status));
            return Err(error);
        }
    };
    faults::reached("host.start.started").await;
    let (done, said) = oneshot::channel();
    let pumps = io::pump(id, stdio, connected, done);
    sandbox
        .ask(move |state| {
            if let Ok(process) = state.process(&name) {
                process.pumps = Some(pumps);
                if process.status == Status::Created {
                    process.status = Status::Running;
                }
            }
        })
        .await?;
    watch(sandbox, &pod, id, said);
    if id.exec.is_empty() {
        sandbox.prefetch_stats(&pod, &id.container);
    }
    Ok(())
}

async fn start_first(pod: &Pod, id: &ProcessId) -> Result<()> {
    let request = StartContainerRequest { container_id: id.container.clone(), ..Default::default() };
    pod.agent
        .call("StartContainer", Patience::Bounded, async |agent, ctx| agent.start_container(ctx, &request).await)
        .await
        .map(drop)
}

/// The streams, and the one call.
async fn start_exec(pod: &Pod, id: &ProcessId, spec: oci::Process, wanted: Wanted) -> Result<Connected> {
    let connected = io::connect(pod, wanted).await?;
    let request = ExecProcessRequest {
        container_id: id.container.clone(),
        exec_id: id.exec.clone(),
        process: MessageField::some(spec),
        stdin_port: connected.ports.stdin,
        stdout_port: connected.ports.stdout,
        stderr_port: connected.ports.stderr,
        ..Default::default()
    };
    pod.agent
        .call("ExecProcess", Patience::Bounded, async |agent, ctx| agent.exec_process(ctx, &request).await)
        .await?;
    Ok(connected)
}

/// Waits for the process's end, and notes it once all that the process `said` was taken.
fn watch(sandbox: &Sandbox, pod: &Arc<Pod>, id: &ProcessId, said: oneshot::Receiver<()>) {
    let (sandbox, pod, id) = (sandbox.clone(), Arc::clone(pod), id.clone());
    tokio::spawn(async move {
        let request =
            WaitProcessRequest { container_id: id.container.clone(), exec_id: id.exec.clone(), ..Default::default() };
        let answer = pod
            .agent
            .call("WaitProcess", Patience::Event, async |agent, ctx| agent.wait_process(ctx, &request).await)
            .await;
        match answer {
            Ok(answer) => {
                let status = u32::try_from(answer.status).unwrap_or(255);
                let name = id.clone();
                sandbox.tell(move |state| state.ending(&name, status));
                // Nothing is ever sent: its sender goes.
                let _ = tokio::time::timeout(LAST_WORDS_PATIENCE, said).await;
                if id.exec.is_empty() {
                    fetch_message(&sandbox, &pod, &id.container).await;
                }
                sandbox.tell(move |state| state.exited(&id, status));
            }
            Err(error) => {
                // Without its agent the pod is lost. The machine's end, which may be on its way, says why.
                log::warn!("the end of {id:?} can't be waited for: {error}");
                if boot::ends_now(&*pod.machine, boot::AGENT_END_PATIENCE).await.is_none() {
                    let _ = pod.machine.stop().await;
                }
            }
        }
    });
}

/// How long the guest may take to tell a container's last words.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(2);

/// Writes a container's last words where Kubernetes looks for them, where the guest has only a copy of that file.
async fn fetch_message(sandbox: &Sandbox, pod: &Pod, container: &str) {
    let name = container.to_owned();
    let of = move |state: &mut State| state.containers.get(&name)?.storage.as_ref()?.termination_log.clone();
    let Ok(Some(path)) = sandbox.ask(of).await else { return };
    let request = GetDiagnosticDataRequest {
        container_id: container.to_owned(),
        log_type: "termination_log".into(),
        ..Default::default()
    };
    let get = pod.agent.call("GetDiagnosticData", Patience::Bounded, async |agent, ctx| {
        agent.get_diagnostic_data(ctx, &request).await
    });
    let written = match tokio::time::timeout(MESSAGE_PATIENCE, get).await {
        Ok(Ok(answer)) => tokio::task::spawn_blocking(move || write_message(&path, &answer.data)).await,
        Ok(Err(error)) => return log::warn!("the last words of {container} can't be told: {error}"),
        Err(_) => return log::warn!("the guest does not tell the last words of {container}"),
    };
    if let Ok(Err(error)) = written {
        log::warn!("the last words of {container} can't be written: {error}");
    }
}

/// What Kubernetes takes of a message, in bytes.
const MESSAGE_BYTES_MAX: usize = 4096;

/// Writes into the file that is there: it is kubelet's.
fn write_message(path: &std::path::Path, message: &str) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = std::fs::File::options();
    let mut file = options.write(true).truncate(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let bytes = message.as_bytes();
    file.write_all(bytes.get(..MESSAGE_BYTES_MAX).unwrap_or(bytes))
}

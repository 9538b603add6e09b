//! ExecProcess: another process beside a container's first one, started at once.

use std::sync::Arc;

use coracle_container::Beside;
use coracle_protocol::agent::ExecProcessRequest;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::connections::Ports;
use crate::create::from_wire;
use crate::process::{Process, Streams};
use crate::state::Agent;
use crate::thread::{on_thread, to_its_end};
use crate::{Error, Result};

/// Starts the process. One whose request has passed its deadline meanwhile is ended.
pub(crate) async fn exec(agent: &Arc<Agent>, request: ExecProcessRequest) -> Result<Empty> {
    let (starter, ender) = (Arc::clone(agent), Arc::clone(agent));
    let (container, name) = (request.container_id.clone(), request.exec_id.clone());
    let undo = async move || {
        let Ok(container) = ender.container(&container) else { return };
        let Ok(process) = container.process(&name) else { return };
        let _ = process.signal(libc::SIGKILL);
        process.wait().await;
        process.set_waited();
        process.close_streams().await;
        container.forget_exec(&name);
    };
    to_its_end(async move { start(&starter, request).await }, undo).await
}

async fn start(agent: &Arc<Agent>, request: ExecProcessRequest) -> Result<Empty> {
    let ports = Ports { stdin: request.stdin_port, stdout: request.stdout_port, stderr: request.stderr_port };
    let named = agent.connections.named(ports).await?;
    let container = agent.container(&request.container_id)?;
    if request.exec_id.is_empty() {
        return Err(Error::Invalid("ExecProcess without an exec_id".into()));
    }
    if container.has_exec(&request.exec_id) {
        return Err(Error::Exists(format!("process {}", request.exec_id)));
    }
    if container.init.has_ended() {
        return Err(Error::State(format!("container {} has ended", container.id)));
    }
    let process = request.process.as_ref().ok_or_else(|| Error::Invalid("ExecProcess without a process".into()))?;
    let process: oci_spec::runtime::Process = from_wire(process)?;
    let (theirs, ours) = Streams::new(process.terminal().unwrap_or(false))?.split();
    let (program, cgroup) = (agent.config.program.clone(), container.cgroup.path().to_owned());
    let beside = Beside {
        pid: container.pid,
        process,
        seccomp: container.seccomp.clone(),
        personality: container.personality.clone(),
    };
    let prepared = on_thread(move || coracle_container::exec(&program, &cgroup, beside, theirs)).await?;
    let process = Process::watch(prepared, ours).await?;
    container.insert_exec(&request.exec_id, Arc::clone(&process))?;
    if let Some(named) = named {
        named.serve(&request.container_id, &request.exec_id, &process).await;
    }
    if let Err(error) = process.start().await {
        process.set_waited();
        process.close_streams().await;
        container.forget_exec(&request.exec_id);
        return Err(error);
    }
    Ok(Empty::new())
}

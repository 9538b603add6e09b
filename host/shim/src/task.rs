//! The Task service: one implementation, served as version 2 and 3.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{self, Empty};
use containerd_shim_protos::events::task as event;
use containerd_shim_protos::protobuf::{CodedInputStream, EnumOrUnknown, MessageField};
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::ttrpc::{self, Code};
use coracle_protocol::oci;
use coracle_sandbox::{CreateRequest, Error, ProcessId, Status};
use coracle_storage::HostMount;

use crate::bundle::Membership;
use crate::error::{answer, status};
use crate::shim::{Shim, Streams};
use crate::{bundle, folder, metrics, pod_config, stdio};

/// The service.
pub(crate) struct TaskService {
    shim: Arc<Shim>,
}

impl TaskService {
    pub(crate) fn new(shim: Arc<Shim>) -> Self {
        Self { shim }
    }

    async fn create_task(&self, request: &api::CreateTaskRequest) -> Result<(), Error> {
        if !request.checkpoint.is_empty() {
            return Err(Error::Unsupported("restoring a checkpoint is not supported".into()));
        }
        let bundle_folder = PathBuf::from(&request.bundle);
        let mut spec = bundle::read(&bundle_folder)?;
        let settings_file = settings_file(request).map(PathBuf::from);
        let membership = bundle::membership(&spec);
        if self.shim.is_described() {
            pod_config::complete(&mut spec, &folder::files(&self.shim.folder));
        }
        if !matches!(membership, Membership::Of(_)) {
            self.shim.join_cgroup(bundle::cgroup(&spec)).await?;
        }
        let sandbox = self.shim.sandbox_or_new(settings_file.as_deref(), &spec.Annotations)?;
        if membership == Membership::Pod {
            sandbox.run_pod(&request.id, &spec).await?;
            self.shim.describe(process(&request.id, ""), description(request));
            return Ok(());
        }
        let names = (request.id.as_str(), self.shim.namespace.as_str());
        let streams = stdio::open(&request.stdin, &request.stdout, &request.stderr, request.terminal, names).await?;
        let root = spec.Root.as_ref().map(|root| root.Path.clone()).filter(|path| !path.is_empty());
        let root = bundle_folder.join(root.unwrap_or_else(|| "rootfs".into()));
        sandbox
            .create(CreateRequest { id: request.id.clone(), spec, root, rootfs: rootfs(request), stdio: streams })
            .await?;
        self.shim.describe(process(&request.id, ""), description(request));
        Ok(())
    }

    async fn describe(&self, process: &ProcessId) -> Result<api::StateResponse, Error> {
        let state = self.shim.pod_of(&process.container)?.state(process).await?;
        let description = self.shim.description(process);
        let status = match state.status {
            Status::Created => api::Status::CREATED,
            Status::Running => api::Status::RUNNING,
            Status::Paused => api::Status::PAUSED,
            Status::Stopped => api::Status::STOPPED,
        };
        Ok(api::StateResponse {
            id: process.container.clone(),
            exec_id: process.exec.clone(),
            bundle: description.bundle,
            pid: std::process::id(),
            status: EnumOrUnknown::new(status),
            stdin: description.stdin,
            stdout: description.stdout,
            stderr: description.stderr,
            terminal: state.terminal,
            exit_status: state.exit.map_or(0, |exit| exit.status),
            exited_at: state.exit.map(|exit| metrics::timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn delete_task(&self, process: &ProcessId) -> Result<api::DeleteResponse, Error> {
        let exit = self.shim.pod_of(&process.container)?.delete(process).await?;
        self.shim.forget(process);
        Ok(api::DeleteResponse {
            pid: std::process::id(),
            exit_status: exit.status,
            exited_at: MessageField::some(metrics::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn exec_process(&self, request: api::ExecProcessRequest) -> Result<(), Error> {
        let sandbox = self.shim.pod_of(&request.id)?;
        let spec: oci::Process = from_any(request.spec.as_ref(), "the process of an exec")?;
        let id = process(&request.id, &request.exec_id);
        // Asked before the streams are opened: an unknown container must not touch files.
        sandbox.state(&process(&request.id, "")).await?;
        let names = (request.exec_id.as_str(), self.shim.namespace.as_str());
        let streams = stdio::open(&request.stdin, &request.stdout, &request.stderr, request.terminal, names).await?;
        sandbox.exec(&id, spec, streams).await?;
        let (stdin, stdout, stderr) = (request.stdin, request.stdout, request.stderr);
        self.shim.describe(id, Streams { bundle: String::new(), stdin, stdout, stderr });
        Ok(())
    }

    fn publish<M: containerd_shim_protos::protobuf::Message>(&self, topic: &str, name: &str, message: &M) {
        self.shim.publisher.publish(topic, &format!("containerd.events.{name}"), message);
    }
}

fn process(id: &str, exec_id: &str) -> ProcessId {
    ProcessId { container: id.to_owned(), exec: exec_id.to_owned() }
}

fn description(request: &api::CreateTaskRequest) -> Streams {
    Streams {
        bundle: request.bundle.clone(),
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
    }
}

fn rootfs(request: &api::CreateTaskRequest) -> Vec<HostMount> {
    let mount = |mount: &api::Mount| HostMount {
        kind: mount.type_.clone(),
        source: PathBuf::from(&mount.source),
        target: PathBuf::new(),
        options: mount.options.clone(),
        owners: None,
    };
    request.rootfs.iter().map(mount).collect()
}

/// The file that containerd's runtime options name (`ConfigPath`).
fn settings_file(request: &api::CreateTaskRequest) -> Option<String> {
    let options = request.options.as_ref().filter(|options| options.type_url.ends_with("runtimeoptions.v1.Options"));
    options.and_then(|options| config_path(&options.value))
}

/// Field 2 of containerd's `runtimeoptions.v1.Options`, a text.
pub(crate) fn config_path(message: &[u8]) -> Option<String> {
    const CONFIG_PATH: u32 = 2 << 3 | 2;
    let mut stream = CodedInputStream::from_bytes(message);
    let mut path = None;
    while let Some(tag) = stream.read_raw_tag_or_eof().ok()? {
        if tag == CONFIG_PATH {
            path = stream.read_string().ok();
        } else {
            containerd_shim_protos::protobuf::rt::skip_field_for_tag(tag, &mut stream).ok()?;
        }
    }
    path.filter(|path| !path.is_empty())
}

/// A structure of the OCI specification that containerd sends as JSON.
fn from_any<M: coracle_protocol::protobuf::MessageFull>(
    any: Option<&coracle_protocol::protobuf::well_known_types::any::Any>,
    what: &str,
) -> Result<M, Error> {
    let any = any.ok_or_else(|| Error::Invalid(format!("{what} is missing")))?;
    let text = std::str::from_utf8(&any.value).map_err(|error| Error::Invalid(format!("{what}: {error}")))?;
    coracle_protocol::from_json(text).map_err(|error| Error::Invalid(format!("{what}: {error}")))
}

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> Answer<api::StateResponse> {
        answer("State", self.describe(&process(&request.id, &request.exec_id)).await)
    }

    async fn create(&self, _: &TtrpcContext, request: api::CreateTaskRequest) -> Answer<api::CreateTaskResponse> {
        let created = self.create_task(&request).await;
        answer("Create", created)?;
        let message = event::TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(event::TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            }),
            pid: std::process::id(),
            ..Default::default()
        };
        self.publish(topics::TASK_CREATE_EVENT_TOPIC, "TaskCreate", &message);
        Ok(api::CreateTaskResponse { pid: std::process::id(), ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> Answer<api::StartResponse> {
        let id = process(&request.id, &request.exec_id);
        let started = async { self.shim.pod_of(&id.container)?.start(&id).await };
        answer("Start", started.await)?;
        let pid = std::process::id();
        if request.exec_id.is_empty() {
            self.shim.counts.started(&request.id);
            let message = event::TaskStart { container_id: request.id, pid, ..Default::default() };
            self.publish(topics::TASK_START_EVENT_TOPIC, "TaskStart", &message);
        } else {
            let message = event::TaskExecStarted {
                container_id: request.id,
                exec_id: request.exec_id,
                pid,
                ..Default::default()
            };
            self.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, "TaskExecStarted", &message);
        }
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> Answer<api::DeleteResponse> {
        let response = answer("Delete", self.delete_task(&process(&request.id, &request.exec_id)).await)?;
        let message = event::TaskDelete {
            container_id: request.id.clone(),
            id: if request.exec_id.is_empty() { request.id } else { request.exec_id },
            pid: response.pid,
            exit_status: response.exit_status,
            exited_at: response.exited_at.clone(),
            ..Default::default()
        };
        self.publish(topics::TASK_DELETE_EVENT_TOPIC, "TaskDelete", &message);
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Answer<api::PidsResponse> {
        let found = async { self.shim.pod_of(&request.id)?.processes(&request.id).await };
        answer("Pids", found.await)?;
        // A guest's pids mean nothing on the host: all its processes are this one. It is told of a container that has ended, too: a
        // containerd that was restarted throws away what has no process, and with it the exit status that nobody has asked for yet.
        let one = api::ProcessInfo { pid: std::process::id(), ..Default::default() };
        Ok(api::PidsResponse { processes: vec![one], ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Answer<Empty> {
        let paused = async { self.shim.pod_of(&request.id)?.pause(&request.id).await };
        answer("Pause", paused.await)?;
        let message = event::TaskPaused { container_id: request.id, ..Default::default() };
        self.publish(topics::TASK_PAUSED_EVENT_TOPIC, "TaskPaused", &message);
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Answer<Empty> {
        let resumed = async { self.shim.pod_of(&request.id)?.resume(&request.id).await };
        answer("Resume", resumed.await)?;
        let message = event::TaskResumed { container_id: request.id, ..Default::default() };
        self.publish(topics::TASK_RESUMED_EVENT_TOPIC, "TaskResumed", &message);
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> Answer<Empty> {
        Err(status(Code::UNIMPLEMENTED, "checkpoints are not supported".into()))
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Answer<Empty> {
        let killed = async {
            self.shim.pod_of(&request.id)?.kill(&process(&request.id, &request.exec_id), request.signal).await
        };
        answer("Kill", killed.await)?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Answer<Empty> {
        let message = event::TaskExecAdded {
            container_id: request.id.clone(),
            exec_id: request.exec_id.clone(),
            ..Default::default()
        };
        answer("Exec", self.exec_process(request).await)?;
        self.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, "TaskExecAdded", &message);
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> Answer<Empty> {
        let id = process(&request.id, &request.exec_id);
        let resized = async { self.shim.pod_of(&id.container)?.resize(&id, request.width, request.height).await };
        answer("ResizePty", resized.await)?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Answer<Empty> {
        if request.stdin {
            let id = process(&request.id, &request.exec_id);
            let closed = async { self.shim.pod_of(&id.container)?.close_input(&id).await };
            answer("CloseIO", closed.await)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Answer<Empty> {
        let updated = async {
            let resources = from_any(request.resources.as_ref(), "the resources of an update")?;
            self.shim.pod_of(&request.id)?.update(&request.id, resources).await
        };
        answer("Update", updated.await)?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Answer<api::WaitResponse> {
        let waited = async { self.shim.pod_of(&request.id)?.wait(&process(&request.id, &request.exec_id)).await };
        let exit = answer("Wait", waited.await)?;
        Ok(api::WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(metrics::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> Answer<api::StatsResponse> {
        let stats = async { self.shim.pod_of(&request.id)?.stats(&request.id).await };
        let stats = answer("Stats", stats.await)?;
        let packed = metrics::pack(&stats).map_err(|error| status(Code::INTERNAL, error.to_string()))?;
        Ok(api::StatsResponse { stats: MessageField::some(packed), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, _: api::ConnectRequest) -> Answer<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: std::process::id(),
            version: coracle_protocol::VERSION.into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> Answer<Empty> {
        if self.shim.is_described() {
            log::info!("Shutdown: the pod ends by ShutdownSandbox");
            return Ok(Empty::new());
        }
        let empty = match self.shim.sandbox() {
            Ok(sandbox) => sandbox.is_empty().await.unwrap_or(true),
            Err(_) => true,
        };
        // Other containers of the pod go on.
        if empty || request.now {
            self.shim.end();
        } else {
            log::info!("Shutdown: other containers of the pod go on");
        }
        Ok(Empty::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_path_is_found_among_options() {
        let message = [b"\x0a\x01x\x12\x0b/etc/c.toml\x1a\x01z".as_slice()].concat();
        assert_eq!(config_path(&message).as_deref(), Some("/etc/c.toml"));
        assert_eq!(config_path(b"\x0a\x01x"), None);
        assert_eq!(config_path(b"\xff\xff"), None);
    }
}

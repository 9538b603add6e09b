//! A shim, driven by hand over the Task API as containerd does it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};
use containerd_shim_protos::ttrpc::{self, Code, context};
use containerd_shim_protos::{Client, TaskClient};

use crate::{Host, Outcome, path};

/// What a refused request says: its code and text.
pub type Refused = (Code, String);

/// A mount of a root: its type, source and options.
pub type RootMount<'a> = (&'a str, &'a str, &'a [&'a str]);

pub(crate) fn mount((kind, source, options): &RootMount<'_>) -> api::Mount {
    api::Mount {
        type_: (*kind).into(),
        source: (*source).into(),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Default::default()
    }
}

/// A shim and the one container that it was started for.
pub struct Shim {
    client: TaskClient,
    id: String,
    bundle: PathBuf,
    /// What goes with each request, as containerd's tracing has it.
    pub metadata: HashMap<String, Vec<String>>,
}

pub(crate) fn refused(error: ttrpc::Error) -> Refused {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => (Code::UNKNOWN, other.to_string()),
    }
}

/// Longer than any answer takes, and than a machine takes to come up.
pub(crate) fn patience() -> context::Context {
    context::with_duration(Duration::from_secs(120))
}

impl Shim {
    /// Of a request.
    fn context(&self) -> context::Context {
        let mut context = patience();
        context.metadata.clone_from(&self.metadata);
        context
    }

    /// Writes a bundle of this name and runs the shim's `start` in it; the outcome's output is the address.
    ///
    /// # Panics
    /// Where files can't be written.
    #[must_use]
    pub fn start_in(host: &Host, id: &str, config: &[u8]) -> (PathBuf, Outcome) {
        Self::start_program(host, &path("CORACLE_TEST_SHIM"), &[], id, config)
    }

    fn start_program(
        host: &Host,
        program: &std::path::Path,
        environment: &[(&str, &str)],
        id: &str,
        config: &[u8],
    ) -> (PathBuf, Outcome) {
        let bundle = host.folder.join(id);
        std::fs::create_dir_all(&bundle).expect("a bundle");
        std::fs::write(bundle.join("config.json"), config).expect("a bundle");
        let mut command = Command::new(program);
        command.args(["-namespace", "test", "-id", id, "start"]).current_dir(&bundle);
        command.env("CORACLE_CONFIG", host.settings_file()).envs(environment.iter().copied());
        let outcome = Outcome::of(command, b"");
        (bundle, outcome)
    }

    /// The same as [`Self::start`] by another name of the shim's program, and with more in its environment.
    ///
    /// # Panics
    /// Where it does not start.
    #[must_use]
    pub fn start_as(
        host: &Host,
        program: &std::path::Path,
        environment: &[(&str, &str)],
        id: &str,
        config: &[u8],
    ) -> Self {
        let (bundle, outcome) = Self::start_program(host, program, environment, id, config);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        let client = TaskClient::new(Client::connect(outcome.line()).expect("the shim listens"));
        Self { client, id: id.to_owned(), bundle, metadata: HashMap::new() }
    }

    /// Starts a shim for the container `id` with this configuration, and connects to it.
    ///
    /// # Panics
    /// Where it does not start.
    #[must_use]
    pub fn start(host: &Host, id: &str, config: &[u8]) -> Self {
        let (bundle, outcome) = Self::start_in(host, id, config);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        let client = TaskClient::new(Client::connect(outcome.line()).expect("the shim listens"));
        Self { client, id: id.to_owned(), bundle, metadata: HashMap::new() }
    }

    /// The shim of the host's only pod, to ask it of the container `id`.
    ///
    /// # Panics
    /// Where it does not listen.
    #[must_use]
    pub fn of_pod(host: &Host, id: &str) -> Self {
        let address = format!("unix://{}", host.pod().join("shim.sock").display());
        let client = TaskClient::new(Client::connect(&address).expect("the shim listens"));
        Self { client, id: id.to_owned(), bundle: PathBuf::new(), metadata: HashMap::new() }
    }

    /// The bundle's folder.
    #[must_use]
    pub fn bundle(&self) -> &std::path::Path {
        &self.bundle
    }

    /// Creates the container.
    ///
    /// # Errors
    /// [`Refused`], as in all that follow.
    pub fn create(&self) -> Result<(), Refused> {
        self.create_as(&self.id)
    }

    /// Creates the container with a root that is mounts, as containerd's snapshotters give them: type, source, options.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn create_with_root(&self, id: &str, mounts: &[RootMount<'_>]) -> Result<(), Refused> {
        let request = api::CreateTaskRequest {
            id: id.into(),
            bundle: self.bundle.display().to_string(),
            rootfs: mounts.iter().map(mount).collect(),
            ..Default::default()
        };
        self.client.create(self.context(), &request).map(drop).map_err(refused)
    }

    /// Creates a container of this name from the same bundle.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn create_as(&self, id: &str) -> Result<(), Refused> {
        let request =
            api::CreateTaskRequest { id: id.into(), bundle: self.bundle.display().to_string(), ..Default::default() };
        self.client.create(self.context(), &request).map(drop).map_err(refused)
    }

    /// Starts its first process, or the exec of this name.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn start_process(&self, exec_id: &str) -> Result<(), Refused> {
        let request = api::StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        self.client.start(self.context(), &request).map(drop).map_err(refused)
    }

    /// Writes another configuration into the bundle, for the next create.
    ///
    /// # Panics
    /// Where it can't be written.
    pub fn configure(&self, config: &serde_json::Value) {
        std::fs::write(self.bundle.join("config.json"), config.to_string()).expect("a bundle");
    }

    /// Notes an exec of a command.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn exec(&self, exec_id: &str, process: &serde_json::Value) -> Result<(), Refused> {
        let spec = Any { value: process.to_string().into_bytes(), ..Default::default() };
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.client.exec(self.context(), &request).map(drop).map_err(refused)
    }

    /// The exit code of a process, once it has ended.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn wait(&self, exec_id: &str) -> Result<u32, Refused> {
        let request = api::WaitRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        self.client.wait(self.context(), &request).map(|answer| answer.exit_status).map_err(refused)
    }

    /// The container's status.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn state(&self) -> Result<api::Status, Refused> {
        let request = api::StateRequest { id: self.id.clone(), ..Default::default() };
        let answer = self.client.state(self.context(), &request).map_err(refused)?;
        Ok(EnumOrUnknown::enum_value_or_default(&answer.status))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn kill(&self, exec_id: &str, signal: u32) -> Result<(), Refused> {
        let request = api::KillRequest { id: self.id.clone(), exec_id: exec_id.into(), signal, ..Default::default() };
        self.client.kill(self.context(), &request).map(drop).map_err(refused)
    }

    /// Kills and deletes another container of the pod, whatever becomes of it.
    pub fn kill_of(&self, id: &str, signal: u32) {
        let request = api::KillRequest { id: id.into(), signal, ..Default::default() };
        let _ = self.client.kill(self.context(), &request);
        let request = api::WaitRequest { id: id.into(), ..Default::default() };
        let _ = self.client.wait(self.context(), &request);
        let request = api::DeleteRequest { id: id.into(), ..Default::default() };
        let _ = self.client.delete(self.context(), &request);
    }

    /// Deletes the container, and gives its exit code.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn delete(&self) -> Result<u32, Refused> {
        let request = api::DeleteRequest { id: self.id.clone(), ..Default::default() };
        self.client.delete(self.context(), &request).map(|answer| answer.exit_status).map_err(refused)
    }

    /// Asks for a checkpoint.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn checkpoint(&self) -> Result<(), Refused> {
        let request = api::CheckpointTaskRequest { id: self.id.clone(), ..Default::default() };
        self.client.checkpoint(self.context(), &request).map(drop).map_err(refused)
    }

    /// Ends the shim.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn shutdown(&self) -> Result<(), Refused> {
        let request = api::ShutdownRequest { id: self.id.clone(), ..Default::default() };
        self.client.shutdown(self.context(), &request).map(drop).map_err(refused)
    }

    /// Shuts the shim down, and waits until it has ended: then nothing is left of the pod.
    ///
    /// # Panics
    /// Where it refuses, or has not ended within a minute.
    pub fn finish(self) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        use rustix::process::{Pid, PidfdFlags, pidfd_open};
        let request = api::ConnectRequest { id: self.id.clone(), ..Default::default() };
        let pid = self.client.connect(self.context(), &request).unwrap().shim_pid;
        let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
        let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        self.shutdown().unwrap();
        let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&minute)).unwrap(), 1, "the shim goes on");
    }
}

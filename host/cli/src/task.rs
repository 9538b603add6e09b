//! The Task API, as a client.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::{self, Code, context};

use crate::container::Record;

/// A connection to a container's shim.
#[derive(Clone)]
pub(crate) struct Task {
    client: TaskClient,
    id: String,
    /// The shim's socket as a path.
    socket: String,
}

/// The names of a process's streams.
#[derive(Debug, Clone, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// How long a request may take that waits for nothing in the container. The shim has shorter bounds of its own.
fn soon() -> context::Context {
    context::with_duration(Duration::from_secs(300))
}

/// What the shim answers to a request that it refuses.
#[derive(Debug)]
struct Refused {
    code: Code,
    text: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.text)
    }
}

impl std::error::Error for Refused {}

fn status_text(error: ttrpc::Error) -> anyhow::Error {
    match error {
        ttrpc::Error::RpcStatus(status) => Refused { code: status.code(), text: status.message().to_owned() }.into(),
        other => anyhow::anyhow!("the container's shim does not answer: {other}"),
    }
}

/// The code of a failed start: docker's 127 for a command that is not there, 126 for one that can't be run.
pub(crate) fn exit_code(error: &anyhow::Error) -> Option<u8> {
    let text = format!("{error:#}");
    if !text.contains("exec: \"") {
        return None;
    }
    if text.contains("executable file not found") || text.contains("no such file or directory") {
        Some(127)
    } else {
        Some(126)
    }
}

/// Whether the shim knows no such process.
pub(crate) fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Refused>().is_some_and(|refused| refused.code == Code::NOT_FOUND)
}

impl Task {
    /// Connects to the shim of a container that has one.
    pub(crate) async fn connect(record: &Record) -> Result<Self> {
        let address = record.address.as_deref().with_context(|| format!("{} does not run", record.name))?;
        let client = Client::connect(address).await.with_context(|| format!("{} does not run", record.name))?;
        let socket = address.trim_start_matches("unix://").to_owned();
        Ok(Self { client: TaskClient::new(client), id: record.id.clone(), socket })
    }

    pub(crate) async fn create(&self, bundle: &str, rootfs: Vec<api::Mount>, streams: &Streams) -> Result<()> {
        let request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: bundle.to_owned(),
            rootfs,
            terminal: streams.terminal,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            ..Default::default()
        };
        self.client.create(soon(), &request).await.map(drop).map_err(status_text)
    }

    pub(crate) async fn exec(&self, exec_id: &str, process: &serde_json::Value, streams: &Streams) -> Result<()> {
        let spec = containerd_shim_protos::protobuf::well_known_types::any::Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            terminal: streams.terminal,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            spec: MessageField::some(spec),
            ..Default::default()
        };
        self.client.exec(soon(), &request).await.map(drop).map_err(status_text)
    }

    pub(crate) async fn start(&self, exec_id: &str) -> Result<()> {
        let request = api::StartRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.client.start(soon(), &request).await.map(drop).map_err(status_text)
    }

    /// Waits for a process's end and gives its exit code.
    pub(crate) async fn wait(&self, exec_id: &str) -> Result<u32> {
        let request = api::WaitRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() };
        let answer = self.client.wait(context::with_timeout(0), &request).await.map_err(status_text)?;
        Ok(answer.exit_status)
    }

    pub(crate) async fn kill(&self, exec_id: &str, signal: u32) -> Result<()> {
        let request =
            api::KillRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), signal, ..Default::default() };
        self.client.kill(soon(), &request).await.map(drop).map_err(status_text)
    }

    pub(crate) async fn state(&self) -> Result<api::StateResponse> {
        let request = api::StateRequest { id: self.id.clone(), ..Default::default() };
        self.client.state(soon(), &request).await.map_err(status_text)
    }

    pub(crate) async fn resize(&self, exec_id: &str, width: u32, height: u32) -> Result<()> {
        let request = api::ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            width,
            height,
            ..Default::default()
        };
        self.client.resize_pty(soon(), &request).await.map(drop).map_err(status_text)
    }

    pub(crate) async fn close_input(&self, exec_id: &str) -> Result<()> {
        let request =
            api::CloseIORequest { id: self.id.clone(), exec_id: exec_id.to_owned(), stdin: true, ..Default::default() };
        self.client.close_io(soon(), &request).await.map(drop).map_err(status_text)
    }

    pub(crate) async fn delete(&self, exec_id: &str) -> Result<()> {
        let request = api::DeleteRequest { id: self.id.clone(), exec_id: exec_id.to_owned(), ..Default::default() };
        self.client.delete(soon(), &request).await.map(drop).map_err(status_text)
    }

    /// Ends the shim, and waits until it is gone. True where it has taken all that was the pod's with it; one that was killed
    /// has not, at whatever moment that was.
    pub(crate) async fn shutdown(&self) -> bool {
        // A connection of its own ends with the shim's process, when all clean-up is done.
        let witness = tokio::net::UnixStream::connect(&self.socket).await;
        let request = api::ShutdownRequest { id: self.id.clone(), now: true, ..Default::default() };
        let _ = self.client.shutdown(soon(), &request).await;
        if let Ok(mut witness) = witness {
            let mut byte = [0; 1];
            let gone = tokio::io::AsyncReadExt::read(&mut witness, &mut byte);
            let _ = tokio::time::timeout(Duration::from_secs(30), gone).await;
        }
        // The socket lies in the pod's folder.
        Path::new(&self.socket).parent().is_none_or(|folder| !folder.exists())
    }
}

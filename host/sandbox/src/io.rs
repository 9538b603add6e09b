//! The standard streams of a process: between the host's ends and the agent, chunk by chunk.

use std::pin::Pin;
use std::sync::Arc;

use coracle_protocol::STREAM_CHUNK_BYTES;
use coracle_protocol::agent::{CloseStdinRequest, ReadStreamRequest, WriteStreamRequest};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::agent::Patience;
use crate::pod::Pod;
use crate::{ProcessId, Result};

/// The most of the input that one request carries, in bytes.
const INPUT_CHUNK_BYTES: usize = 64 * 1024;

/// The host's end of a process's input.
pub struct Input {
    /// What the process reads.
    pub stream: Pin<Box<dyn AsyncRead + Send + Sync>>,
    /// What keeps the stream from ending while nobody has it open for writing; dropped by [`crate::Sandbox::close_input`].
    pub keeper: Option<Box<dyn Send + Sync>>,
}

/// The host's end of a process's output.
pub type Output = Pin<Box<dyn AsyncWrite + Send + Sync>>;

/// The host's ends of a process's streams. One that is absent is empty, or thrown away.
#[derive(Default)]
pub struct Stdio {
    /// Input.
    pub stdin: Option<Input>,
    /// Output; everything, where the process has a terminal.
    pub stdout: Option<Output>,
    /// Error output.
    pub stderr: Option<Output>,
    /// Whether the process has a terminal.
    pub terminal: bool,
}

impl std::fmt::Debug for Stdio {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Stdio").field("terminal", &self.terminal).finish_non_exhaustive()
    }
}

/// Moves the streams of a process that was started. The task ends when its outputs are at their end.
pub(crate) fn pump(pod: &Arc<Pod>, id: &ProcessId, stdio: Stdio) -> tokio::task::JoinHandle<()> {
    let (pod, id) = (Arc::clone(pod), id.clone());
    tokio::spawn(async move {
        // Dropped, and so given up, with this task.
        let mut input = tokio::task::JoinSet::new();
        input.spawn(pump_input(Arc::clone(&pod), id.clone(), stdio.stdin));
        let stdout = pump_output(&pod, &id, stdio.stdout, Stream::Stdout);
        let stderr = async {
            if !stdio.terminal {
                pump_output(&pod, &id, stdio.stderr, Stream::Stderr).await;
            }
        };
        tokio::join!(stdout, stderr);
        drop(input);
    })
}

#[derive(Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

async fn pump_output(pod: &Arc<Pod>, id: &ProcessId, mut output: Option<Output>, stream: Stream) {
    loop {
        let data = match read(pod, id, stream).await {
            Ok(data) if !data.is_empty() => data,
            Ok(_) => break,
            Err(error) => {
                log::debug!("output of {id:?}: {error}");
                break;
            }
        };
        let written = match &mut output {
            Some(writer) => writer.write_all(&data).await,
            None => Ok(()),
        };
        if let Err(error) = written {
            // Nobody reads any more; the process must not be held up by that.
            log::warn!("output of {id:?} is thrown away: {error}");
            output = None;
        }
    }
    if let Some(writer) = &mut output {
        let _ = writer.flush().await;
    }
}

async fn read(pod: &Arc<Pod>, id: &ProcessId, stream: Stream) -> Result<Vec<u8>> {
    let request = ReadStreamRequest {
        container_id: id.container.clone(),
        exec_id: id.exec.clone(),
        len: STREAM_CHUNK_BYTES,
        ..Default::default()
    };
    let answer = match stream {
        Stream::Stdout => {
            pod.agent
                .call("ReadStdout", Patience::Event, async |agent, ctx| agent.read_stdout(ctx, &request).await)
                .await
        }
        Stream::Stderr => {
            pod.agent
                .call("ReadStderr", Patience::Event, async |agent, ctx| agent.read_stderr(ctx, &request).await)
                .await
        }
    };
    Ok(answer?.data)
}

async fn pump_input(pod: Arc<Pod>, id: ProcessId, input: Option<Input>) {
    if let Some(mut input) = input {
        let mut buffer = vec![0; INPUT_CHUNK_BYTES];
        loop {
            let data = match input.stream.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(count) => buffer.get(..count).unwrap_or_default().to_vec(),
            };
            let request = WriteStreamRequest {
                container_id: id.container.clone(),
                exec_id: id.exec.clone(),
                data,
                ..Default::default()
            };
            let sent = pod
                .agent
                .call("WriteStdin", Patience::Event, async |agent, ctx| agent.write_stdin(ctx, &request).await)
                .await;
            if let Err(error) = sent {
                log::debug!("input of {id:?}: {error}");
                return;
            }
        }
    }
    let request = CloseStdinRequest { container_id: id.container, exec_id: id.exec, ..Default::default() };
    // A process that has ended needs no end of its input.
    let _ = pod
        .agent
        .call("CloseStdin", Patience::Bounded, async |agent, ctx| agent.close_stdin(ctx, &request).await)
        .await;
}

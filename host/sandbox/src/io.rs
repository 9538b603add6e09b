//! The standard streams of a process: between the host's ends and connections to the guest that carry them.

use std::pin::Pin;

use coracle_machine::GuestStream;
use coracle_protocol::ports;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::oneshot;

use crate::pod::Pod;
use crate::{Error, ProcessId, Result};

/// How much is moved at a time, in bytes.
const CHUNK_BYTES: usize = 64 * 1024;

/// How long who reads an output may take to have it all, once it is at its end.
const TAKEN_PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

/// The host's end of a process's input.
pub struct Input {
    /// What the process reads.
    pub stream: Pin<Box<dyn AsyncRead + Send + Sync>>,
    /// What keeps the stream from ending while nobody has it open for writing; dropped by [`crate::Sandbox::close_input`].
    pub keeper: Option<Box<dyn Send + Sync>>,
}

/// The host's end of a process's output. Its shutdown is done when who reads it has taken everything.
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

/// The guest's ends of a process's streams: a connection each.
pub(crate) struct Connected {
    stdin: Option<GuestStream>,
    stdout: GuestStream,
    stderr: Option<GuestStream>,
    pub(crate) ports: Ports,
}

/// The names of the connections in a request to the agent; 0 is none.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ports {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
}

/// Which streams a process has; output it has always.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) stdin: bool,
    pub(crate) terminal: bool,
}

impl From<&Stdio> for Wanted {
    fn from(stdio: &Stdio) -> Self {
        Self { stdin: stdio.stdin.is_some(), terminal: stdio.terminal }
    }
}

/// Connects the streams of a process that is about to be made.
pub(crate) async fn connect(pod: &Pod, wanted: Wanted) -> Result<Connected> {
    let address = pod.machine.agent_address();
    let one = || address.connect_from(ports::STREAMS);
    let optional = async |is: bool| if is { one().await.map(Some) } else { Ok(None) };
    let all = async { tokio::try_join!(optional(wanted.stdin), one(), optional(!wanted.terminal)) };
    let late = |_| Error::Timeout("the guest does not take the streams of a process".into());
    let (stdin, stdout, stderr) = tokio::time::timeout(pod.agent.timeout(), all).await.map_err(late)??;
    let port = |stream: &Option<(GuestStream, u32)>| stream.as_ref().map_or(0, |(_, port)| *port);
    let ports = Ports { stdin: port(&stdin), stdout: stdout.1, stderr: port(&stderr) };
    let stream = |named: Option<(GuestStream, u32)>| named.map(|(stream, _)| stream);
    Ok(Connected { stdin: stream(stdin), stdout: stdout.0, stderr: stream(stderr), ports })
}

/// Moves the streams of a process that was started. The task ends when its outputs are at their end and were taken, and drops
/// `done` then.
pub(crate) fn pump(
    id: &ProcessId,
    stdio: Stdio,
    connected: Connected,
    done: oneshot::Sender<()>,
) -> tokio::task::JoinHandle<()> {
    let id = id.clone();
    tokio::spawn(async move {
        // Dropped, and so given up, with this task.
        let mut input = tokio::task::JoinSet::new();
        if let (Some(ours), Some(theirs)) = (stdio.stdin, connected.stdin) {
            input.spawn(pump_input(ours, theirs));
        }
        let stdout = pump_output(&id, connected.stdout, stdio.stdout);
        let stderr = async {
            if let Some(theirs) = connected.stderr {
                pump_output(&id, theirs, stdio.stderr).await;
            }
        };
        tokio::join!(stdout, stderr);
        drop((input, done));
    })
}

async fn pump_output(id: &ProcessId, mut from: GuestStream, mut output: Option<Output>) {
    let mut buffer = Vec::with_capacity(CHUNK_BYTES);
    loop {
        match from.read_buf(&mut buffer).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => {
                log::debug!("output of {id:?}: {error}");
                break;
            }
        }
        let written = match &mut output {
            Some(writer) => writer.write_all(&buffer).await,
            None => Ok(()),
        };
        buffer.clear();
        if let Err(error) = written {
            // Nobody reads any more; the process must not be held up by that.
            log::warn!("output of {id:?} is thrown away: {error}");
            output = None;
        }
    }
    if let Some(writer) = &mut output
        && tokio::time::timeout(TAKEN_PATIENCE, writer.shutdown()).await.is_err()
    {
        log::debug!("nobody has taken all of the output of {id:?}");
    }
}

async fn pump_input(mut from: Input, mut to: GuestStream) {
    let mut buffer = Vec::with_capacity(CHUNK_BYTES);
    while from.stream.read_buf(&mut buffer).await.is_ok_and(|count| count > 0) {
        // A process that reads no more has hung up.
        if to.write_all(&buffer).await.is_err() {
            return;
        }
        buffer.clear();
    }
    // The end of the input; the connection is held until the process's outputs are at theirs.
    let _ = to.shutdown().await;
    std::future::pending::<()>().await;
}

//! Connections that carry a process's streams.
//!
//! The host connects to [`coracle_protocol::ports::STREAMS`] once a stream, and then names each connection in its request by
//! the port that it came from. What flows there needs no calls.
//!
//! ```text
//! host ── connect, from port p ─▶ waiting[p]        host ── CreateContainer { stdout_port: p } ─▶ taken, pipe ═▶ connection
//! ```

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use coracle_protocol::agent::{ReadStreamRequest, WriteStreamRequest};
use futures::StreamExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

use crate::process::{Process, Stream};
use crate::{Error, Result, gate};

/// A connection of the host's.
pub type Connection = Pin<Box<dyn Io>>;

/// What a [`Connection`] can do.
pub trait Io: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Io for T {}

/// The connections that come in, each with the port on the host that it comes from.
pub type Incoming = Pin<Box<dyn futures::Stream<Item = (u32, Connection)> + Send>>;

/// The most connections that wait for a request to name them, three for each process; the one that has waited longest makes room. Our own
/// vsock carries no more at all.
const WAITING_MAX: usize = 1024;

/// How long one may wait: the request that it was made for has failed, or was never sent.
const WAITING_TIME_MAX: Duration = Duration::from_secs(60);

/// How long a request may be ahead of the connection that it names: both are on their way at the same time.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(10);

/// How much is moved at a time, in bytes.
const CHUNK_BYTES: usize = 64 * 1024;

/// Those that wait to be named.
#[derive(Default)]
pub(crate) struct Connections {
    // A look-up, never held across an await.
    waiting: Mutex<HashMap<u32, (Instant, Connection)>>,
    arrived: Notify,
}

/// The ports that a request names; 0 is none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ports {
    pub(crate) stdin: u32,
    pub(crate) stdout: u32,
    pub(crate) stderr: u32,
}

/// The connections that a request has named.
pub(crate) struct Named {
    stdin: Option<Connection>,
    stdout: Option<Connection>,
    stderr: Option<Connection>,
}

impl Connections {
    /// Takes in what comes, until nothing more can.
    pub(crate) async fn fill(self: Arc<Self>, mut incoming: Incoming) {
        while let Some((port, connection)) = incoming.next().await {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.retain(|_, (since, _)| since.elapsed() < WAITING_TIME_MAX);
            let oldest = waiting.iter().min_by_key(|(_, (since, _))| *since).map(|(port, _)| *port);
            if let Some(oldest) = oldest.filter(|_| waiting.len() >= WAITING_MAX) {
                waiting.remove(&oldest);
            }
            waiting.insert(port, (Instant::now(), connection));
            drop(waiting);
            self.arrived.notify_waiters();
        }
    }

    /// The connections of a request, taken first thing, so that they go with it where it fails; `None` where it names none, and its
    /// streams are read and written by calls.
    ///
    /// # Errors
    /// [`Error::State`] for one that does not come.
    pub(crate) async fn named(&self, ports: Ports) -> Result<Option<Named>> {
        if ports.stdin == 0 && ports.stdout == 0 && ports.stderr == 0 {
            return Ok(None);
        }
        let stdin = self.take(ports.stdin).await?;
        let (stdout, stderr) = (self.take(ports.stdout).await?, self.take(ports.stderr).await?);
        Ok(Some(Named { stdin, stdout, stderr }))
    }

    async fn take(&self, port: u32) -> Result<Option<Connection>> {
        if port == 0 {
            return Ok(None);
        }
        let arrival = async {
            loop {
                let arrived = self.arrived.notified();
                let found = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&port);
                match found {
                    Some((_, connection)) => return connection,
                    None => arrived.await,
                }
            }
        };
        let found = tokio::time::timeout(ARRIVAL_PATIENCE, arrival).await;
        found.map(Some).map_err(|_| Error::State(format!("no connection has come from port {port} of the host")))
    }
}

impl Named {
    /// Moves the streams of `process` from now on. One that has no connection is closed (input) or thrown away (output), and
    /// so is one that the gate keeps in the guest.
    pub(crate) async fn serve(self, container_id: &str, exec_id: &str, process: &Arc<Process>) {
        let write =
            WriteStreamRequest { container_id: container_id.into(), exec_id: exec_id.into(), ..Default::default() };
        let read =
            ReadStreamRequest { container_id: container_id.into(), exec_id: exec_id.into(), ..Default::default() };
        let stdin = self.stdin.filter(|_| gate::admit("WriteStdin", &write).is_ok());
        let stdout = self.stdout.filter(|_| gate::admit("ReadStdout", &read).is_ok());
        let stderr = self.stderr.filter(|_| gate::admit("ReadStderr", &read).is_ok());
        if let (Some(pipe), Some(connection)) = (process.stdin.lock().await.take(), stdin) {
            tokio::spawn(input(connection, pipe));
        }
        for (stream, connection) in
            [(process.stdout.lock().await.take(), stdout), (process.stderr.lock().await.take(), stderr)]
        {
            if let Some(pipe) = stream {
                tokio::spawn(output(pipe, connection));
            }
        }
    }
}

/// To the process, until the host has no more or the process reads no more.
async fn input(mut connection: Connection, pipe: Stream) {
    let mut buffer = Vec::with_capacity(CHUNK_BYTES);
    while connection.read_buf(&mut buffer).await.is_ok_and(|count| count > 0) {
        if pipe.write_all(&buffer).await.is_err() {
            break;
        }
        buffer.clear();
    }
}

/// To the host, until the process's end of the stream is closed or the host has gone.
async fn output(pipe: Stream, connection: Option<Connection>) {
    let mut buffer = Vec::with_capacity(CHUNK_BYTES);
    let Some(connection) = connection else {
        while pipe.read_into(&mut buffer).await.is_ok_and(|count| count > 0) {
            buffer.clear();
        }
        return;
    };
    let (mut from_host, mut to_host) = tokio::io::split(connection);
    let moved = async {
        while pipe.read_into(&mut buffer).await.is_ok_and(|count| count > 0) {
            if to_host.write_all(&buffer).await.is_err() {
                return;
            }
            buffer.clear();
        }
        // The end, which the host reads. It hangs up when it has taken everything; hanging up before it would reset a connection
        // on which bytes are still on their way.
        let _ = to_host.shutdown().await;
        std::future::pending::<()>().await;
    };
    let mut nothing = [0; 1];
    tokio::select! {
        () = moved => {}
        // The host says nothing here: what ends this read is its end.
        _ = from_host.read(&mut nothing) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_may_be_ahead_of_its_connection() {
        let connections = Arc::new(Connections::default());
        let (ours, theirs) = tokio::io::duplex(16);
        let incoming: Incoming = Box::pin(futures::stream::once(async move {
            tokio::task::yield_now().await;
            (7, Box::pin(theirs) as Connection)
        }));
        let ports = Ports { stdin: 0, stdout: 7, stderr: 0 };
        let fill = Arc::clone(&connections).fill(incoming);
        let (named, ()) = tokio::join!(connections.named(ports), fill);
        let named = named.unwrap().unwrap();
        assert!(named.stdout.is_some() && named.stdin.is_none() && named.stderr.is_none());
        assert!(connections.named(Ports { stdin: 0, stdout: 0, stderr: 0 }).await.unwrap().is_none());
        drop(ours);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_never_comes_is_an_error() {
        let ports = Ports { stdin: 0, stdout: 9, stderr: 0 };
        let error = Connections::default().named(ports).await.map(drop).unwrap_err();
        assert!(error.to_string().contains("port 9"), "{error}");
    }
}

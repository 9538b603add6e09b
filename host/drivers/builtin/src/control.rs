//! The control channel to the monitor's process.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use coracle_monitor_api::{Answer, Ended, Fault, LINE_BYTES_MAX, Message, Request};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

/// Why a request has no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The monitor refuses it.
    Refused(Fault),
    /// The channel is closed: the monitor has ended.
    Closed,
}

type Reply = oneshot::Sender<Result<Answer, Fault>>;
// Shared between the callers and the task that reads; held for one push or pop. `None` once the channel is closed.
type Waiting = Arc<Mutex<Option<VecDeque<Reply>>>>;

/// See the module.
#[derive(Debug)]
pub(crate) struct Client {
    // One request is written at a time, in the order in which the callers wait.
    writer: AsyncMutex<OwnedWriteHalf>,
    waiting: Waiting,
}

impl Client {
    /// A client, and the end that the monitor will tell of.
    pub(crate) fn new(stream: UnixStream) -> (Self, oneshot::Receiver<Ended>) {
        let (reader, writer) = stream.into_split();
        let waiting: Waiting = Arc::new(Mutex::new(Some(VecDeque::new())));
        let (sender, ended) = oneshot::channel();
        tokio::spawn(read_all(reader, Arc::clone(&waiting), sender));
        (Self { writer: AsyncMutex::new(writer), waiting }, ended)
    }

    /// Asks, and waits for the answer.
    pub(crate) async fn ask(&self, request: &Request) -> Result<Answer, Failure> {
        let mut line = serde_json::to_vec(request).map_err(|_| Failure::Closed)?;
        line.push(b'\n');
        let (sender, answer) = oneshot::channel();
        {
            let mut writer = self.writer.lock().await;
            match lock(&self.waiting).as_mut() {
                Some(waiting) => waiting.push_back(sender),
                None => return Err(Failure::Closed),
            }
            writer.write_all(&line).await.map_err(|_| Failure::Closed)?;
        }
        answer.await.map_err(|_| Failure::Closed)?.map_err(Failure::Refused)
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, Option<VecDeque<Reply>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands each answer to whoever waits longest, until the channel is closed or what comes is not the protocol: the monitor
/// may be in the guest's hands.
async fn read_all(reader: OwnedReadHalf, waiting: Waiting, ended: oneshot::Sender<Ended>) {
    let mut reader = BufReader::new(reader);
    let mut ended = Some(ended);
    loop {
        let mut line = Vec::new();
        let read = (&mut reader).take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).await;
        if !read.is_ok_and(|count| count > 0) {
            break;
        }
        match serde_json::from_slice(&line) {
            Ok(Message::Reply(answer)) => {
                let reply = lock(&waiting).as_mut().and_then(VecDeque::pop_front);
                // Whoever has asked may have gone; an answer that nobody has asked for is dropped.
                if let Some(reply) = reply {
                    let _ = reply.send(answer);
                }
            }
            Ok(Message::Ended(how)) => {
                if let Some(ended) = ended.take() {
                    let _ = ended.send(how);
                }
            }
            Err(_) => break,
        }
    }
    lock(&waiting).take();
}

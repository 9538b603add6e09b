//! The control channel to the monitor's process.

use std::collections::{BTreeSet, VecDeque};
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use coracle_monitor_api::{Answer, DESCRIPTORS_MAX, Ended, Fault, LINE_BYTES_MAX, Message, Request};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};

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
    /// The devices that the guest has let go of, by their number, until it is another device's.
    ejected: watch::Receiver<BTreeSet<u8>>,
    /// The memory that the guest uses, in bytes, as it was told last.
    memory: watch::Receiver<u64>,
    /// The processors that were left when the guest last let go of one.
    processors: watch::Receiver<u32>,
}

/// Where what the monitor tells by itself goes.
struct Told {
    ended: Option<oneshot::Sender<Ended>>,
    ejected: watch::Sender<BTreeSet<u8>>,
    memory: watch::Sender<u64>,
    processors: watch::Sender<u32>,
}

impl Client {
    /// A client, and the end that the monitor will tell of.
    pub(crate) fn new(stream: UnixStream) -> (Self, oneshot::Receiver<Ended>) {
        let (reader, writer) = stream.into_split();
        let waiting: Waiting = Arc::new(Mutex::new(Some(VecDeque::new())));
        let (sender, ended) = oneshot::channel();
        let (ejects, ejected) = watch::channel(BTreeSet::new());
        let (bytes, memory) = watch::channel(0);
        let (count, processors) = watch::channel(0);
        let told = Told { ended: Some(sender), ejected: ejects, memory: bytes, processors: count };
        tokio::spawn(read_all(reader, Arc::clone(&waiting), told));
        (Self { writer: AsyncMutex::new(writer), waiting, ejected, memory, processors }, ended)
    }

    /// Waits until the guest uses another amount of memory than `known`, in bytes; what it uses then.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn other_memory(&self, known: u64) -> Result<u64, Failure> {
        let mut memory = self.memory.clone();
        // What was told before is old.
        memory.mark_unchanged();
        self.ask(&Request::TellMemory { known }).await?;
        memory.changed().await.map_err(|_| Failure::Closed)?;
        Ok(*memory.borrow())
    }

    /// Asks the guest to let go of its last processor, and waits until it has; how many it has left.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn take_processor(&self) -> Result<u32, Failure> {
        let mut processors = self.processors.clone();
        processors.mark_unchanged();
        self.ask(&Request::TakeProcessor).await?;
        processors.changed().await.map_err(|_| Failure::Closed)?;
        Ok(*processors.borrow())
    }

    /// Whether the guest has let go of the device of this number.
    pub(crate) fn has_ejected(&self, number: u8) -> bool {
        self.ejected.borrow().contains(&number)
    }

    /// Waits until the guest has let go of the device of this number.
    ///
    /// # Errors
    /// [`Failure::Closed`].
    pub(crate) async fn ejected(&self, number: u8) -> Result<(), Failure> {
        let mut ejected = self.ejected.clone();
        ejected.wait_for(|numbers| numbers.contains(&number)).await.map(drop).map_err(|_| Failure::Closed)
    }

    /// Asks, and waits for the answer.
    pub(crate) async fn ask(&self, request: &Request) -> Result<Answer, Failure> {
        self.ask_with(request, &[]).await
    }

    /// The same with descriptors, which the request names by their place.
    pub(crate) async fn ask_with(&self, request: &Request, descriptors: &[OwnedFd]) -> Result<Answer, Failure> {
        let mut line = serde_json::to_vec(request).map_err(|_| Failure::Closed)?;
        line.push(b'\n');
        let (sender, answer) = oneshot::channel();
        {
            let mut writer = self.writer.lock().await;
            match lock(&self.waiting).as_mut() {
                Some(waiting) => waiting.push_back(sender),
                None => return Err(Failure::Closed),
            }
            let sent = send_first(writer.as_ref(), &line, descriptors).await.map_err(|_| Failure::Closed)?;
            writer.write_all(line.get(sent..).unwrap_or_default()).await.map_err(|_| Failure::Closed)?;
        }
        answer.await.map_err(|_| Failure::Closed)?.map_err(Failure::Refused)
    }
}

/// Sends what the channel takes of a message, and all its descriptors; how many bytes.
async fn send_first(stream: &UnixStream, line: &[u8], descriptors: &[OwnedFd]) -> std::io::Result<usize> {
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !borrowed.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        Ok(sendmsg(stream, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, Option<VecDeque<Reply>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands each answer to whoever waits longest, until the channel is closed or what comes is not the protocol: the monitor
/// may be in the guest's hands.
async fn read_all(reader: OwnedReadHalf, waiting: Waiting, mut told: Told) {
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        let read = (&mut reader).take(LINE_BYTES_MAX as u64).read_until(b'\n', &mut line).await;
        if !read.is_ok_and(|count| count > 0) {
            break;
        }
        match serde_json::from_slice(&line) {
            Ok(Message::Ejected(number)) => {
                told.ejected.send_modify(|numbers| {
                    numbers.insert(number);
                });
            }
            Ok(Message::Processors(count)) => drop(told.processors.send_replace(count)),
            Ok(Message::Memory(bytes)) => drop(told.memory.send_replace(bytes)),
            Ok(Message::Reply(answer)) => {
                if let Ok(Answer::Attached(number)) = answer {
                    told.ejected.send_modify(|numbers| {
                        numbers.remove(&number);
                    });
                }
                let reply = lock(&waiting).as_mut().and_then(VecDeque::pop_front);
                // Whoever has asked may have gone; an answer that nobody has asked for is dropped.
                if let Some(reply) = reply {
                    let _ = reply.send(answer);
                }
            }
            Ok(Message::Ended(how)) => {
                if let Some(ended) = told.ended.take() {
                    let _ = ended.send(how);
                }
            }
            Err(_) => break,
        }
    }
    lock(&waiting).take();
}

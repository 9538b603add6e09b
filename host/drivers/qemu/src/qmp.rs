//! A client for QEMU's machine protocol (QEMU: docs/interop/qmp-spec): one JSON object a line, commands answered by id,
//! events between them, descriptors beside a command by SCM_RIGHTS.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

/// The longest line that is read, in bytes.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// The most events that wait for whoever reads them.
const EVENTS_MAX: usize = 256;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The channel is closed: QEMU has ended.
    #[error("QEMU's control channel is closed")]
    Closed,
    /// What came is not the protocol.
    #[error("QEMU's control channel: {0}")]
    Protocol(String),
    /// QEMU refuses.
    #[error("QEMU refuses {command}: {text}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's words.
        text: String,
    },
    /// The socket failed.
    #[error("QEMU's control channel: {0}")]
    Socket(#[from] std::io::Error),
}

impl From<Error> for coracle_machine::Error {
    fn from(error: Error) -> Self {
        Self::Monitor(error.to_string())
    }
}

type Answer = Result<Value, String>;
// Shared between the callers and the task that reads; held for one insertion or removal.
type Waiting = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Answer>>>>>;

/// An event that QEMU reports.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name: "SHUTDOWN", "RESET", "DEVICE_DELETED".
    pub name: String,
    /// What comes with it.
    pub data: Value,
}

/// A control channel.
#[derive(Debug)]
pub struct Client {
    // One command is written at a time: its bytes stay together.
    stream: AsyncMutex<tokio::net::unix::OwnedWriteHalf>,
    waiting: Waiting,
    next_id: AtomicU64,
}

impl Client {
    /// Greets QEMU on `stream` and ends the negotiation. Events arrive at the receiver that comes back; it may be dropped.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn connect(stream: UnixStream) -> Result<(Self, mpsc::Receiver<Event>), Error> {
        let (reader, writer) = stream.into_split();
        let mut reader = BufReader::new(reader);
        let greeting = read_line(&mut reader).await?.ok_or(Error::Closed)?;
        if greeting.get("QMP").is_none() {
            return Err(Error::Protocol("no greeting".into()));
        }
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        tokio::spawn(read_all(reader, Arc::clone(&waiting), events));
        let client = Self { stream: AsyncMutex::new(writer), waiting, next_id: AtomicU64::new(1) };
        client.execute("qmp_capabilities", Value::Null).await?;
        Ok((client, receiver))
    }

    /// Runs a command; `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, Error> {
        self.run(command, arguments, None).await
    }

    /// Runs a command that takes a descriptor beside it (`getfd`, `add-fd`).
    ///
    /// # Errors
    /// [`Error`].
    pub async fn execute_with(&self, command: &str, arguments: Value, fd: BorrowedFd<'_>) -> Result<Value, Error> {
        self.run(command, arguments, Some(fd)).await
    }

    async fn run(&self, command: &str, arguments: Value, fd: Option<BorrowedFd<'_>>) -> Result<Value, Error> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "execute": command, "id": id });
        if let (Some(object), false) = (message.as_object_mut(), arguments.is_null()) {
            object.insert("arguments".into(), arguments);
        }
        let (sender, answer) = oneshot::channel();
        match lock(&self.waiting).as_mut() {
            Some(waiting) => waiting.insert(id, sender),
            None => return Err(Error::Closed),
        };
        self.write(format!("{message}\n").as_bytes(), fd).await?;
        match answer.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(text)) => Err(Error::Refused { command: command.to_owned(), text }),
            Err(_) => Err(Error::Closed),
        }
    }

    async fn write(&self, bytes: &[u8], mut fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let half = self.stream.lock().await;
        let stream: &UnixStream = half.as_ref();
        let mut rest = bytes;
        while !rest.is_empty() {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || send(stream, rest, fd));
            match sent {
                Ok(count) => {
                    // The descriptor goes with the first byte.
                    fd = None;
                    rest = rest.get(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn send(stream: &UnixStream, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> std::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<BorrowedFd<'_>> = fd.into_iter().collect();
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(std::io::Error::other("no room for a descriptor"));
    }
    let slices = [std::io::IoSlice::new(bytes)];
    Ok(sendmsg(stream, &slices, &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, Option<HashMap<u64, oneshot::Sender<Answer>>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn read_line(reader: &mut BufReader<OwnedReadHalf>) -> Result<Option<Value>, Error> {
    let mut line = Vec::new();
    let mut bounded = reader.take(LINE_BYTES_MAX);
    bounded.read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    if !line.ends_with(b"\n") {
        return Err(Error::Protocol("a line is too long or cut short".into()));
    }
    serde_json::from_slice(&line).map(Some).map_err(|error| Error::Protocol(error.to_string()))
}

/// Hands out answers and events until the channel ends; then nobody waits any more.
async fn read_all(mut reader: BufReader<OwnedReadHalf>, waiting: Waiting, events: mpsc::Sender<Event>) {
    loop {
        let line = match read_line(&mut reader).await {
            Ok(Some(line)) => line,
            Ok(None) => break,
            Err(error) => {
                log::warn!("{error}");
                break;
            }
        };
        if let Some(name) = line.get("event").and_then(Value::as_str) {
            let data = line.get("data").cloned().unwrap_or(Value::Null);
            // A guest can cause some events as often as it likes: what is too much is dropped.
            let _ = events.try_send(Event { name: name.to_owned(), data });
            continue;
        }
        let Some(id) = line.get("id").and_then(Value::as_u64) else { continue };
        let answer = match line.get("error") {
            Some(error) => Err(error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned()),
            None => Ok(line.get("return").cloned().unwrap_or(Value::Null)),
        };
        let sender = lock(&waiting).as_mut().and_then(|waiting| waiting.remove(&id));
        if let Some(sender) = sender {
            let _ = sender.send(answer);
        }
    }
    lock(&waiting).take();
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use tokio::io::AsyncWriteExt;

    use super::*;

    const GREETING: &[u8] = b"{\"QMP\":{\"version\":{}}}\n";

    async fn answer(server: &mut BufReader<UnixStream>, text: &str) -> Value {
        let mut line = String::new();
        server.read_line(&mut line).await.unwrap();
        let command: Value = serde_json::from_str(&line).unwrap();
        let reply = text.replace("ID", &command["id"].to_string());
        server.write_all(reply.as_bytes()).await.unwrap();
        command
    }

    #[tokio::test]
    async fn answers_events_and_refusals() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = async {
            let mut server = BufReader::new(theirs);
            server.write_all(GREETING).await.unwrap();
            answer(&mut server, "{\"return\":{},\"id\":ID}\n").await;
            answer(&mut server, "{\"event\":\"STOP\",\"data\":{\"a\":1}}\n{\"return\":7,\"id\":ID}\n").await;
            let refused = answer(&mut server, "{\"error\":{\"class\":\"x\",\"desc\":\"no\"},\"id\":ID}\n").await;
            assert_eq!(refused["arguments"]["b"], 2);
        };
        let client = async {
            let (client, mut events) = Client::connect(ours).await.unwrap();
            assert_eq!(client.execute("stop", Value::Null).await.unwrap(), 7);
            assert_eq!(events.recv().await.unwrap(), Event { name: "STOP".into(), data: json!({ "a": 1 }) });
            let error = client.execute("cont", json!({ "b": 2 })).await.unwrap_err();
            assert_eq!(error.to_string(), "QEMU refuses cont: no");
            client
        };
        let ((), client) = tokio::join!(server, client);
        // The server is gone: a command ends, and does not hang.
        assert!(matches!(client.execute("stop", Value::Null).await, Err(Error::Closed | Error::Socket(_))));
    }

    #[tokio::test]
    async fn a_descriptor_goes_with_a_command() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let server = async {
            let mut server = BufReader::new(theirs);
            server.write_all(GREETING).await.unwrap();
            answer(&mut server, "{\"return\":{},\"id\":ID}\n").await;
            let stream = server.into_inner();
            stream.readable().await.unwrap();
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut bytes = [0; 256];
            let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
            let flags = rustix::net::RecvFlags::empty();
            rustix::net::recvmsg(&stream, &mut slices, &mut control, flags).unwrap();
            let fds = control.drain().filter(|m| matches!(m, rustix::net::RecvAncillaryMessage::ScmRights(_))).count();
            assert_eq!(fds, 1);
        };
        let client = async {
            let (client, _) = Client::connect(ours).await.unwrap();
            let _ = client.execute_with("getfd", json!({ "fdname": "x" }), file.as_fd()).await;
        };
        tokio::join!(server, client);
    }

    #[tokio::test]
    async fn a_flood_of_events_keeps_no_answer_and_no_memory() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let flood = "{\"event\":\"RTC_CHANGE\",\"data\":{\"offset\":1}}\n".repeat(20_000);
        let server = async {
            let mut server = BufReader::new(theirs);
            server.write_all(GREETING).await.unwrap();
            answer(&mut server, "{\"return\":{},\"id\":ID}\n").await;
            server.write_all(flood.as_bytes()).await.unwrap();
            answer(&mut server, "{\"return\":7,\"id\":ID}\n").await;
        };
        let client = async {
            // Nobody takes an event meanwhile.
            let (client, mut events) = Client::connect(ours).await.unwrap();
            assert_eq!(client.execute("stop", Value::Null).await.unwrap(), 7);
            let kept = std::iter::from_fn(|| events.try_recv().ok()).count();
            assert!((1..=EVENTS_MAX).contains(&kept), "{kept}");
        };
        tokio::join!(server, client);
    }

    #[tokio::test]
    async fn rubbish_ends_the_channel() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"hello\n").await.unwrap();
        assert!(matches!(Client::connect(ours).await, Err(Error::Protocol(_))));
    }
}

//! Sending spans to a collector. It is no part of what a pod needs: where it is away or slow, spans are lost and counted, and nobody waits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_protocol::spans::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::otlp::{self, Done};

/// How many spans wait at most.
const WAITING_MAX: usize = 2048;

/// How many go with one request.
const BATCH_MAX: usize = 512;

/// How long a collector may take over a request, and over the last one when the pod has ended.
const PATIENCE: Duration = Duration::from_secs(5);
const GOODBYE: Duration = Duration::from_secs(1);

/// How much of an answer is read.
const ANSWER_BYTES: u64 = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Exporter {
    spans: mpsc::Sender<Work>,
    lost: Arc<AtomicU64>,
    /// Above what comes without a context of containerd's.
    root: Context,
}

#[derive(Debug)]
enum Work {
    Span(Done),
    /// Answers when all before it were sent or lost.
    Flush(oneshot::Sender<()>),
}

impl Exporter {
    /// Starts to send to the collector at this address, spans of a pod of these attributes.
    pub(super) fn start(address: SocketAddr, path: String, pod: [(&'static str, &str); 2]) -> Self {
        let (spans, waiting) = mpsc::channel(WAITING_MAX);
        let lost = Arc::new(AtomicU64::new(0));
        let pod = pod.map(|(key, value)| (key, value.to_owned())).to_vec();
        tokio::spawn(run(waiting, Collector { address, path, pod }, Arc::clone(&lost)));
        Self { spans, lost, root: Context::new() }
    }

    pub(super) fn root(&self) -> Context {
        self.root
    }

    pub(super) fn send(&self, span: Done) {
        if self.spans.try_send(Work::Span(span)).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits until what there is was sent, but not for long.
    pub(super) async fn flush(&self) {
        let (sender, sent) = oneshot::channel();
        let flush = async {
            if self.spans.send(Work::Flush(sender)).await.is_ok() {
                let _ = sent.await;
            }
        };
        let _ = tokio::time::timeout(GOODBYE, flush).await;
    }
}

struct Collector {
    address: SocketAddr,
    path: String,
    pod: Vec<(&'static str, String)>,
}

async fn run(mut waiting: mpsc::Receiver<Work>, collector: Collector, lost: Arc<AtomicU64>) {
    let mut work = Vec::new();
    let mut was_away = false;
    while waiting.recv_many(&mut work, BATCH_MAX).await > 0 {
        let mut flushes = Vec::new();
        let mut spans = Vec::new();
        for one in work.drain(..) {
            match one {
                Work::Span(span) => spans.push(span),
                Work::Flush(done) => flushes.push(done),
            }
        }
        if !spans.is_empty() {
            let sent = tokio::time::timeout(PATIENCE, collector.post(&otlp::request(&spans, &collector.pod))).await;
            let failed = match sent {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(_) => Some(format!("no answer within {} s", PATIENCE.as_secs())),
            };
            if let Some(error) = &failed {
                lost.fetch_add(spans.len() as u64, Ordering::Relaxed);
                // Once, until it is there again.
                if !was_away {
                    log::warn!("the collector at {} does not take spans, which are lost: {error}", collector.address);
                }
            }
            was_away = failed.is_some();
        }
        for done in flushes {
            let _ = done.send(());
        }
    }
}

impl Collector {
    /// Posts a body, and reads whether it was taken. One request by connection: a pod has few of them.
    async fn post(&self, body: &str) -> std::io::Result<()> {
        let mut stream = TcpStream::connect(self.address).await?;
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            self.path,
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(body.as_bytes()).await?;
        // `HTTP/1.1 200`: the rest says nothing that would change anything, but a server that writes it to somebody who has gone complains.
        let mut status = [0; 12];
        stream.read_exact(&mut status).await?;
        let (mut rest, mut nowhere) = (stream.take(ANSWER_BYTES), tokio::io::sink());
        let _ = tokio::time::timeout(GOODBYE, tokio::io::copy(&mut rest, &mut nowhere)).await;
        if status.starts_with(b"HTTP/1.") && status.get(9) == Some(&b'2') {
            return Ok(());
        }
        Err(std::io::Error::other(format!("it answers {:?}", String::from_utf8_lossy(&status))))
    }
}

//! The caller's streams and signals, joined to a process in a container.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FileType, Mode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::task::{Streams, Task};
use crate::terminal::{self, Raw};

/// Signals that are passed on to the process.
const FORWARDED: [i32; 6] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// How long outputs may still come after the process's end: another process may hold them open.
const OUTPUT_PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

/// Pipes of one process, in the container's folder.
pub(crate) struct Attachment {
    streams: Streams,
    stdout: pipe::Receiver,
    stderr: Option<pipe::Receiver>,
    stdin: Option<pipe::Sender>,
    files: Vec<PathBuf>,
}

impl Attachment {
    /// Makes the pipes `NAME.in`, `NAME.out` and `NAME.err` in `folder`, and opens this side of them.
    pub(crate) fn new(folder: &Path, name: &str, interactive: bool, terminal: bool) -> Result<Self> {
        let mut files = Vec::new();
        let mut make = |end: &str| {
            let path = folder.join(format!("{name}.{end}"));
            rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)
                .with_context(|| format!("make the pipe {}", path.display()))?;
            files.push(path.clone());
            Ok::<_, anyhow::Error>(path)
        };
        let open_receiver = |path: &Path| {
            pipe::OpenOptions::new().open_receiver(path).with_context(|| format!("open {}", path.display()))
        };
        let out = make("out")?;
        let stdout = open_receiver(&out)?;
        let text = |path: &Path| path.display().to_string();
        let mut streams = Streams { stdout: text(&out), terminal, ..Default::default() };
        let mut stderr = None;
        if !terminal {
            let err = make("err")?;
            stderr = Some(open_receiver(&err)?);
            streams.stderr = text(&err);
        }
        let mut stdin = None;
        if interactive {
            let path = make("in")?;
            streams.stdin = text(&path);
            // Both ways, so that the open does not wait for the shim.
            let file = std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
            stdin = Some(pipe::Sender::from_file(file)?);
        }
        Ok(Self { streams, stdout, stderr, stdin, files })
    }

    pub(crate) fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Starts the process, moves its streams and passes signals on, until it has ended. Gives its exit code.
    pub(crate) async fn run(mut self, task: &Task, exec_id: &str) -> Result<u32> {
        let _raw = if self.streams.terminal { Some(Raw::enter()?) } else { None };
        let mut signals = Signals::new()?;
        if self.streams.terminal {
            resize(task, exec_id).await;
        }
        let outputs = self.outputs();
        tokio::pin!(outputs);
        // Before the start: nothing of the process's end may be missed.
        let waiting = {
            let (task, exec_id) = (task.clone(), exec_id.to_owned());
            tokio::spawn(async move { task.wait(&exec_id).await })
        };
        let started = task.start(exec_id);
        tokio::pin!(started);
        let mut outputs_done = false;
        loop {
            tokio::select! {
                started = &mut started => break started?,
                () = &mut outputs, if !outputs_done => outputs_done = true,
                number = signals.next() => { let _ = task.kill(exec_id, number).await; }
            }
        }
        if self.streams.terminal {
            // Once more, for a terminal that only the start has made.
            resize(task, exec_id).await;
        }
        let input = self.stdin.take().map(|stdin| tokio::spawn(copy_input(stdin, task.clone(), exec_id.to_owned())));
        let ended = async { waiting.await.map_err(anyhow::Error::from)? };
        tokio::pin!(ended);
        let code = loop {
            tokio::select! {
                code = &mut ended => break code,
                () = &mut outputs, if !outputs_done => outputs_done = true,
                number = signals.next() => {
                    if number == libc::SIGWINCH.unsigned_abs() {
                        resize(task, exec_id).await;
                    } else {
                        // A process that has ended meanwhile needs no signal.
                        let _ = task.kill(exec_id, number).await;
                    }
                }
            }
        };
        if let Some(input) = input {
            input.abort();
        }
        if !outputs_done {
            let _ = tokio::time::timeout(OUTPUT_PATIENCE, &mut outputs).await;
        }
        code
    }

    /// The future that moves both outputs to their ends.
    fn outputs(&mut self) -> impl Future<Output = ()> + use<> {
        let stdout = std::mem::replace(&mut self.stdout, empty_pipe());
        let stderr = self.stderr.take();
        async move {
            let stderr = async {
                if let Some(stderr) = stderr {
                    copy_output(stderr, tokio::io::stderr()).await;
                }
            };
            tokio::join!(copy_output(stdout, tokio::io::stdout()), stderr);
        }
    }
}

/// A pipe that has ended, to stand in for one that was given away.
fn empty_pipe() -> pipe::Receiver {
    let made = pipe::pipe();
    #[expect(clippy::expect_used, reason = "two descriptors are missing at most, and then nothing works")]
    made.expect("a pipe").1
}

impl Drop for Attachment {
    fn drop(&mut self) {
        for file in &self.files {
            let _ = std::fs::remove_file(file);
        }
    }
}

async fn copy_output(mut from: pipe::Receiver, mut to: impl tokio::io::AsyncWrite + Unpin) {
    let mut buffer = vec![0; 64 * 1024];
    // The first read waits for the shim to open its end, and then for data or the end.
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if to.write_all(&buffer[..count]).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

/// Copies standard input into the container; its end is the process's end of input.
async fn copy_input(mut to: pipe::Sender, task: Task, exec_id: String) {
    let (sender, mut chunks) = tokio::sync::mpsc::channel::<Vec<u8>>(4);
    // A read of standard input can't be given up, so it has a thread that nobody waits for.
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin();
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = std::io::Read::read(&mut stdin, &mut buffer) {
            if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    while let Some(chunk) = chunks.recv().await {
        if to.write_all(&chunk).await.is_err() {
            return;
        }
    }
    drop(to);
    // A process that has ended has closed it already.
    let _ = task.close_input(&exec_id).await;
}

async fn resize(task: &Task, exec_id: &str) {
    if let Some((columns, rows)) = terminal::size() {
        // A process that is not started, or has ended, has no size.
        let _ = task.resize(exec_id, columns, rows).await;
    }
}

/// Signals of this process.
pub(crate) struct Signals(Vec<(i32, Signal)>);

impl Signals {
    pub(crate) fn new() -> Result<Self> {
        let all = FORWARDED.into_iter().chain([libc::SIGWINCH]);
        let watched =
            all.map(|number| Ok((number, signal(SignalKind::from_raw(number))?))).collect::<std::io::Result<_>>();
        watched.map(Self).context("watch for signals")
    }

    pub(crate) async fn next(&mut self) -> u32 {
        std::future::poll_fn(|context| {
            for (number, signal) in &mut self.0 {
                if signal.poll_recv(context).is_ready() {
                    return std::task::Poll::Ready(number.unsigned_abs());
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}

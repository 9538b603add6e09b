//! The agent inside a guest: vsock, the greeting, the end.

use std::sync::{Arc, OnceLock};

use coracle_protocol::ttrpc::asynchronous::transport::Listener;
use coracle_protocol::{hello, ports};
use rustix::process::{Resource, Rlimit};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::from_host::{FromHost, end_all, is_lost};
use crate::{Config, Connection, Error, Result, debug_console};

/// How many descriptors the agent may have: each process takes some for its streams. Containers' processes get their own limit.
const DESCRIPTORS_MAX: u64 = 524_288;

/// When the agent began to serve, by the processor's time stamp counter. Set once.
static READY_TSC: OnceLock<u64> = OnceLock::new();

/// See [`READY_TSC`].
pub(crate) fn ready_tsc() -> Option<u64> {
    READY_TSC.get().copied()
}

#[cfg(target_arch = "x86_64")]
fn tsc() -> u64 {
    // SAFETY: the instruction is there on every x86-64 processor and touches no memory.
    #[expect(unsafe_code, reason = "an intrinsic")]
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc() -> u64 {
    0
}

/// Runs the agent until the host has gone. The exit code is 0 then, and 1 for a failure, which is printed.
#[must_use]
pub fn run() -> i32 {
    // Where that is refused there is room for fewer processes at a time.
    let limit = Rlimit { current: Some(DESCRIPTORS_MAX), maximum: Some(DESCRIPTORS_MAX) };
    let _ = rustix::process::setrlimit(Resource::Nofile, limit);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(std::time::Duration::from_millis(100))
        .build();
    let outcome = runtime.map_err(Error::system("start the event loop")).and_then(|runtime| runtime.block_on(serve()));
    match outcome {
        Ok(()) => {
            println!("coracle-agent: the host has hung up");
            0
        }
        Err(error) => {
            println!("coracle-agent: {error}");
            1
        }
    }
}

/// How long to leave a listener alone that can't accept.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// The next connection of the host's, and the port it comes from. Nobody else may come in: the guest's own processes could.
async fn accept(listener: &VsockListener) -> std::io::Result<(FromHost, u32)> {
    loop {
        let (stream, peer) = listener.accept().await?;
        if peer.cid() == VMADDR_CID_HOST {
            return Ok((FromHost::new(stream), peer.port()));
        }
    }
}

/// Serves each connection of the host's, `most` at one time, until the task ends; further ones wait.
pub(crate) async fn serve_each<F>(listener: VsockListener, most: usize, serve: impl Fn(FromHost) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(most));
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let (stream, _) = accepted(&listener).await;
        let served = serve(stream);
        tokio::spawn(async move {
            served.await;
            drop(place);
        });
    }
}

/// Connects to the host, however long a busy one takes: the kernel gives a connection up after two seconds.
async fn dial(address: VsockAddr) -> std::io::Result<VsockStream> {
    loop {
        match VsockStream::connect(address).await {
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
            outcome => return outcome,
        }
    }
}

/// The next connection. Where there is none to be had, out of descriptors, say, others have to go first, and nothing tells when: a server
/// that is told each time would ask again at once.
async fn accepted(listener: &VsockListener) -> (FromHost, u32) {
    loop {
        match accept(listener).await {
            Ok(accepted) => return accepted,
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
        }
    }
}

async fn serve() -> Result<()> {
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, ports::AGENT))
        .map_err(Error::system("listen on the agent's vsock port"))?;
    let from_host = futures::stream::unfold(listener, |listener| async move {
        let (stream, _) = accepted(&listener).await;
        Some((Ok(stream), listener))
    });
    let streams = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, ports::STREAMS))
        .map_err(Error::system("listen for the streams of processes"))?;
    let streams = futures::stream::unfold(streams, |listener| async move {
        let (stream, port) = accepted(&listener).await;
        Some(((port, Box::pin(stream) as Connection), listener))
    });
    let forwarded = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, ports::FORWARD))
        .map_err(Error::system("listen for forwarded ports"))?;
    let _server = crate::serve(Config::guest(), Listener::new(from_host), Box::pin(streams)).await?;
    tokio::spawn(crate::forward::serve(forwarded));
    if debug_console::is_enabled() {
        let console = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, ports::DEBUG))
            .map_err(Error::system("listen for the debug console"))?;
        tokio::spawn(debug_console::serve(console));
    }
    let _ = READY_TSC.set(tsc());
    let own = vsock::get_local_cid().map_err(Error::system("learn the guest's vsock address"))?;
    loop {
        let address = VsockAddr::new(VMADDR_CID_HOST, ports::hello(own));
        let mut host = dial(address).await.map_err(Error::system("dial the host"))?;
        host.write_all(hello::line().as_bytes()).await.map_err(Error::system("greet the host"))?;
        // The host says nothing on this connection: whatever happens to it ends the machine. But where it was lost with all others, the
        // machine goes on where it was saved, and another host is there to be greeted.
        if !is_lost(&host).await.map_err(Error::system("hear the host"))? {
            return Ok(());
        }
        end_all();
        crate::renewal::renew()?;
    }
}

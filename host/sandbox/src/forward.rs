//! Port-forward: what dials the loopback of the pod's namespace on the host is answered by the guest's loopback.

use std::net::SocketAddr;
use std::sync::Arc;

use coracle_machine::AgentAddress;
use coracle_network::Namespace;
use coracle_protocol::{forward, ports};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::{Error, Result};

/// The most connections of a pod at one time; further ones wait.
const CONNECTIONS_MAX: usize = 256;

/// How long to leave a listener alone that can't accept.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// The relay of a pod. It ends when this is dropped.
pub(crate) struct Forward(tokio::task::JoinHandle<()>);

impl Drop for Forward {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Forward {
    /// Listens on every port of the namespace's loopback, for the guest at `address`.
    pub(crate) async fn start(namespace: &Namespace, address: AgentAddress) -> Result<Self> {
        let steered = namespace.steer_loopback().await?;
        let failed = |error: std::io::Error| Error::Failed(format!("listen for forwarded ports: {error}"));
        let listener = steered.listener.try_clone().map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        Ok(Self(tokio::spawn(async move {
            // Steering ends with the task.
            let _steered = steered;
            relay_all(&listener, address).await;
        })))
    }
}

async fn relay_all(listener: &TcpListener, address: AgentAddress) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // What runs ends with this.
    let mut relays = tokio::task::JoinSet::new();
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, say: others have to go first, and nothing tells when.
                log::warn!("a forwarded connection can't be taken: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        while relays.try_join_next().is_some() {}
        let address = address.clone();
        relays.spawn(async move {
            let _place = place;
            if let Err(error) = relay(stream, &address).await {
                log::debug!("a forwarded connection: {error}");
            }
        });
    }
}

async fn relay(mut stream: TcpStream, address: &AgentAddress) -> Result<()> {
    let failed = |error: std::io::Error| Error::Failed(error.to_string());
    let own: SocketAddr = stream.local_addr().map_err(failed)?;
    if !own.ip().to_canonical().is_loopback() {
        return Err(Error::Failed(format!("{own} is not loopback")));
    }
    let mut guest = address.connect(ports::FORWARD).await?;
    guest.write_all(&forward::request(own.port())).await.map_err(failed)?;
    let answer = guest.read_u8().await.map_err(failed)?;
    if answer != forward::CONNECTED {
        return Err(Error::Failed(format!("nobody listens on port {} in the guest", own.port())));
    }
    tokio::io::copy_bidirectional(&mut stream, &mut guest).await.map_err(failed)?;
    Ok(())
}

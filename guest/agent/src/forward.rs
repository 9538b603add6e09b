//! Forwarded ports: connections of the host's to the guest's own loopback.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use coracle_protocol::forward;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_vsock::VsockListener;

use crate::from_host::FromHost;
use crate::gate;
use crate::guest::serve_each;

/// The most connections at one time; further ones wait.
const CONNECTIONS_MAX: usize = 256;

/// The name by which the gate knows these connections.
const METHOD: &str = "ForwardPort";

/// Takes connections until the task ends.
pub(crate) async fn serve(listener: VsockListener) {
    serve_each(listener, CONNECTIONS_MAX, relay).await;
}

async fn relay(mut host: FromHost) {
    let mut request = [0; 2];
    if host.read_exact(&mut request).await.is_err() {
        return;
    }
    let port = forward::port(request);
    let stream = match gate::admit_port(METHOD, port) {
        Ok(()) => connect(port).await,
        Err(_) => None,
    };
    let Some(mut stream) = stream else {
        // A host that has hung up needs no answer.
        let _ = host.write_u8(forward::REFUSED).await;
        return;
    };
    if host.write_u8(forward::CONNECTED).await.is_ok() {
        let _ = tokio::io::copy_bidirectional(&mut host, &mut stream).await;
    }
}

/// Somebody who listens on loopback, by either version of IP.
async fn connect(port: u16) -> Option<TcpStream> {
    for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))] {
        if let Ok(stream) = TcpStream::connect(address).await {
            return Some(stream);
        }
    }
    None
}

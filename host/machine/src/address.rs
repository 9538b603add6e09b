//! How the host reaches a port of the guest, and hears from it.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::{Error, Result};

/// A connection with the guest.
pub type GuestStream = Pin<Box<dyn GuestIo>>;

/// What a [`GuestStream`] can do.
pub trait GuestIo: AsyncRead + AsyncWrite + Send + Sync {}
impl<T: AsyncRead + AsyncWrite + Send + Sync> GuestIo for T {}

/// The longest answer to `CONNECT`, in bytes.
const ANSWER_BYTES_MAX: u64 = 64;

/// Where the guest's ports are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAddress {
    /// A Unix socket that takes `CONNECT <port>\n`. What the guest dials arrives at the socket of the same name followed
    /// by `_` and the port.
    Hybrid(PathBuf),
    /// The host kernel's vsock.
    Vsock {
        /// The guest's context identifier.
        cid: u32,
    },
    /// Folder with one Unix socket a port, named by its number: a guest that is no virtual machine.
    Sockets(PathBuf),
}

impl AgentAddress {
    /// Connects to `port` in the guest.
    ///
    /// # Errors
    /// [`Error::System`] where nobody listens there.
    pub async fn connect(&self, port: u32) -> Result<GuestStream> {
        Ok(self.connect_from(port).await?.0)
    }

    /// Connects to `port` in the guest. With the stream comes the port on the host that the guest sees it come from.
    ///
    /// # Errors
    /// [`Error::System`] where nobody listens there.
    pub async fn connect_from(&self, port: u32) -> Result<(GuestStream, u32)> {
        let step = || Error::system(format!("connect to port {port} of the guest"));
        match self {
            Self::Hybrid(path) => {
                let stream = UnixStream::connect(path).await.map_err(step())?;
                hybrid_handshake(stream, port).await.map_err(step())
            }
            Self::Vsock { cid } => {
                let stream = VsockStream::connect(VsockAddr::new(*cid, port)).await.map_err(step())?;
                let own = stream.local_addr().map_err(step())?.port();
                Ok((Box::pin(stream), own))
            }
            Self::Sockets(folder) => {
                let (stream, own) = connect_numbered(folder, port).map_err(step())?;
                Ok((Box::pin(stream), own))
            }
        }
    }

    /// As Kata writes it: `hvsock://PATH`, `vsock://CID`. None of [`Self::Sockets`], which Kata has not.
    #[must_use]
    pub fn url(&self) -> Option<String> {
        match self {
            Self::Hybrid(path) => Some(format!("hvsock://{}", path.display())),
            Self::Vsock { cid } => Some(format!("vsock://{cid}")),
            Self::Sockets(_) => None,
        }
    }

    /// The address that [`Self::url`] has written so.
    #[must_use]
    pub fn of_url(url: &str) -> Option<Self> {
        match url.split_once("://")? {
            ("hvsock", path) => Some(Self::Hybrid(path.into())),
            ("vsock", cid) => Some(Self::Vsock { cid: cid.parse().ok()? }),
            _ => None,
        }
    }

    /// The number by which a guest of [`Self::Sockets`] knows who has connected to it: the port that
    /// [`Self::connect_from`] gives.
    #[must_use]
    pub fn port_of(peer: &Path) -> Option<u32> {
        peer.file_name()?.to_str()?.strip_prefix(NUMBERED)?.parse().ok()
    }

    /// Listens for what this guest dials on the host's `port`. It must be called before the machine starts.
    ///
    /// # Errors
    /// [`Error::System`].
    pub fn listen(&self, port: u32) -> Result<GuestListener> {
        let step = || Error::system(format!("listen for the guest on port {port}"));
        let listener = match self {
            Self::Hybrid(path) => {
                let mut name = path.as_os_str().to_owned();
                name.push(format!("_{port}"));
                Kind::Unix(UnixListener::bind(Path::new(&name)).map_err(step())?)
            }
            Self::Vsock { cid } => {
                Kind::Vsock(VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map_err(step())?, *cid)
            }
            Self::Sockets(folder) => {
                Kind::Unix(UnixListener::bind(folder.join(format!("host_{port}"))).map_err(step())?)
            }
        };
        Ok(GuestListener(listener))
    }
}

/// What the names of the host's sockets in the folder of [`AgentAddress::Sockets`] begin with; their number follows.
const NUMBERED: &str = "from_";

/// Connects from a socket with a number for a name, which is gone again when this returns: the peer has seen it.
fn connect_numbered(folder: &Path, port: u32) -> std::io::Result<(UnixStream, u32)> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with};
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let own = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = folder.join(format!("{NUMBERED}{own}"));
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddrUnix::new(&name)?)?;
    let connected = connect(&socket, &SocketAddrUnix::new(folder.join(port.to_string()))?);
    std::fs::remove_file(&name)?;
    connected?;
    let stream = std::os::unix::net::UnixStream::from(socket);
    stream.set_nonblocking(true)?;
    Ok((UnixStream::from_std(stream)?, own))
}

async fn hybrid_handshake(mut stream: UnixStream, port: u32) -> std::io::Result<(GuestStream, u32)> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    // One byte at a time past the line would be the guest's own data, so the buffer must not read ahead.
    let mut answer = Vec::new();
    let mut reader = BufReader::with_capacity(1, &mut stream).take(ANSWER_BYTES_MAX);
    reader.read_until(b'\n', &mut answer).await?;
    let own = answer.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n"));
    let own = own.and_then(|digits| std::str::from_utf8(digits).ok()?.trim().parse().ok());
    match own {
        Some(own) => Ok((Box::pin(stream), own)),
        None => Err(std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "the guest does not listen")),
    }
}

/// Accepts what one guest dials.
#[derive(Debug)]
pub struct GuestListener(Kind);

#[derive(Debug)]
enum Kind {
    Unix(UnixListener),
    Vsock(VsockListener, u32),
}

impl GuestListener {
    /// The next connection of this guest.
    ///
    /// # Errors
    /// [`Error::System`].
    pub async fn accept(&self) -> Result<GuestStream> {
        let step = || Error::system("accept a connection of the guest");
        match &self.0 {
            Kind::Unix(listener) => Ok(Box::pin(listener.accept().await.map_err(step())?.0)),
            Kind::Vsock(listener, cid) => loop {
                let (stream, peer) = listener.accept().await.map_err(step())?;
                // All guests of a host share its ports: another one's connection is closed unheard.
                if peer.cid() == *cid {
                    return Ok(Box::pin(stream));
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written() {
        for address in [AgentAddress::Hybrid("/run/p/vsock.sock".into()), AgentAddress::Vsock { cid: 7 }] {
            assert_eq!(AgentAddress::of_url(&address.url().unwrap()), Some(address));
        }
        for wrong in ["", "vsock://x", "tcp://7", "/run/p"] {
            assert_eq!(AgentAddress::of_url(wrong), None, "{wrong}");
        }
    }

    #[tokio::test]
    async fn a_refused_connect_is_an_error_and_data_is_not_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let address = AgentAddress::Hybrid(path);
        let server = async {
            let (mut first, _) = listener.accept().await.unwrap();
            let mut line = [0; 13];
            first.read_exact(&mut line).await.unwrap();
            assert_eq!(&line, b"CONNECT 1024\n");
            first.write_all(b"OK 5\ndata").await.unwrap();
            drop(listener.accept().await.unwrap());
            first
        };
        let client = async {
            let (mut stream, own) = address.connect_from(1024).await.unwrap();
            assert_eq!(own, 5);
            let mut data = [0; 4];
            stream.read_exact(&mut data).await.unwrap();
            assert_eq!(&data, b"data");
            assert!(address.connect(9).await.is_err());
        };
        tokio::join!(server, client);
    }
}

//! TCP between two ends, by the clock; and a socket that has a path.

use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

/// What a connection is for, as its first byte says.
const STREAM: u8 = b's';
const PINGS: u8 = b'p';

/// The size of one read or write, in bytes.
const PIECE: usize = 256 << 10;

/// Serves so many connections, one after another.
pub(crate) fn serve(port: u32, count: usize) -> Result<String> {
    let port = u16::try_from(port).map_err(Error::other)?;
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))?;
    println!("serves");
    let mut piece = vec![0; PIECE];
    for _ in 0..count {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut kind = [0];
        stream.read_exact(&mut kind)?;
        let [STREAM | PINGS] = kind else { return Err(Error::other("a connection for nothing")) };
        let mut bytes = 0_u64;
        loop {
            let read = stream.read(&mut piece)?;
            if read == 0 {
                break;
            }
            bytes += read as u64;
            if kind == [PINGS] {
                stream.write_all(piece.get(..read).unwrap_or_default())?;
            }
        }
        if kind == [STREAM] {
            stream.write_all(&bytes.to_le_bytes())?;
        }
    }
    Ok("served".into())
}

fn connect(address: &str, kind: u8) -> Result<TcpStream> {
    let address: SocketAddr = address.parse().map_err(Error::other)?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(20))?;
    stream.set_nodelay(true)?;
    stream.write_all(&[kind])?;
    Ok(stream)
}

/// Sends so many bytes, and waits until the other end has read them.
pub(crate) fn stream(address: &str, bytes: usize) -> Result<String> {
    let mut stream = connect(address, STREAM)?;
    let piece = vec![7; PIECE];
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let now = left.min(PIECE);
        stream.write_all(piece.get(..now).unwrap_or_default())?;
        left -= now;
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut read = [0; 8];
    stream.read_exact(&mut read)?;
    let taken = start.elapsed().as_micros();
    if u64::from_le_bytes(read) == bytes as u64 { Ok(taken.to_string()) } else { Err(Error::other("bytes were lost")) }
}

/// Sends a byte and waits for it to come back, so many times.
pub(crate) fn pings(address: &str, count: usize) -> Result<String> {
    let mut stream = connect(address, PINGS)?;
    let start = Instant::now();
    for _ in 0..count {
        stream.write_all(&[1])?;
        stream.read_exact(&mut [0])?;
    }
    Ok(start.elapsed().as_micros().to_string())
}

/// Answers one line at the socket `path`.
pub(crate) fn serve_unix(path: &str) -> Result<String> {
    let listener = UnixListener::bind(path)?;
    println!("serves");
    let (mut stream, _) = listener.accept()?;
    let mut line = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut line)?;
    stream.write_all(format!("heard {line}").as_bytes())?;
    Ok("served".into())
}

/// Sends a line to the socket `path`; the answer.
pub(crate) fn ask_unix(path: &str) -> Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.write_all(b"a word\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

//! One connection between a guest port and a Unix stream of the host, with its credit (virtio 1.3, section 5.10.6.3).

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use super::packet::{Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What this side buffers for a connection, in bytes: the guest may have so much on the way.
pub const BUFFER_BYTES: u32 = 256 * 1024;

/// The longest `CONNECT` line, in bytes.
const LINE_BYTES_MAX: usize = 32;

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// A host program has connected and has not said where to.
    Naming,
    /// The guest was asked and has not answered.
    Connecting,
    /// Both sides agree.
    Established,
}

/// Why a connection ends.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken;

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    pub(crate) state: State,
    /// The line that a host program writes before anything else.
    line: Vec<u8>,
    /// Bytes from the guest that the stream has not taken yet.
    backlog: VecDeque<u8>,
    /// Bytes that the stream has taken.
    forwarded: u32,
    /// The value of `forwarded` that the guest was told last.
    announced: u32,
    /// Bytes sent to the guest.
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    /// The stream may have something to read.
    pub(crate) readable: bool,
    /// The host's program will write no more.
    pub(crate) host_done: bool,
    /// The guest was told so.
    pub(crate) told: bool,
    /// The guest will send no more; the stream is told once the backlog is written.
    guest_done: bool,
    /// The stream was told so. Once: a shutdown wakes whoever watches the stream, this muxer among them.
    shut: bool,
    /// The guest will receive no more.
    pub(crate) guest_deaf: bool,
    /// The guest has asked for, or needs, a credit update.
    pub(crate) owes_credit: bool,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, state: State) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            state,
            line: Vec::new(),
            backlog: VecDeque::new(),
            forwarded: 0,
            announced: 0,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            readable: false,
            host_done: false,
            told: false,
            guest_done: false,
            shut: false,
            guest_deaf: false,
            owes_credit: false,
        })
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Notes what the guest says of its buffer, which every packet carries.
    pub(crate) fn note_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// Bytes that the guest can take now.
    pub(crate) fn credit(&self) -> usize {
        let on_the_way = self.sent.wrapping_sub(self.peer_forwarded);
        // A guest that lies about its count gets nothing.
        self.peer_buffer.saturating_sub(on_the_way) as usize
    }

    /// The two fields of a header that tell the guest of this side's buffer.
    pub(crate) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        self.owes_credit = false;
        (BUFFER_BYTES, self.forwarded)
    }

    /// Reads the `CONNECT <port>` line, as far as it is there. The port once it is whole.
    pub(crate) fn read_line(&mut self) -> Result<Option<u32>, Broken> {
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(Broken),
                Ok(_) if byte == *b"\n" => break,
                Ok(_) if self.line.len() >= LINE_BYTES_MAX => return Err(Broken),
                Ok(_) => self.line.extend(byte),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Broken),
            }
        }
        let line = std::str::from_utf8(&self.line).map_err(|_| Broken)?;
        line.strip_prefix("CONNECT ").and_then(|port| port.parse().ok()).map(Some).ok_or(Broken)
    }

    /// Answers a host program whose connection the guest has accepted.
    pub(crate) fn accept(&mut self, local_port: u32) -> Result<(), Broken> {
        self.state = State::Established;
        // The stream is fresh: its buffer takes one line.
        self.stream.write_all(format!("OK {local_port}\n").as_bytes()).map_err(|_| Broken)
    }

    /// Takes data from the guest.
    pub(crate) fn receive(&mut self, data: &[u8]) -> Result<(), Broken> {
        let room = (BUFFER_BYTES as usize).saturating_sub(self.backlog.len());
        if self.guest_done || data.len() > room {
            // It sends more than it was told that there is room for.
            return Err(Broken);
        }
        let mut rest = data;
        if self.backlog.is_empty() {
            let written = write_some(&mut self.stream, rest)?;
            self.forward(written);
            rest = rest.get(written..).unwrap_or_default();
        }
        self.backlog.extend(rest);
        Ok(())
    }

    /// Writes what waits, after the stream has become writable.
    pub(crate) fn flush(&mut self) -> Result<(), Broken> {
        while !self.backlog.is_empty() {
            let written = write_some(&mut self.stream, self.backlog.as_slices().0)?;
            if written == 0 {
                return Ok(());
            }
            self.backlog.drain(..written);
            self.forward(written);
        }
        if self.guest_done && !std::mem::replace(&mut self.shut, true) {
            // A host program that is gone already is told nothing.
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
        }
        Ok(())
    }

    fn forward(&mut self, bytes: usize) {
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(bytes).unwrap_or(0));
        // A quarter of the buffer keeps the guest going and costs few packets.
        self.owes_credit |= self.forwarded.wrapping_sub(self.announced) >= BUFFER_BYTES / 4;
    }

    /// Reads data for the guest into `buffer`; the caller has bounded it by [`Self::credit`].
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Broken> {
        loop {
            match self.stream.read(buffer) {
                Ok(0) => {
                    self.readable = false;
                    self.host_done = true;
                    return Ok(0);
                }
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap_or(0));
                    return Ok(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Broken),
            }
        }
    }

    /// The guest has said which directions are at their end. True where both are and nothing waits.
    pub(crate) fn shut_down(&mut self, flags: u32) -> Result<bool, Broken> {
        self.guest_done |= flags & SHUTDOWN_SEND != 0;
        self.guest_deaf |= flags & SHUTDOWN_RECEIVE != 0;
        self.flush()?;
        Ok(self.is_over())
    }

    /// Nothing more can pass in either direction.
    pub(crate) fn is_over(&self) -> bool {
        self.guest_done && self.guest_deaf && self.backlog.is_empty()
    }
}

/// Writes as much as the stream takes now.
fn write_some(stream: &mut UnixStream, bytes: &[u8]) -> Result<usize, Broken> {
    let mut written = 0;
    while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
        match stream.write(rest) {
            Ok(count) => written += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(Broken),
        }
    }
    Ok(written)
}

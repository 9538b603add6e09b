//! All connections of one guest.
//!
//! The muxer owns an epoll of its own, whose descriptor the device's loop watches. Streams are watched edge-triggered: an
//! edge sets a flag, and the flag stays until a read finds nothing more.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::event::epoll;

use super::connection::{Broken, Connection, State};
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};

/// The most connections of a guest. One more is refused.
const CONNECTIONS_MAX: usize = 1024;

/// While more answers than this wait for room in the guest's rx queue, no more of its packets are read.
const ANSWERS_MAX: usize = 256;

/// The most times that the host's side is looked at in one go.
const ROUNDS_MAX: usize = 16;

/// The first port on the host for connections that host programs open; the kernel hands out such high ports too.
const FIRST_LOCAL_PORT: u32 = 1 << 30;

/// The epoll key of the listener; connections count from 1.
const LISTENER: u64 = 0;

/// The host's and the guest's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Muxer {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    epoll: OwnedFd,
    connections: HashMap<u64, (Ports, Connection)>,
    by_ports: HashMap<Ports, u64>,
    next_key: u64,
    next_port: u32,
    /// Headers without payload that wait for the guest's rx queue.
    answers: VecDeque<Header>,
    /// Keys of connections that may have something for the guest, each at most once.
    ready: VecDeque<u64>,
}

impl Muxer {
    /// A muxer for the guest `guest_cid`, reached at `path`.
    ///
    /// # Errors
    /// Where the socket can't be made.
    pub fn new(guest_cid: u64, path: &Path) -> std::io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        Self::with_listener(guest_cid, path, listener)
    }

    /// As [`Self::new`], with a listener at `path` that is there already.
    ///
    /// # Errors
    /// Where the kernel refuses an epoll.
    pub fn with_listener(guest_cid: u64, path: &Path, listener: UnixListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
        Ok(Self {
            guest_cid,
            path: path.to_owned(),
            listener,
            epoll,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            next_key: LISTENER + 1,
            next_port: FIRST_LOCAL_PORT,
            answers: VecDeque::new(),
            ready: VecDeque::new(),
        })
    }

    /// The descriptor that is readable when [`Self::handle_events`] has something to do.
    #[must_use]
    pub fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// The guest's context identifier.
    #[must_use]
    pub fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Whether the guest's next packet may be read: not while it leaves too many answers waiting.
    #[must_use]
    pub fn accepts(&self) -> bool {
        self.answers.len() < ANSWERS_MAX
    }

    /// Whether [`Self::next`] may have a packet.
    #[must_use]
    pub fn has_pending(&self) -> bool {
        !self.answers.is_empty() || !self.ready.is_empty()
    }

    /// Handles what the host's side has done, without waiting. It comes back after some rounds whatever goes on there; what
    /// is left keeps [`Self::epoll`] readable.
    pub fn handle_events(&mut self) {
        let mut events = Vec::with_capacity(64);
        let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        for _ in 0..ROUNDS_MAX {
            let found = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&none));
            if !found.is_ok_and(|count| count > 0) {
                return;
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    LISTENER => self.accept(),
                    key => self.on_stream(key, event.flags),
                }
            }
        }
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.connections.len() >= CONNECTIONS_MAX {
                continue;
            }
            let ports = Ports { host: self.free_port(), guest: 0 };
            if let Err(error) = self.insert(ports, stream, State::Naming) {
                log::warn!("vsock: can't take a connection: {error}");
            }
        }
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_LOCAL_PORT);
            if !self.by_ports.keys().any(|ports| ports.host == port) {
                return port;
            }
        }
    }

    fn insert(&mut self, ports: Ports, stream: UnixStream, state: State) -> std::io::Result<u64> {
        let key = self.next_key;
        let connection = Connection::new(stream, state)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        epoll::add(&self.epoll, connection.as_fd(), epoll::EventData::new_u64(key), flags)?;
        self.next_key += 1;
        self.by_ports.insert(ports, key);
        self.connections.insert(key, (ports, connection));
        Ok(key)
    }

    /// Forgets a connection; its stream is closed by that, and the epoll loses it.
    fn remove(&mut self, key: u64) -> Option<Ports> {
        let (ports, _) = self.connections.remove(&key)?;
        self.by_ports.remove(&ports);
        Some(ports)
    }

    /// Ends all connections without a word: the guest's driver has begun anew and knows of none.
    pub fn forget_all(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.answers.clear();
        self.ready.clear();
    }

    /// Ends a connection and tells the guest.
    fn reset(&mut self, key: u64) {
        let known = self.connections.get(&key).is_some_and(|(_, connection)| connection.state != State::Naming);
        if let Some(ports) = self.remove(key).filter(|_| known) {
            self.answer(ports, Op::Reset, 0, (0, 0));
        }
    }

    fn answer(&mut self, ports: Ports, op: Op, flags: u32, credit: (u32, u32)) {
        self.answers.push_back(header(self.guest_cid, ports, op, flags, credit));
    }

    fn on_stream(&mut self, key: u64, flags: epoll::EventFlags) {
        let Some((ports, connection)) = self.connections.get_mut(&key) else { return };
        if flags.contains(epoll::EventFlags::OUT) && connection.flush().is_err() {
            return self.reset(key);
        }
        let ended = flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::HUP);
        if connection.state == State::Naming {
            match connection.read_line() {
                Ok(None) => {}
                Ok(Some(port)) => {
                    connection.state = State::Connecting;
                    connection.readable = true;
                    let credit = connection.announce();
                    let old = *ports;
                    *ports = Ports { guest: port, ..old };
                    let ports = *ports;
                    self.by_ports.remove(&old);
                    self.by_ports.insert(ports, key);
                    self.answer(ports, Op::Request, 0, credit);
                }
                Err(Broken) => self.reset(key),
            }
            return;
        }
        connection.readable |= ended;
        self.schedule(key);
    }

    /// Puts a connection on the list of those that may have something for the guest.
    fn schedule(&mut self, key: u64) {
        if !self.ready.contains(&key) {
            self.ready.push_back(key);
        }
    }

    /// Takes a packet of the guest. `data` has the header's length; the caller has bounded it.
    pub fn receive(&mut self, header: &Header, data: &[u8]) {
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            // Not ours to answer: the specification has such a packet dropped.
            return;
        }
        let key = self.by_ports.get(&ports).copied();
        let usable = header.kind == TYPE_STREAM;
        match (header.op, key) {
            (Some(Op::Reset), key) => {
                if let Some(key) = key {
                    self.remove(key);
                }
            }
            (Some(Op::Request), None) if usable => self.dial(ports, header),
            (Some(op), Some(key)) if usable && op != Op::Request => {
                if self.handle(key, op, header, data).is_err() {
                    self.reset(key);
                }
            }
            (_, Some(key)) => self.reset(key),
            (_, None) => self.answer(ports, Op::Reset, 0, (0, 0)),
        }
    }

    /// The guest dials a port of the host.
    fn dial(&mut self, ports: Ports, header: &Header) {
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!("_{}", ports.host));
        let key = if self.connections.len() >= CONNECTIONS_MAX {
            Err(std::io::Error::other("too many connections"))
        } else {
            connect_now(Path::new(&name)).and_then(|stream| self.insert(ports, stream, State::Established))
        };
        match key {
            Ok(key) => {
                if let Some((_, connection)) = self.connections.get_mut(&key) {
                    connection.note_credit(header);
                    let credit = connection.announce();
                    self.answer(ports, Op::Response, 0, credit);
                }
            }
            Err(error) => {
                log::debug!("vsock: the guest dials port {}: {error}", ports.host);
                self.answer(ports, Op::Reset, 0, (0, 0));
            }
        }
    }

    fn handle(&mut self, key: u64, op: Op, header: &Header, data: &[u8]) -> Result<(), Broken> {
        let Some((ports, connection)) = self.connections.get_mut(&key) else { return Ok(()) };
        connection.note_credit(header);
        match (op, connection.state) {
            (Op::Response, State::Connecting) => connection.accept(ports.host)?,
            (Op::Data, State::Established) => connection.receive(data)?,
            (Op::Shutdown, State::Established) => {
                if connection.shut_down(header.flags)? {
                    return Err(Broken);
                }
            }
            (Op::CreditUpdate, State::Established) => {}
            (Op::CreditRequest, State::Established) => connection.owes_credit = true,
            _ => return Err(Broken),
        }
        // New credit, a new connection or an owed update: there may be something to send.
        self.schedule(key);
        Ok(())
    }

    /// The next packet for the guest, its payload in `buffer` (which must be as long as the guest's chain has room for).
    pub fn next(&mut self, buffer: &mut [u8]) -> Option<(Header, usize)> {
        if let Some(header) = self.answers.pop_front() {
            return Some((header, 0));
        }
        while let Some(&key) = self.ready.front() {
            match self.next_of(key, buffer) {
                Ok(Some(packet)) => {
                    // Take turns: the next packet is another connection's.
                    self.ready.rotate_left(1);
                    return Some(packet);
                }
                Ok(None) => {
                    self.ready.pop_front();
                }
                Err(Broken) => {
                    self.ready.pop_front();
                    self.reset(key);
                    if let Some(header) = self.answers.pop_front() {
                        return Some((header, 0));
                    }
                }
            }
        }
        None
    }

    fn next_of(&mut self, key: u64, buffer: &mut [u8]) -> Result<Option<(Header, usize)>, Broken> {
        let Some((ports, connection)) = self.connections.get_mut(&key) else { return Ok(None) };
        let (ports, cid) = (*ports, self.guest_cid);
        if connection.state != State::Established {
            return Ok(None);
        }
        if connection.is_over() {
            return Err(Broken);
        }
        let room = connection.credit().min(buffer.len());
        if connection.readable && !connection.guest_deaf && room > 0 {
            let count = connection.read(buffer.get_mut(..room).unwrap_or_default())?;
            if count > 0 {
                let credit = connection.announce();
                let mut header = header(cid, ports, Op::Data, 0, credit);
                header.len = u32::try_from(count).unwrap_or(0);
                return Ok(Some((header, count)));
            }
        }
        if connection.host_done && !connection.told {
            connection.told = true;
            // A stream whose other end is closed for good takes no more either.
            let closed = hung_up(connection.as_fd());
            let flags = if closed { SHUTDOWN_SEND | SHUTDOWN_RECEIVE } else { SHUTDOWN_SEND };
            let credit = connection.announce();
            return Ok(Some((header(cid, ports, Op::Shutdown, flags, credit), 0)));
        }
        if connection.owes_credit {
            let credit = connection.announce();
            return Ok(Some((header(cid, ports, Op::CreditUpdate, 0, credit), 0)));
        }
        Ok(None)
    }
}

fn header(guest_cid: u64, ports: Ports, op: Op, flags: u32, credit: (u32, u32)) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: ports.host,
        dst_port: ports.guest,
        len: 0,
        kind: TYPE_STREAM,
        op: Some(op),
        flags,
        buf_alloc: credit.0,
        fwd_cnt: credit.1,
    }
}

/// Connects without waiting: a listener whose queue is full refuses, and so holds up no other connection.
fn connect_now(path: &Path) -> std::io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Whether the other end of a stream is gone for good.
pub(crate) fn hung_up(stream: BorrowedFd<'_>) -> bool {
    let mut watched = [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::empty())];
    let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = rustix::event::poll(&mut watched, Some(&none));
    polled.is_ok() && watched.iter().any(|fd| fd.revents().contains(rustix::event::PollFlags::HUP))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::connection::BUFFER_BYTES;
    use super::*;

    const GUEST: u64 = 3;

    /// A muxer, and the folder that its socket is in.
    fn muxer() -> (Muxer, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        (Muxer::new(GUEST, &folder.path().join("v")).unwrap(), folder)
    }

    /// A packet of the guest's for port `host`, from its port 7.
    fn packet(op: Op, host: u32, flags: u32, len: usize) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: 7,
            dst_port: host,
            len: u32::try_from(len).unwrap(),
            kind: TYPE_STREAM,
            op: Some(op),
            flags,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
        }
    }

    /// The next packet for the guest: what it is for, and its data.
    fn next(muxer: &mut Muxer) -> Option<(Op, Vec<u8>)> {
        muxer.handle_events();
        let mut buffer = [0; 4096];
        let (header, length) = muxer.next(&mut buffer)?;
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST));
        Some((header.op.unwrap(), buffer[..length].to_vec()))
    }

    /// A connection that the guest has opened to port 5000, and the host program's end of it.
    fn dialled(muxer: &mut Muxer, folder: &tempfile::TempDir) -> UnixStream {
        let listener = UnixListener::bind(folder.path().join("v_5000")).unwrap();
        muxer.receive(&packet(Op::Request, 5000, 0, 0), b"");
        assert_eq!(next(muxer), Some((Op::Response, vec![])));
        listener.accept().unwrap().0
    }

    #[test]
    fn data_passes_both_ways_and_ends() {
        let (mut muxer, folder) = muxer();
        let mut program = dialled(&mut muxer, &folder);
        muxer.receive(&packet(Op::Data, 5000, 0, 5), b"hello");
        program.write_all(b"back").unwrap();
        assert_eq!(next(&mut muxer), Some((Op::Data, b"back".to_vec())));
        muxer.receive(&packet(Op::Shutdown, 5000, SHUTDOWN_SEND, 0), b"");
        let mut read = String::new();
        program.read_to_string(&mut read).unwrap();
        assert_eq!(read, "hello", "and the end");
        // The other direction goes on.
        program.write_all(b"more").unwrap();
        assert_eq!(next(&mut muxer), Some((Op::Data, b"more".to_vec())));
        drop(program);
        assert_eq!(next(&mut muxer).map(|(op, _)| op), Some(Op::Shutdown));
    }

    #[test]
    fn the_end_of_one_direction_is_told_once_and_all_is_quiet_then() {
        let (mut muxer, folder) = muxer();
        let program = dialled(&mut muxer, &folder);
        muxer.receive(&packet(Op::Shutdown, 5000, SHUTDOWN_SEND, 0), b"");
        // What the shutdown itself has stirred up.
        muxer.handle_events();
        muxer.handle_events();
        let mut events: Vec<epoll::Event> = Vec::with_capacity(8);
        let none = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let left = epoll::wait(&muxer.epoll, rustix::buffer::spare_capacity(&mut events), Some(&none)).unwrap();
        assert_eq!(left, 0);
        drop(program);
    }

    #[test]
    fn a_host_program_names_a_port_and_is_refused_or_joined() {
        let (mut muxer, folder) = muxer();
        let connect = || {
            let mut program = UnixStream::connect(folder.path().join("v")).unwrap();
            program.write_all(b"CONNECT 1024\n").unwrap();
            program
        };
        let answer = |muxer: &mut Muxer, op: Op| {
            // Accepted in one round, named in the next.
            muxer.handle_events();
            let mut buffer = [0; 64];
            let (header, _) = muxer.next(&mut buffer).unwrap();
            assert_eq!((header.op, header.dst_port), (Some(Op::Request), 1024));
            let reply = Header { src_port: 1024, ..packet(op, header.src_port, 0, 0) };
            muxer.receive(&reply, b"");
        };
        let mut joined = connect();
        answer(&mut muxer, Op::Response);
        let mut line = [0; 14];
        joined.read_exact(&mut line).unwrap();
        assert!(line.starts_with(b"OK 1073741824\n"), "{line:?}");
        let mut refused = connect();
        answer(&mut muxer, Op::Reset);
        assert_eq!(refused.read(&mut [0; 8]).unwrap(), 0);
        let mut rubbish = UnixStream::connect(folder.path().join("v")).unwrap();
        rubbish.write_all(&[b'x'; 100]).unwrap();
        muxer.handle_events();
        muxer.handle_events();
        assert!(!matches!(rubbish.read(&mut [0; 8]), Ok(1..)), "closed without a word");
        assert!(muxer.next(&mut [0; 64]).is_none(), "the guest hears nothing of it");
    }

    #[test]
    fn lies_of_the_guest_are_reset_or_dropped() {
        let (mut muxer, folder) = muxer();
        let _program = dialled(&mut muxer, &folder);
        // A forged address is nobody's to answer.
        muxer.receive(&Header { src_cid: 99, ..packet(Op::Data, 5000, 0, 1) }, b"x");
        muxer.receive(&Header { dst_cid: 99, ..packet(Op::Data, 5000, 0, 1) }, b"x");
        assert_eq!(next(&mut muxer), None);
        // Unknown connections and kinds.
        muxer.receive(&packet(Op::Data, 6000, 0, 1), b"x");
        assert_eq!(next(&mut muxer), Some((Op::Reset, vec![])));
        muxer.receive(&packet(Op::Request, 6001, 0, 0), b"");
        assert_eq!(next(&mut muxer), Some((Op::Reset, vec![])), "nobody listens there");
        // More than there is room for: the program does not read, and the guest goes on.
        let chunk = vec![0; 64 * 1024];
        let mut sent = 0;
        let reset = loop {
            muxer.receive(&packet(Op::Data, 5000, 0, chunk.len()), &chunk);
            sent += chunk.len();
            match next(&mut muxer) {
                Some((Op::Reset, _)) => break true,
                _ if sent > 4 * BUFFER_BYTES as usize => break false,
                _ => {}
            }
        };
        assert!(reset, "{sent} bytes were taken");
        assert!(muxer.connections.is_empty());
    }

    #[test]
    fn a_guest_that_leaves_answers_waiting_is_not_heard() {
        let (mut muxer, _folder) = muxer();
        for port in 0..u32::try_from(ANSWERS_MAX).unwrap() {
            assert!(muxer.accepts());
            muxer.receive(&packet(Op::Request, port, 0, 0), b"");
        }
        assert!(!muxer.accepts() && muxer.has_pending());
        assert_eq!(next(&mut muxer), Some((Op::Reset, vec![])));
        assert!(muxer.accepts());
    }
}

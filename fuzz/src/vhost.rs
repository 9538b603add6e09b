//! Both sides of vhost-user, each spoken to by one that means harm: the server of a guest's sockets by its monitor, and the built-in monitor by
//! its file server.

use std::io::{IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::Duration;

use coracle_virtio::fs::Fs;
use coracle_virtio::vhost_user::serve_vsock;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use crate::input::Input;

/// How long either may take once the other side has hung up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bytes of the memory that a monitor lends.
const MEMORY: u64 = 1 << 16;

/// Runs one input: which side it speaks to, and what it says.
///
/// # Panics
/// Where one of them goes on after the other side has hung up, or fails in another way than by an error.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    if input.byte() % 4 == 3 { answers(&mut input) } else { requests(&mut input) }
}

/// A file server's answers to the monitor that sets it up.
fn answers(input: &mut Input<'_>) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    while !input.is_empty() {
        let message = message(input);
        if theirs.write_all(&message).is_err() {
            break;
        }
    }
    drop(theirs);
    if let Ok(device) = Fs::new("tag", ours, 128) {
        drop(device);
    }
}

/// A monitor's requests to the server of its guest's sockets.
fn requests(input: &mut Input<'_>) {
    let folder = tempfile::tempdir().expect("a folder");
    let programs = folder.path().join("programs");
    let listen = |name: &str| UnixListener::bind(folder.path().join(name)).expect("a socket");
    let (listener, monitor) = (listen("programs"), listen("monitor"));
    let (told, ended) = mpsc::channel();
    let server = std::thread::spawn(move || {
        let _ = serve_vsock(3, &programs, listener, monitor);
        let _ = told.send(());
    });
    let stream = UnixStream::connect(folder.path().join("monitor")).expect("a connection");
    // The server may wait to be read from, too.
    stream.set_write_timeout(Some(Duration::from_millis(200))).expect("a limit");
    while !input.is_empty() {
        let descriptors = given(input.byte());
        if send(&stream, &message(input), &descriptors).is_err() {
            break;
        }
    }
    drop(stream);
    ended.recv_timeout(PATIENCE).expect("the server goes on without a monitor");
    server.join().expect("the server has failed");
}

/// Descriptors that go with a message: memory, or something to ring.
fn given(wish: u8) -> Vec<OwnedFd> {
    let memory = || {
        let file = rustix::fs::memfd_create(c"memory", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
        rustix::fs::ftruncate(&file, MEMORY).expect("memory");
        file
    };
    let bell = || rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).expect("a descriptor");
    match wish % 6 {
        0..=2 => Vec::new(),
        3 => vec![bell()],
        4 => vec![memory()],
        _ => vec![memory(), memory()],
    }
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> rustix::io::Result<usize> {
    let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

/// A message (vhost-user: request, flags with the version 1, size, body), mostly with its own size, made of numbers that mean something.
fn message(input: &mut Input<'_>) -> Vec<u8> {
    let (request, flags, lie, count) = (input.byte(), input.byte(), input.byte(), input.byte());
    let mut body = Vec::new();
    for _ in 0..count % 12 {
        let number = match input.byte() {
            kind @ 0..=9 => u64::from(kind),
            10..=49 => u64::from(input.byte()) << 12,
            50..=99 => u64::MAX - u64::from(input.byte()),
            100..=149 => MEMORY,
            _ => u64::from(input.byte()) << (input.byte() % 64),
        };
        body.extend(number.to_le_bytes());
    }
    body.truncate(body.len().saturating_sub(usize::from(count / 12 % 8)));
    let size = if lie > 240 { u32::from(lie) << (lie % 24) } else { u32::try_from(body.len()).unwrap_or(0) };
    let mut bytes = Vec::new();
    bytes.extend(u32::from(request % 45).to_le_bytes());
    // The version, and the flags of an answer and of a wish for one; seldom others.
    bytes.extend((1 | u32::from(flags % 4) << 2 | u32::from(flags > 250) << 6).to_le_bytes());
    bytes.extend(size.to_le_bytes());
    bytes.extend(body);
    bytes
}

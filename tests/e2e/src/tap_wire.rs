//! A wire between two taps in two namespaces, whose frames a thread of this process hands on: what a program is that gives a pod a link
//! (a user-mode network, a switch).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, setns};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::Netns;

/// `TUNSETIFF` (linux/if_tun.h): `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// See the module. It ends when this is dropped, and both taps with it.
#[derive(Debug)]
pub struct TapWire {
    end: File,
    thread: Option<JoinHandle<()>>,
}

impl TapWire {
    /// Between taps of these names.
    ///
    /// # Panics
    /// Where they can't be made.
    #[must_use]
    pub fn between(one: (&Netns, &str), other: (&Netns, &str)) -> Self {
        let ends = [tap(one.0, one.1), tap(other.0, other.1)];
        let end = File::from(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"));
        let ended = end.try_clone().expect("a descriptor");
        let thread = std::thread::spawn(move || hand_on(ends, &ended));
        Self { end, thread: Some(thread) }
    }
}

impl Drop for TapWire {
    fn drop(&mut self) {
        let told = self.end.write_all(&1_u64.to_ne_bytes());
        if let (Ok(()), Some(thread)) = (told, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// A tap in a namespace, which a thread of its own enters.
fn tap(netns: &Netns, name: &str) -> File {
    let (path, name) = (netns.path(), name.to_owned());
    let made = std::thread::spawn(move || {
        let namespace = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("enter a namespace");
        let tap = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
        // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
        #[expect(unsafe_code, reason = "a C structure with a union")]
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *place = byte.cast_signed();
        }
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(libc::IFF_TAP | libc::IFF_NO_PI).expect("flags");
        // SAFETY: the pointer is to a live structure of the type that the request reads and writes.
        #[expect(unsafe_code, reason = "ioctl")]
        let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
        assert!(result >= 0, "a tap {name}: {}", std::io::Error::last_os_error());
        tap
    });
    made.join().expect("a tap")
}

/// Hands frames on, in both directions, until it is told to end or a tap is gone.
fn hand_on([one, other]: [File; 2], end: &File) {
    let mut frame = vec![0; 1 << 16];
    loop {
        let mut waits = [&one, &other, end].map(|file| PollFd::from_borrowed_fd(file.as_fd(), PollFlags::IN));
        if poll(&mut waits, None).is_err() || !waits[2].revents().is_empty() {
            return;
        }
        let [from_one, from_other, _] = waits.map(|wait| !wait.revents().is_empty());
        for (has, mut from, mut to) in [(from_one, &one, &other), (from_other, &other, &one)] {
            if !has {
                continue;
            }
            let Ok(count) = from.read(&mut frame) else { return };
            // A tap that is not up takes none.
            let _ = to.write(&frame[..count]);
        }
    }
}

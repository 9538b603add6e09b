//! The monitor's main thread: it does what the driver asks, serves the devices that never wait, and tells the end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Instant;

use coracle_monitor_api::{Answer, DESCRIPTORS_MAX, Fault, LINE_BYTES_MAX, Machine as Spec, Message, Rate, Request};
use coracle_virtio::limit::{self, Limits};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::devices::Descriptors;
use crate::events::Watch;
use crate::jail::{self, Kind};
use crate::machine::{Host, Machine};
use crate::{Error, News};

/// Own events of the main loop.
const CONTROL: u16 = 0;
const NEWS: u16 = 1;
const MEMORY: u16 = 2;

/// Runs one machine for the driver at the other end of `control`, to its end or the driver's.
///
/// # Errors
/// Where the machine can't be made; the driver was told, too.
pub fn run(control: UnixStream) -> Result<(), Error> {
    let started = Instant::now();
    allow_descriptors();
    let mut channel = Channel { stream: control, unread: Vec::new(), descriptors: VecDeque::new(), known: None };
    let spec = match channel.next() {
        Ok(Some(Request::Boot(spec))) => *spec,
        Ok(Some(_)) => return Err(Error::Invalid("the first request must be to boot".into())),
        Ok(None) => return Ok(()),
        Err(error) => return Err(error),
    };
    let main = Watch::new()?;
    let told = EventFd::new(EFD_NONBLOCK).map_err(Error::system("make an eventfd"))?;
    let (sender, news) = mpsc::channel();
    let bell = told.try_clone().map_err(Error::system("make an eventfd"))?;
    let tell = Box::new(move |news: News| {
        // The main thread is gone only when the process is.
        let _ = sender.send(news);
        let _ = bell.write(1);
    });
    let memory = EventFd::new(EFD_NONBLOCK).map_err(Error::system("make an eventfd"))?;
    let changed = memory.try_clone().map_err(Error::system("make an eventfd"))?;
    let booted = boot(&spec, Host { started, main: main.clone(), changed, tell });
    let mut machine = match booted {
        Ok(machine) => machine,
        Err(error) => {
            channel.send(&Message::Reply(Err(fault(&error))))?;
            return Err(error);
        }
    };
    main.add_own(CONTROL, channel.stream.as_fd())?;
    main.add_own(NEWS, coracle_virtio::ring::borrowed(&told))?;
    main.add_own(MEMORY, coracle_virtio::ring::borrowed(&memory))?;
    channel.stream.set_nonblocking(true).map_err(Error::system("watch the driver"))?;
    if spec.jail.enabled {
        jail::confine(Kind::Main)?;
    }
    channel.send(&Message::Reply(Ok(Answer::Done)))?;
    let bus = std::sync::Arc::clone(&machine.shared.bus);
    let mut failed = None;
    main.run(&bus, |number| match number {
        CONTROL => channel.answer_all(&mut machine).unwrap_or_else(|error| {
            failed = Some(error);
            false
        }),
        MEMORY => {
            let _ = memory.read();
            channel.tell_memory(&machine).is_ok()
        }
        _ => {
            let _ = told.read();
            // A driver that is gone needs no news, and the first end is the one that counts.
            news.try_iter().all(|news| match news {
                News::Ejected(number) => {
                    let told = channel.send(&Message::Ejected(number)).is_ok();
                    machine.release(number);
                    told
                }
                News::Processors { gone, left } => {
                    machine.park(gone);
                    channel.send(&Message::Processors(left)).is_ok()
                }
                News::Ended(ended) => {
                    let _ = channel.send(&Message::Ended(ended));
                    false
                }
            })
        }
    })?;
    // Its processors and disks may still be at work on its memory, which goes with the process.
    std::mem::forget(machine);
    failed.map_or(Ok(()), Err)
}

/// As many as the host lets this process have: connections, queues and interrupts take one each.
fn allow_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::warn!("the limit of descriptors stays {:?}: {error}", limit.current);
    }
}

fn boot(spec: &Spec, host: Host) -> Result<Machine, Error> {
    if spec.jail.enabled {
        jail::enter(&spec.jail)?;
    }
    Machine::boot(spec, host)
}

fn fault(error: &Error) -> Fault {
    Fault { text: error.to_string(), invalid: error.is_invalid() }
}

struct Channel {
    stream: UnixStream,
    unread: Vec<u8>,
    /// Those that have come with what was read, and that no request has taken yet.
    descriptors: VecDeque<OwnedFd>,
    /// The memory that the driver knows of, while it waits for another amount.
    known: Option<u64>,
}

impl Channel {
    /// The next request; `None` where the driver is gone, or, on a stream that does not wait, has no whole one there.
    fn next(&mut self) -> Result<Option<Request>, Error> {
        loop {
            if let Some(end) = self.unread.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                let request = serde_json::from_slice(&line);
                return request.map(Some).map_err(|error| Error::Invalid(format!("a request is no request: {error}")));
            }
            if self.unread.len() > LINE_BYTES_MAX {
                return Err(Error::Invalid("a request is too long".into()));
            }
            if self.hear()? == 0 {
                return Ok(None);
            }
        }
    }

    /// Reads what is there, with the descriptors that come with it; how many bytes.
    fn hear(&mut self) -> Result<usize, Error> {
        let mut chunk = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut chunk)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let heard = rustix::io::retry_on_intr(|| recvmsg(&self.stream, &mut parts, &mut ancillary, flags));
        let heard = heard.map_err(Error::system("hear the driver"))?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        if heard.flags.contains(ReturnFlags::CTRUNC) {
            // This process can't have more of them: whatever they were for is refused.
            log::warn!("descriptors were lost: the monitor has as many as it may");
            self.descriptors.clear();
        }
        self.unread.extend(chunk.iter().take(heard.bytes));
        Ok(heard.bytes)
    }

    /// Does what was asked. False where the driver is gone.
    fn answer_all(&mut self, machine: &mut Machine) -> Result<bool, Error> {
        loop {
            let request = match self.next() {
                Ok(Some(request)) => request,
                Ok(None) => return Ok(false),
                Err(Error::System { source, .. }) if source.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) => return Err(error),
            };
            let answer = self.answer(request, machine).map_err(|error| fault(&error));
            self.send(&Message::Reply(answer))?;
        }
    }

    fn answer(&mut self, request: Request, machine: &mut Machine) -> Result<Answer, Error> {
        match request {
            Request::Save => {
                let mut files = self.descriptors.drain(..self.descriptors.len().min(2)).map(File::from);
                let (Some(state), Some(memory)) = (files.next(), files.next()) else {
                    return Err(Error::Invalid("a machine is saved into two files".into()));
                };
                machine.save(&state, &memory)?;
            }
            Request::Pause => machine.pause(),
            Request::Resume => machine.resume(),
            Request::Stats => return Ok(Answer::Stats(Box::new(machine.stats()))),
            Request::Attach { device, descriptors } => {
                let count = descriptors.min(self.descriptors.len());
                let mut received = Descriptors::Received(self.descriptors.drain(..count).map(Some).collect());
                return machine.attach(&device, &mut received).map(Answer::Attached);
            }
            Request::Detach { number } => machine.detach(number)?,
            Request::ResizeDevice { number, bytes } => machine.resize_device(number, bytes)?,
            Request::Limit { number, to_guest, from_guest } => {
                let rate = |rate: Rate| limit::Rate {
                    bytes_per_second: rate.bytes_per_second,
                    operations_per_second: rate.operations_per_second,
                };
                machine.limit(number, Limits { to_guest: rate(to_guest), from_guest: rate(from_guest) })?;
            }
            Request::AddProcessor => machine.add_processor()?,
            Request::TakeProcessor => machine.take_processor(),
            Request::KeepProcessors => machine.keep_processors(),
            Request::ResizeMemory { bytes } => machine.resize_memory(bytes)?,
            Request::TellMemory { known } => {
                self.known = Some(known);
                self.tell_memory(machine)?;
            }
            Request::Boot(_) => return Err(Error::Invalid("the machine runs already".into())),
        }
        Ok(Answer::Done)
    }

    /// Once for each time that the driver has asked: a guest that goes up and down for ever fills nobody's socket.
    fn tell_memory(&mut self, machine: &Machine) -> Result<(), Error> {
        let bytes = machine.memory_bytes();
        if self.known.is_some_and(|known| known != bytes) {
            self.known = None;
            self.send(&Message::Memory(bytes))?;
        }
        Ok(())
    }

    fn send(&mut self, message: &Message) -> Result<(), Error> {
        let mut line = serde_json::to_vec(message).map_err(|error| Error::Invalid(error.to_string()))?;
        line.push(b'\n');
        // A driver that reads none of its answers has asked for no more of them than the socket's buffer holds.
        self.stream.write_all(&line).map_err(Error::system("answer the driver"))
    }
}

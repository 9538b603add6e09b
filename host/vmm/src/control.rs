//! The monitor's main thread: it does what the driver asks, serves the devices that never wait, and tells the end.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::Instant;

use coracle_monitor_api::{Answer, Ended, Fault, LINE_BYTES_MAX, Machine as Spec, Message, Request};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Error;
use crate::events::Watch;
use crate::jail::{self, Kind};
use crate::machine::{Host, Machine};

/// Own events of the main loop.
const CONTROL: u16 = 0;
const ENDED: u16 = 1;

/// Runs one machine for the driver at the other end of `control`, to its end or the driver's.
///
/// # Errors
/// Where the machine can't be made; the driver was told, too.
pub fn run(control: UnixStream) -> Result<(), Error> {
    let started = Instant::now();
    let mut channel = Channel { stream: control, unread: Vec::new() };
    let spec = match channel.next() {
        Ok(Some(Request::Boot(spec))) => *spec,
        Ok(Some(_)) => return Err(Error::Invalid("the first request must be to boot".into())),
        Ok(None) => return Ok(()),
        Err(error) => return Err(error),
    };
    let main = Watch::new()?;
    let told = EventFd::new(EFD_NONBLOCK).map_err(Error::system("make an eventfd"))?;
    let (sender, ends) = mpsc::channel();
    let bell = told.try_clone().map_err(Error::system("make an eventfd"))?;
    let ended = Box::new(move |ended: Ended| {
        // Whoever is first is heard; the main thread is gone only when the process is.
        let _ = sender.send(ended);
        let _ = bell.write(1);
    });
    let booted = boot(&spec, Host { started, main: main.clone(), ended });
    let mut machine = match booted {
        Ok(machine) => machine,
        Err(error) => {
            let fault = Fault { text: error.to_string(), invalid: error.is_invalid() };
            channel.send(&Message::Reply(Err(fault)))?;
            return Err(error);
        }
    };
    main.add_own(CONTROL, channel.stream.as_fd())?;
    main.add_own(ENDED, coracle_virtio::ring::borrowed(&told))?;
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
        _ => {
            if let Ok(ended) = ends.try_recv() {
                // A driver that is gone needs no news.
                let _ = channel.send(&Message::Ended(ended));
            }
            false
        }
    })?;
    // Its processors and disks may still be at work on its memory, which goes with the process.
    std::mem::forget(machine);
    failed.map_or(Ok(()), Err)
}

fn boot(spec: &Spec, host: Host) -> Result<Machine, Error> {
    if spec.jail.enabled {
        jail::enter(&spec.jail)?;
    }
    Machine::boot(spec, host)
}

struct Channel {
    stream: UnixStream,
    unread: Vec<u8>,
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
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.unread.extend(chunk.iter().take(count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::system("hear the driver")(error)),
            }
        }
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
            let answer = match request {
                Request::Pause => {
                    machine.pause();
                    Ok(Answer::Done)
                }
                Request::Resume => {
                    machine.resume();
                    Ok(Answer::Done)
                }
                Request::Stats => Ok(Answer::Stats(Box::new(machine.stats()))),
                Request::Boot(_) => Err(Fault { text: "the machine runs already".into(), invalid: true }),
            };
            self.send(&Message::Reply(answer))?;
        }
    }

    fn send(&mut self, message: &Message) -> Result<(), Error> {
        let mut line = serde_json::to_vec(message).map_err(|error| Error::Invalid(error.to_string()))?;
        line.push(b'\n');
        // A driver that reads none of its answers has asked for no more of them than the socket's buffer holds.
        self.stream.write_all(&line).map_err(Error::system("answer the driver"))
    }
}

//! The command's output on its way to standard output, and how it all ends.
//!
//! The clone sends one stream: the output, with a line of the lab's own before it and one after it. Both begin with a mark that
//! nobody can have written by chance.

use std::io::Read;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::machine::Machine;

/// How much is written at once: a pipe that can be written to at all takes as much without a wait (pipe(7), `PIPE_BUF`).
const WRITE_BYTES: usize = 4096;
/// How much is read at once.
const READ_BYTES: usize = 64 << 10;

/// What ends the lab.
const SIGNALS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

/// How the lab has ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The command's exit status.
    Status(u8),
    /// The time was up.
    Limit {
        /// Whether the command had started.
        started: bool,
    },
    /// The number of a signal to this process.
    Signal(u8),
}

/// A new mark.
pub(crate) fn mark() -> Result<String> {
    let mut bytes = [0; 16];
    let mut source = std::fs::File::open("/dev/urandom").context("open /dev/urandom")?;
    source.read_exact(&mut bytes).context("read /dev/urandom")?;
    Ok(format!("\u{1e}coracle-lab {}", hex::encode(bytes)))
}

/// From here on signals that would end this process are read from a descriptor. Its children get them as ever.
pub(crate) fn catch_signals() -> Result<SignalFd> {
    let set: SigSet = SIGNALS.into_iter().collect();
    set.thread_block().context("block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("a descriptor for signals")
}

/// Passes the output on until the command has ended, or something else ends it all. It reads no more than it can write, so
/// that a slow reader slows the command; a reader that has stopped keeps neither a signal nor the time limit away. None where
/// one of the clone's programs was gone before that.
pub(crate) fn follow(machine: &mut Machine, mark: &str, signals: &SignalFd, limit: Duration) -> Result<Option<End>> {
    let begin = Instant::now();
    let mut stream = Stream::new(mark);
    let stdout = std::io::stdout();
    let mut bytes = vec![0; READ_BYTES];
    loop {
        let writes = !stream.output.is_empty();
        if let (false, Some(status)) = (writes, stream.status) {
            return Ok(Some(End::Status(status)));
        }
        let started = stream.started;
        let left = limit.saturating_sub(begin.elapsed());
        if left.is_zero() {
            return Ok(Some(End::Limit { started }));
        }
        let [signalled, ready, gone] = match wait(machine, signals, writes.then_some(&stdout), left) {
            Err(Errno::INTR) => continue,
            told => told.context("wait for the clone")?,
        };
        if let (true, Some(signal)) = (signalled, signals.read_signal().context("read a signal")?) {
            return Ok(Some(End::Signal(u8::try_from(signal.ssi_signo)?)));
        }
        if ready && writes {
            let count = stream.output.len().min(WRITE_BYTES);
            match rustix::io::write(&stdout, &stream.output[..count]) {
                Err(Errno::INTR | Errno::AGAIN) => {}
                written => drop(stream.output.drain(..written.context("write the output")?)),
            }
        } else if ready {
            match machine.output.read(&mut bytes).context("read the clone's output")? {
                0 => return Ok(None),
                count => stream.take(&bytes[..count]),
            }
            if stream.started && !started {
                eprintln!("    the clone's start: {:.0} s", begin.elapsed().as_secs_f64());
            }
        } else if gone {
            return Ok(None);
        }
    }
}

/// Waits for at most `left`, and tells of each whether it has happened: a signal; output to read, or room for it where there
/// is some to write; the end of a program, which is of no interest before what was sent is written.
fn wait(
    machine: &Machine,
    signals: &SignalFd,
    writes: Option<&std::io::Stdout>,
    left: Duration,
) -> rustix::io::Result<[bool; 3]> {
    let mut events = vec![PollFd::new(signals, PollFlags::IN)];
    if let Some(stdout) = writes {
        events.push(PollFd::new(stdout, PollFlags::OUT));
    } else {
        events.push(PollFd::new(&machine.output, PollFlags::IN));
        events.extend(machine.ends().map(|end| PollFd::new(end, PollFlags::IN)));
    }
    let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
    poll(&mut events, Some(&left))?;
    let told = |event: &PollFd<'_>| !event.revents().is_empty();
    Ok([told(&events[0]), told(&events[1]), events[2..].iter().any(told)])
}

/// The clone's stream, taken apart.
#[derive(Debug)]
struct Stream {
    mark: Vec<u8>,
    /// What may be the beginning of a line of the lab's own.
    held: Vec<u8>,
    /// The command's output that is not written yet.
    output: Vec<u8>,
    started: bool,
    status: Option<u8>,
}

impl Stream {
    fn new(mark: &str) -> Self {
        let mark = mark.as_bytes().to_vec();
        Self { mark, held: Vec::new(), output: Vec::new(), started: false, status: None }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.held.extend(bytes);
        while self.status.is_none() {
            let place = self.held.windows(self.mark.len()).position(|window| window == self.mark);
            let Some(at) = place else {
                // A part of a mark at the end waits for the rest.
                let whole = self.held.len();
                let part = (1..self.mark.len().min(whole + 1)).rev().find(|n| self.held.ends_with(&self.mark[..*n]));
                self.output.extend(self.held.drain(..whole - part.unwrap_or(0)));
                return;
            };
            self.output.extend(self.held.drain(..at));
            let Some(end) = self.held.iter().position(|byte| *byte == b'\n') else { return };
            let line: Vec<u8> = self.held.drain(..=end).skip(self.mark.len()).collect();
            match String::from_utf8_lossy(&line).split_whitespace().collect::<Vec<_>>().as_slice() {
                ["ended", status] => self.status = status.parse().ok().or(Some(u8::MAX)),
                _ => self.started = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(pieces: &[&[u8]]) -> Stream {
        let mut stream = Stream::new("#mark");
        pieces.iter().for_each(|piece| stream.take(piece));
        stream
    }

    #[test]
    fn the_output_lies_between_two_lines() {
        let all = b"#mark started\n#ma\r\n\0\xff#mark ended 7\nand what comes after it";
        for size in 1..all.len() {
            let stream = stream(&all.chunks(size).collect::<Vec<_>>());
            assert_eq!((stream.started, stream.status), (true, Some(7)), "{size}");
            assert_eq!(stream.output, b"#ma\r\n\0\xff", "{size}");
        }
    }

    #[test]
    fn output_is_passed_on_at_once() {
        let stream = stream(&[b"#mark started\n", b"a line\nhalf a li"]);
        assert_eq!((stream.output.as_slice(), stream.status), (&b"a line\nhalf a li"[..], None));
        assert_eq!(self::stream(&[b"x#mar"]).output, b"x");
    }

    #[test]
    fn every_mark_is_another() {
        assert_ne!(mark().unwrap(), mark().unwrap());
    }
}

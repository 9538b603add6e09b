//! Programs of the guest image that the agent runs for a moment: hooks, and the tools behind some requests.

use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, Signal};

/// The most that is kept of a program's output, in bytes.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

/// How a program has ended.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
}

/// Runs `command` with `input` to its end, for at most `patience`. It blocks.
///
/// # Errors
/// Where it can't be started; `TimedOut` where it was killed for taking too long.
pub(crate) fn run(mut command: Command, input: &[u8], patience: Duration) -> std::io::Result<Outcome> {
    // Files and not pipes: nobody waits for anybody, however much is written.
    let file =
        || Ok::<_, std::io::Error>(std::fs::File::from(rustix::fs::memfd_create("program", MemfdFlags::CLOEXEC)?));
    let (mut stdin, mut stdout, mut stderr) = (file()?, file()?, file()?);
    stdin.write_all(input)?;
    stdin.rewind()?;
    // A group of its own: what it has started ends with it.
    command.process_group(0);
    let mut child = command
        .env_clear()
        .env("PATH", PATH)
        .stdin(stdin)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()?;
    let own = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    // The files are memory. One that can't be limited any more has ended.
    let limit = Rlimit { current: Some(OUTPUT_BYTES_MAX), maximum: Some(OUTPUT_BYTES_MAX) };
    let _ = rustix::process::prlimit(own, Resource::Fsize, limit);
    let ended = ends_within(own, patience);
    if !matches!(ended, Ok(true)) {
        if let Some(group) = own {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        child.wait()?;
        ended?;
        return Err(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("it took longer than {} s", patience.as_secs()),
        ));
    }
    let status = child.wait()?;
    let read = |file: &mut std::fs::File| {
        let mut bytes = Vec::new();
        file.rewind()?;
        file.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes)?;
        Ok::<_, std::io::Error>(bytes)
    };
    Ok(Outcome { status, stdout: read(&mut stdout)?, stderr: read(&mut stderr)? })
}

pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn ends_within(pid: Option<Pid>, patience: Duration) -> std::io::Result<bool> {
    let pid = pid.ok_or_else(|| std::io::Error::other("no pid"))?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other? > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_and_outputs_pass() {
        let mut command = Command::new("sh");
        command.args(["-c", "cat; echo oops >&2; exit 3"]);
        let input = vec![b'x'; 300_000];
        let outcome = run(command, &input, Duration::from_secs(60)).unwrap();
        assert_eq!(
            (outcome.status.code(), outcome.stdout == input, outcome.stderr),
            (Some(3), true, b"oops\n".to_vec())
        );
    }

    #[test]
    fn one_that_takes_too_long_is_killed() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        let error = run(command, b"", Duration::from_millis(50)).map(drop).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        assert!(run(Command::new("/nowhere"), b"", Duration::from_secs(1)).is_err());
    }
}

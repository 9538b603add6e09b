//! Running programs to their end, or beside the test.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

/// How a program ended and what it printed.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The exit code; 128 and the signal's number where one ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

fn code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

impl Outcome {
    /// Runs a command with `input` to its end.
    ///
    /// # Panics
    /// Where it can't be started.
    #[must_use]
    pub fn of(command: Command, input: &[u8]) -> Self {
        let mut running = Running::start(command);
        running.write(input);
        running.finish()
    }

    /// The output without its last line end.
    #[must_use]
    pub fn line(&self) -> &str {
        self.stdout.trim_end()
    }
}

/// A program that runs beside the test.
#[derive(Debug)]
pub struct Running {
    /// The process.
    pub child: Child,
}

impl Running {
    /// Starts a command with pipes on all streams.
    ///
    /// # Panics
    /// Where it can't be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { child }
    }

    /// Writes to its input.
    pub fn write(&mut self, bytes: &[u8]) {
        if let Some(stdin) = &mut self.child.stdin {
            // A program that reads nothing is no fault of the test's.
            let _ = stdin.write_all(bytes);
        }
    }

    /// Reads its output up to and with `text`.
    ///
    /// # Panics
    /// Where the output ends before.
    pub fn read_until(&mut self, text: &str) -> String {
        let stdout = self.child.stdout.as_mut().expect("a pipe");
        let mut read = Vec::new();
        let mut byte = [0];
        while !String::from_utf8_lossy(&read).contains(text) {
            match stdout.read(&mut byte) {
                Ok(1) => read.extend(byte),
                _ => {
                    let mut stderr = String::new();
                    let _ = self.child.stderr.as_mut().map(|pipe| pipe.read_to_string(&mut stderr));
                    panic!("the output ended before {text:?}: {:?} {stderr}", String::from_utf8_lossy(&read));
                }
            }
        }
        String::from_utf8_lossy(&read).into_owned()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// Where there is no such process.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("a signal");
    }

    /// Closes its input and waits for its end.
    ///
    /// # Panics
    /// Where it can't be waited for.
    #[must_use]
    pub fn finish(mut self) -> Outcome {
        drop(self.child.stdin.take());
        let stderr = self.child.stderr.take();
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = stderr.map(|mut pipe| pipe.read_to_end(&mut text));
            text
        });
        let mut stdout = Vec::new();
        let _ = self.child.stdout.take().map(|mut pipe| pipe.read_to_end(&mut stdout));
        let status = self.child.wait().expect("the end of a child");
        let stderr = reader.join().expect("the reader");
        Outcome {
            code: code(status),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }
}

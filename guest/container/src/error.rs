use serde::{Deserialize, Serialize};

/// What is wrong with a command that can't be run; the texts are those that runc's users know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum CommandProblem {
    /// A bare name that no folder of `$PATH` holds.
    #[error("executable file not found in $PATH")]
    NotInPath,
    /// A path that is not there.
    #[error("no such file or directory")]
    NotFound,
    /// A file without execute permission.
    #[error("permission denied")]
    NotExecutable,
    /// A directory.
    #[error("is a directory: permission denied")]
    Directory,
    /// The kernel does not know the file's format, or its interpreter is missing.
    #[error("exec format error")]
    Format,
}

/// Why the engine could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Error {
    /// The command can't be run.
    #[error("exec: \"{command}\": {problem}")]
    Command {
        /// The first argument as it was given.
        command: String,
        /// What is wrong with it.
        problem: CommandProblem,
    },
    /// The specification asks for something that is malformed or does not exist.
    #[error("{0}")]
    Invalid(String),
    /// A kernel call failed.
    #[error("{step}: {source}")]
    System {
        /// What was being done, with the path or name it was done to.
        step: String,
        /// The kernel's answer.
        source: Errno,
    },
    /// `agent init` ended without a word.
    #[error("the container's init ended before it was ready")]
    InitGone,
}

/// An error number of the kernel, with its name and text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Errno(pub i32);

impl std::fmt::Display for Errno {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(nix::errno::Errno::from_raw(self.0).desc())
    }
}

impl std::error::Error for Errno {}

/// Gives a kernel error the step it happened in.
pub(crate) trait Step<T> {
    /// Names the step; the text is made only for an error.
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Step<T> for nix::Result<T> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|errno| Error::System { step: step(), source: Errno(errno as i32) })
    }
}

impl<T> Step<T> for std::io::Result<T> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::System { step: step(), source: Errno(error.raw_os_error().unwrap_or(libc::EIO)) })
    }
}

impl<T> Step<T> for rustix::io::Result<T> {
    fn step(self, step: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|errno| Error::System { step: step(), source: Errno(errno.raw_os_error()) })
    }
}

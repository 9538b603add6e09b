//! Errors, and the one place that gives them status codes.

use coracle_protocol::ttrpc::{self, Code};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container or process.
    #[error("{0} not found")]
    NotFound(String),
    /// The name is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// The request does not fit the state.
    #[error("{0}")]
    State(String),
    /// The request is malformed, or the gate refuses it.
    #[error("{0}")]
    Invalid(String),
    /// The gate does not allow it.
    #[error("{0} is not allowed by the guest's policy")]
    Denied(String),
    /// The agent does not do that.
    #[error("{0} is not supported by this agent")]
    Unsupported(String),
    /// The engine failed.
    #[error(transparent)]
    Container(#[from] coracle_container::Error),
    /// The kernel said no.
    #[error("{step}: {source}")]
    System {
        /// What was being done.
        step: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl Error {
    /// For `map_err`: names the step that failed.
    pub(crate) fn system<E: Into<std::io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        let step = step.into();
        move |source| Self::System { step, source: source.into() }
    }

    fn code(&self) -> Code {
        use coracle_container::Error as Engine;
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Denied(_) => Code::PERMISSION_DENIED,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Invalid(_) | Self::Container(Engine::Command { .. } | Engine::Invalid(_)) => Code::INVALID_ARGUMENT,
            Self::Container(_) | Self::System { .. } => Code::INTERNAL,
        }
    }
}

impl From<coracle_faults::Injected> for Error {
    fn from(injected: coracle_faults::Injected) -> Self {
        Self::System { step: injected.to_string(), source: std::io::Error::from_raw_os_error(libc::EIO) }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

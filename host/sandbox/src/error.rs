use coracle_protocol::ttrpc;

/// Why the pod could not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No such container or process.
    #[error("{0} not found")]
    NotFound(String),
    /// The name is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// The state does not allow it.
    #[error("{0}")]
    State(String),
    /// The request is malformed, or names a command that can't be run.
    #[error("{0}")]
    Invalid(String),
    /// Something that is needed is missing or not allowed. The text names the mend.
    #[error("{0}")]
    Missing(String),
    /// This runtime does not do that.
    #[error("{0}")]
    Unsupported(String),
    /// The guest's policy does not allow it.
    #[error("{0}")]
    Denied(String),
    /// The guest did not answer in time.
    #[error("{0}")]
    Timeout(String),
    /// The machine, its agent or a host call failed.
    #[error("{0}")]
    Failed(String),
    /// The connection to the agent has broken: the machine is ending, or will be ended.
    #[error("the agent can't be reached: {0}")]
    Unreachable(String),
    /// The pod's machine has ended.
    #[error("the pod's machine has ended: {0}")]
    Ended(String),
    /// The pod is no more.
    #[error("the pod is gone")]
    Gone,
}

impl From<coracle_faults::Injected> for Error {
    fn from(injected: coracle_faults::Injected) -> Self {
        Self::Failed(injected.to_string())
    }
}

impl From<coracle_machine::Error> for Error {
    fn from(error: coracle_machine::Error) -> Self {
        use coracle_machine::Error as Machine;
        let text = error.to_string();
        match error {
            Machine::Unsupported(_) => Self::Unsupported(text),
            Machine::Missing(_) => Self::Missing(text),
            Machine::Invalid(_) => Self::Invalid(text),
            Machine::Ended(reason) => Self::Ended(reason),
            Machine::Monitor(_) | Machine::System { .. } => Self::Failed(text),
        }
    }
}

impl From<coracle_storage::Error> for Error {
    fn from(error: coracle_storage::Error) -> Self {
        let text = error.to_string();
        match error {
            coracle_storage::Error::Missing(_) => Self::Missing(text),
            coracle_storage::Error::Invalid(_) => Self::Invalid(text),
            coracle_storage::Error::Unsupported { .. }
            | coracle_storage::Error::OnlyDisks(_)
            | coracle_storage::Error::NotShared(_) => Self::Unsupported(text),
        }
    }
}

impl From<coracle_network::Error> for Error {
    fn from(error: coracle_network::Error) -> Self {
        let text = error.to_string();
        match error {
            coracle_network::Error::Namespace { .. } => Self::Invalid(text),
            coracle_network::Error::Unsupported { .. }
            | coracle_network::Error::Host { .. }
            | coracle_network::Error::Inhabited { .. }
            | coracle_network::Error::TooMany { .. }
            | coracle_network::Error::Route(_)
            | coracle_network::Error::Model { .. }
            | coracle_network::Error::Limits { .. }
            | coracle_network::Error::Clash { .. } => Self::Unsupported(text),
            coracle_network::Error::Function { .. } => Self::Unsupported(text),
            coracle_network::Error::Kernel { .. } | coracle_network::Error::System { .. } => Self::Failed(text),
        }
    }
}

/// How much of what an agent says is kept, in characters.
const TEXT_LENGTH: usize = 4096;

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        use ttrpc::Code;
        let ttrpc::Error::RpcStatus(status) = error else {
            return Self::Unreachable(error.to_string());
        };
        // A guest's words, which go to logs and terminals.
        let plain = status.message().chars().map(|c| if c.is_control() && c != '\n' { ' ' } else { c });
        let text: String = plain.take(TEXT_LENGTH).collect();
        match status.code() {
            Code::NOT_FOUND => Self::NotFound(text.trim_end_matches(" not found").to_owned()),
            Code::ALREADY_EXISTS => Self::Exists(text.trim_end_matches(" exists already").to_owned()),
            Code::INVALID_ARGUMENT => Self::Invalid(text),
            Code::FAILED_PRECONDITION => Self::State(text),
            Code::PERMISSION_DENIED => Self::Denied(text),
            Code::UNIMPLEMENTED => Self::Unsupported(text),
            Code::DEADLINE_EXCEEDED => Self::Timeout(format!("the agent does not answer: {text}")),
            _ => Self::Failed(text),
        }
    }
}

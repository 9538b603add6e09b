/// Why a machine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver, or this machine, can't do that.
    #[error("{0} is not supported by this machine")]
    Unsupported(String),
    /// Something that the machine needs is missing or not usable. The text names it and the mend.
    #[error("{0}")]
    Missing(String),
    /// The specification contradicts itself.
    #[error("the machine's specification: {0}")]
    Invalid(String),
    /// The monitor refused or failed.
    #[error("{0}")]
    Monitor(String),
    /// The machine has ended.
    #[error("the machine has ended: {0}")]
    Ended(String),
    /// A call to the host's kernel failed.
    #[error("{step}: {source}")]
    System {
        /// What was being done.
        step: String,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl From<coracle_faults::Injected> for Error {
    fn from(injected: coracle_faults::Injected) -> Self {
        Self::Monitor(injected.to_string())
    }
}

impl Error {
    /// For `map_err`: names the step that failed.
    pub fn system<E: Into<std::io::Error>>(step: impl Into<String>) -> impl FnOnce(E) -> Self {
        let step = step.into();
        move |source| Self::System { step, source: source.into() }
    }
}

use std::io;

/// Why a machine can't be made or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refuses a call.
    #[error("KVM can't {step}: {source}")]
    Kvm {
        /// What was asked.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The kernel refuses something else.
    #[error("can't {step}: {source}")]
    System {
        /// What was asked.
        step: &'static str,
        /// Its answer.
        source: io::Error,
    },
    /// The guest's kernel or RAM disk is not usable.
    #[error("{0}")]
    Image(String),
    /// What was asked for can't be.
    #[error("{0}")]
    Invalid(String),
    /// A device can't be made.
    #[error("the device {device}: {source}")]
    Device {
        /// Which.
        device: &'static str,
        /// Why.
        source: coracle_virtio::device::Broken,
    },
}

impl Error {
    /// For a call of KVM.
    pub(crate) fn kvm(step: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { step, source: io::Error::from_raw_os_error(error.errno()) }
    }

    /// For another call.
    pub(crate) fn system<E: Into<io::Error>>(step: &'static str) -> impl Fn(E) -> Self {
        move |error| Self::System { step, source: error.into() }
    }

    /// Whether what was asked for is at fault, not the host.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::Image(_) | Self::Invalid(_))
    }
}

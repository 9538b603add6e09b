//! The one place where errors get their status codes for containerd.

use containerd_shim_protos::ttrpc::{self, Code};
use coracle_sandbox::Error;

/// containerd tells "not found" from a crash by the code.
pub(crate) fn to_status(error: &Error) -> ttrpc::Error {
    let code = match error {
        Error::NotFound(_) => Code::NOT_FOUND,
        Error::Exists(_) => Code::ALREADY_EXISTS,
        Error::State(_) | Error::Missing(_) => Code::FAILED_PRECONDITION,
        Error::Invalid(_) => Code::INVALID_ARGUMENT,
        Error::Unsupported(_) => Code::UNIMPLEMENTED,
        Error::Denied(_) => Code::PERMISSION_DENIED,
        Error::Timeout(_) => Code::DEADLINE_EXCEEDED,
        Error::Unreachable(_) | Error::Ended(_) | Error::Gone => Code::UNAVAILABLE,
        Error::Failed(_) => Code::INTERNAL,
    };
    status(code, error.to_string())
}

/// Logs a failure and gives it its status.
pub(crate) fn answer<T>(method: &str, result: Result<T, Error>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        log::warn!("{method}: {error}");
        to_status(&error)
    })
}

/// A status with a text.
pub(crate) fn status(code: Code, text: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_code() {
        for (error, expected) in [
            (Error::NotFound("x".into()), Code::NOT_FOUND),
            (Error::Exists("x".into()), Code::ALREADY_EXISTS),
            (Error::State("x".into()), Code::FAILED_PRECONDITION),
            (Error::Invalid("x".into()), Code::INVALID_ARGUMENT),
            (Error::Ended("x".into()), Code::UNAVAILABLE),
            (Error::Unsupported("x".into()), Code::UNIMPLEMENTED),
        ] {
            let ttrpc::Error::RpcStatus(status) = to_status(&error) else { panic!("no status") };
            assert_eq!(status.code(), expected);
            assert!(status.message().contains('x'));
        }
    }
}

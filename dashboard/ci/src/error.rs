//! What can go wrong.

use std::path::PathBuf;

/// Why something could not be done. Texts say what to do about it where there is something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error("the database {}: {source}", path.display())]
    Database {
        /// Its file.
        path: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
    /// A database whose schema this program does not know.
    #[error(
        "the database {} has schema {found}, and this coracle-ci knows up to {known}: it was written by a newer one, which must be used on",
        path.display()
    )]
    Newer {
        /// Its file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The newest that is known.
        known: i64,
    },
    /// A file or folder.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Settings that cannot be used.
    #[error("{}: {reason}", path.display())]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong, with its place.
        reason: String,
    },
    /// What came from a source and is not what it should be.
    #[error("{what}: {reason}")]
    Malformed {
        /// Which file or request.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A server that did not answer, or answered with a status other than success, also when it was asked again.
    #[error("{what}: {reason}")]
    Server {
        /// The request.
        what: String,
        /// The status or the connection's fault.
        reason: String,
    },
    /// The API gives no more answers for now.
    #[error(
        "the API's limit of requests is reached until {until}: what was read so far is stored; collect again then, or use --wait"
    )]
    Limited {
        /// When there are answers again.
        until: String,
    },
    /// Something that was asked for and is not there.
    #[error("there is no {0}")]
    Missing(String),
    /// A query that asks for what there is not.
    #[error("this address asks for what there is not: {0}")]
    Query(String),
    /// An answer could not be written as a page.
    #[error("a page: {0}")]
    Page(#[from] askama::Error),
    /// Something that cannot be listened on.
    #[error("listening on {address}: {source}")]
    Listen {
        /// Where.
        address: String,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Turns an error of a file into one with its name.
pub(crate) fn of(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.into();
    move |source| Error::File { path, source }
}

//! Why settings can't be read.

use std::path::PathBuf;

/// Where something stands in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The file; `$VARIABLE` of an environment variable.
    pub path: PathBuf,
    /// From 1 on.
    pub line: usize,
    /// From 1 on, in characters.
    pub column: usize,
}

impl Position {
    /// That of a byte of a text.
    pub(crate) fn of(path: &std::path::Path, text: &str, byte: usize) -> Self {
        let before = text.get(..byte).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Self { path: path.to_owned(), line, column }
    }
}

impl std::fmt::Display for Position {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// Why settings can't be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read.
    #[error("{path}: {source}", path = .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else could change a file, and with it what protects this host.
    #[error("{path}: {problem}: `chown root {path}; chmod go-w {path}`", path = .path.display())]
    Unsafe {
        /// Which.
        path: PathBuf,
        /// Who could.
        problem: String,
    },
    /// A file is larger than any that somebody has written.
    #[error("{path} has more than {most} bytes", path = .path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// The most.
        most: u64,
    },
    /// A file is no text.
    #[error("{path} is not UTF-8 (byte {byte})", path = .path.display())]
    NoText {
        /// Which.
        path: PathBuf,
        /// The first byte that is wrong.
        byte: usize,
    },
    /// A file is not TOML.
    #[error("{position}: {text}")]
    Syntax {
        /// Where.
        position: Position,
        /// The parser's words.
        text: String,
    },
    /// There is no such setting.
    #[error("{position}: there is no setting {key}; did you mean {nearest}?")]
    Unknown {
        /// Where.
        position: Position,
        /// The key as it stands there.
        key: String,
        /// The nearest that there is.
        nearest: &'static str,
    },
    /// A setting has a value of the wrong type.
    #[error("{position}: {key} must be {expected}")]
    Value {
        /// Where.
        position: Position,
        /// The key.
        key: String,
        /// What it must be.
        expected: &'static str,
    },
    /// Kata's configuration asks for what is not there.
    #[error("{position}: {key}: {text}: the pod would be another one")]
    Kata {
        /// Where.
        position: Position,
        /// Its key.
        key: String,
        /// What.
        text: String,
    },
    /// Settings contradict each other.
    #[error("{0}")]
    Contradiction(String),
    /// A pod asks by an annotation for what it may not have, or what there is not.
    #[error("the annotation {name}: {problem}")]
    Annotation {
        /// Which.
        name: String,
        /// Why not.
        problem: String,
    },
    /// A pod asks by an annotation for what protects it, and is not there.
    #[error("the annotation {name} asks for {what}, which is not supported: the pod would run without")]
    Unprotected {
        /// Which.
        name: String,
        /// What it asks for.
        what: &'static str,
    },
}

//! Images for `coracle run`.
//!
//! ```text
//! oci:DIR ───────────────────────────┐
//! oci-archive:FILE ── archive.rs ────┤                                                        ┌─▶ disk.rs ──▶ store/disks/<digest of a layer>.erofs
//! docker-archive:FILE ── docker.rs ──┼─▶ a manifest, its layers as files ── verified by digest ┴─▶ unpack.rs ─▶ store/<digest>/rootfs
//! HOST/NAME:TAG ── registry.rs ──────┘
//! ```
//!
//! Images are hostile: nothing is read without a bound, nothing is used before its digest is right, and no path or link of
//! a layer leaves the root that it is unpacked into. Everything happens in a folder of the store that only becomes an image
//! once it is whole.

mod archive;
mod catalog;
mod disk;
mod docker;
mod erofs;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod layer;
mod layout;
mod registry;
mod source;
mod store;
mod unpack;
mod verity;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use catalog::Entry;
pub use registry::RegistryOptions;
pub use source::Source;
pub use store::Store;

/// Why an image can't be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The image is malformed, or tries something.
    #[error("the image is refused: {0}")]
    Refused(String),
    /// The image's contents are not what its digest says.
    #[error("the image is refused: {what} has the digest {found}, not {expected}")]
    Digest {
        /// The part.
        what: String,
        /// The digest that it should have.
        expected: String,
        /// The digest that it has.
        found: String,
    },
    /// The image is not made for this machine.
    #[error("the image has nothing for {wanted}; it has {found}")]
    Platform {
        /// What is needed.
        wanted: String,
        /// What there is.
        found: String,
    },
    /// The registry refuses or can't be reached.
    #[error("the registry: {0}")]
    Registry(String),
    /// The image's name is malformed.
    #[error("{0}")]
    Name(String),
}

impl Error {
    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// What the store gives back.
pub type Result<T> = std::result::Result<T, Error>;

/// An image that is ready to run.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of its manifest or configuration, `sha256:…`.
    pub digest: String,
    /// Its root file system. It is shared by all containers and must not be changed.
    pub root: Root,
    /// How it wants to be run.
    pub config: Config,
}

/// What an image's root file system is kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A folder.
    Folder,
    /// Disks for a machine.
    Disks,
}

/// An image's root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// A folder.
    Folder(PathBuf),
    /// Disks, the lowest layer first, each of which overlays those before it.
    Disks(Vec<Disk>),
}

/// A layer, or several, as a disk: an EROFS file system, and behind it the tree of its hashes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// Its hashes.
    pub verity: Verity,
}

/// How a disk's blocks are verified (Linux: Documentation/admin-guide/device-mapper/verity.rst): format 1, SHA-256 without a salt,
/// blocks of 4096 bytes, superblock and tree behind the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verity {
    /// Blocks of data.
    pub blocks: u32,
    /// The hash that all others lead to, in hexadecimal digits.
    pub root_hash: String,
}

impl Verity {
    /// Where superblock and tree begin, in bytes.
    #[must_use]
    pub fn hash_offset(&self) -> u64 {
        u64::from(self.blocks) * 4096
    }
}

/// How an image wants to be run (OCI image-spec, config.md, `config`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Config {
    /// The user, as for `docker run --user`.
    #[serde(deserialize_with = "null_is_default")]
    pub user: String,
    /// Variables, `NAME=VALUE`.
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    /// The first words of the command.
    #[serde(deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    /// The words after them, which the user may replace.
    #[serde(deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    /// The working directory.
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
    /// The signal that asks the command to end.
    #[serde(deserialize_with = "null_is_default")]
    pub stop_signal: String,
}

/// Docker writes `null` where the specification has nothing.
fn null_is_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(
    deserializer: D,
) -> std::result::Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

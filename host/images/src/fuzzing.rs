//! Layers for fuzzing: an archive is read as one whose digest is right.

use std::path::Path;

use crate::{Result, erofs, unpack};

/// Unpacks an archive into a folder.
///
/// # Errors
/// What it is refused for.
pub fn unpack(archive: &[u8], root: &Path) -> Result<()> {
    unpack::apply(archive, root)
}

/// Makes a disk of an archive, in whose folder is room for what has to wait.
///
/// # Errors
/// What it is refused for.
pub fn disk(mut archive: &[u8], path: &Path) -> Result<()> {
    erofs::of_archive(&mut archive, path)
}

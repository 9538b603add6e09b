//! EROFS images of layers, made without root and without a mount: a layer's archive is read once, the contents of its files go
//! straight into the image, and the tree, which is kept in memory, comes behind them.
//!
//! ```text
//! block 0: superblock │ contents of files │ blocks of large folders │ inodes, with what is left of small files and folders
//! ```
//!
//! The format is Linux' (fs/erofs/erofs_fs.h, Documentation/filesystems/erofs.rst), uncompressed, so that every kernel since
//! 5.10 reads it. The same layers make the same bytes.

mod tree;
mod write;

use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::layout::Layer;
use crate::{Error, Result, layer};

pub(crate) use tree::Stands;
use tree::Tree;
use write::Contents;

/// The size of a block in bytes.
pub(crate) const BLOCK: usize = 4096;

/// Where the parts of a disk made here lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// The file system's size in blocks.
    pub(crate) blocks: u32,
}

/// Writes `layers`, the lowest first, as one file system at `path`, in whose folder is room for what has to wait. Where nothing lies
/// below them (`is_lowest`), what a layer hides is gone; else it is marked for overlayfs.
///
/// Gives whether the layers can lie on others as an overlay. Where they can't, what was written is of no use.
///
/// # Errors
/// [`Error`]; what was written is of no use then, either.
pub(crate) fn write(layers: &[Layer], is_lowest: bool, path: &Path) -> Result<(Size, Stands)> {
    let failed = Error::file(path);
    let folder = path.parent().unwrap_or(Path::new("."));
    let contents = std::fs::File::create(path).and_then(|file| Contents::new(file, folder));
    let mut tree = Tree::new(contents.map_err(failed)?, is_lowest);
    for one in layers {
        layer::read(one, |reader| tree.apply(reader))?;
    }
    let stands = tree.stands();
    let size = write::finish(tree).map_err(Error::file(path))?;
    Ok((size, stands))
}

/// The same of one archive that was not verified.
#[cfg(feature = "fuzzing")]
pub(crate) fn of_archive(archive: &mut dyn Read, path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let contents = std::fs::File::create(path).and_then(|file| Contents::new(file, folder));
    let mut tree = Tree::new(contents.map_err(Error::file(path))?, true);
    tree.apply(archive)?;
    write::finish(tree).map(drop).map_err(Error::file(path))
}

/// Copies `count` bytes or all there are.
fn copy(from: &mut impl Read, to: &mut (impl Write + Seek), count: u64) -> std::io::Result<u64> {
    std::io::copy(&mut from.take(count), to)
}

#[cfg(test)]
mod tests;

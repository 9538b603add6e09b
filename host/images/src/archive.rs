//! Tar archives of images: taken apart into a folder, by names that can be nothing but names.

use std::fs::File;
use std::path::{Component, Path};

use crate::{Error, Result};

/// Writes the regular files of the archive into `folder`, and refuses any name that is not a plain path below it.
pub(crate) fn extract(archive: &Path, folder: &Path) -> Result<()> {
    let file = File::open(archive).map_err(Error::file(archive))?;
    let mut archive_reader = tar::Archive::new(file);
    let broken = |error: std::io::Error| Error::Refused(format!("{}: {error}", archive.display()));
    for entry in archive_reader.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = entry.path().map_err(broken)?.into_owned();
        let plain: Vec<_> = name.components().filter(|part| *part != Component::CurDir).collect();
        if plain.is_empty() || plain.iter().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(Error::Refused(format!("the archive holds the path {}", name.display())));
        }
        let target = folder.join(plain.iter().collect::<std::path::PathBuf>());
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(Error::file(parent))?;
        }
        let mut out = File::create(&target).map_err(Error::file(&target))?;
        std::io::copy(&mut entry, &mut out).map_err(broken)?;
    }
    Ok(())
}

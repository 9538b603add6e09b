//! The store: one folder an image, named by its digest, each whole or not there; or disks, named by what they hold.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use crate::layout::{Parts, hex_of};
use crate::{
    Entry, Error, Form, Image, RegistryOptions, Result, Root, Source, archive, catalog, disk, docker, layout, registry,
    unpack,
};

/// How names of folders begin in which an image is being made.
const WORK: &str = "tmp-";

/// Locks a file or folder, until what this gives is dropped.
fn lock(path: &Path, how: FlockOperation) -> Result<File> {
    let file = File::open(path).map_err(Error::file(path))?;
    flock(&file, how).map_err(|error| Error::file(path)(error.into()))?;
    Ok(file)
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The store at `folder`, which is made where it is missing.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn open(folder: &Path) -> Result<Self> {
        // Files of images may be setuid, or devices: nobody but root looks in here.
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(Error::file(folder))?;
        Ok(Self { folder: folder.to_owned() })
    }

    /// The image at `source` for `platform` (`os/architecture`), its root kept as `form` says, unpacked if it is not there yet.
    /// `progress` is told what takes time.
    ///
    /// # Errors
    /// [`Error`]; nothing is left of an image that was refused.
    pub async fn get(
        &self,
        source: &Source,
        platform: &str,
        form: Form,
        options: &RegistryOptions,
        progress: &(dyn Fn(&str) + Sync),
    ) -> Result<Image> {
        // Alone, so that nobody takes a folder for left behind which somebody is about to hold.
        let alone = lock(&self.folder, FlockOperation::LockExclusive)?;
        self.sweep();
        let work = tempfile::Builder::new().prefix(WORK).tempdir_in(&self.folder).map_err(Error::file(&self.folder))?;
        // Held for as long as somebody works there.
        let _held = lock(work.path(), FlockOperation::LockExclusive)?;
        drop(alone);
        let parts = match source {
            Source::OciLayout(folder, tag) => layout::open(folder, platform, tag.as_deref())?,
            Source::OciArchive(file) => {
                archive::extract(file, work.path())?;
                layout::open(work.path(), platform, None)?
            }
            Source::DockerArchive(file) => {
                archive::extract(file, work.path())?;
                docker::open(work.path(), platform)?
            }
            Source::Registry(name) => {
                progress(&format!("fetching {name}"));
                registry::fetch(name, platform, options, work.path()).await?;
                layout::open(work.path(), platform, None)?
            }
        };
        // One at a time makes an image; who comes second finds it.
        let path = self.folder.join("lock");
        File::create(&path).map_err(Error::file(&path))?;
        let lock = lock(&path, FlockOperation::LockExclusive)?;
        let root = match form {
            Form::Folder => Root::Folder(self.folder(&parts, work.path(), &lock, progress)?),
            Form::Disks => Root::Disks(disk::disks(
                &self.folder.join("disks").join(disk::FORM),
                &parts.layers,
                work.path(),
                progress,
            )?),
        };
        let image = Image { digest: parts.digest, root, config: parts.config };
        catalog::note(&self.folder, &source.to_string(), platform, &image)?;
        Ok(image)
    }

    /// The images that were asked for, and are there.
    #[must_use]
    pub fn all(&self) -> Vec<Entry> {
        catalog::all(&self.folder)
    }

    /// Removes what others have left half done: nobody holds it any more.
    fn sweep(&self) {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for path in
            entries.filter(|entry| entry.file_name().as_bytes().starts_with(WORK.as_bytes())).map(|entry| entry.path())
        {
            if lock(&path, FlockOperation::NonBlockingLockExclusive).is_ok() {
                // What can't be removed is in nobody's way.
                let _ = std::fs::remove_dir_all(&path);
            }
        }
    }

    /// The image as a folder.
    fn folder(&self, parts: &Parts, work: &Path, lock: &File, progress: &(dyn Fn(&str) + Sync)) -> Result<PathBuf> {
        let target = self.folder.join(hex_of(&parts.digest)?);
        let found = target.join("rootfs");
        if target.is_dir() {
            return Ok(found);
        }
        let making = work.join("image");
        let rootfs = making.join("rootfs");
        std::fs::create_dir_all(&rootfs).map_err(Error::file(&rootfs))?;
        for (number, layer) in parts.layers.iter().enumerate() {
            progress(&format!("unpacking layer {} of {}", number + 1, parts.layers.len()));
            unpack::layer(layer, &rootfs)?;
        }
        rustix::fs::syncfs(lock).map_err(|error| Error::file(&self.folder)(error.into()))?;
        std::fs::rename(&making, &target).map_err(Error::file(&target))?;
        Ok(found)
    }
}

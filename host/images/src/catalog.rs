//! What images the store has, by the names under which they were asked for: a file each, which says what the store keeps for it.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{Error, Image, Result, Root};

/// The folder of the store that these files are in.
const FOLDER: &str = "names";

/// An image that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// As it was named.
    pub name: String,
    /// `os/architecture`.
    pub platform: String,
    /// See [`Image::digest`].
    pub digest: String,
    /// What the store keeps for it.
    pub root: Root,
    /// When it was asked for last, in seconds since 1970.
    pub used: u64,
}

impl Entry {
    /// Bytes that its disks take, which other images may share; none of one that is a folder.
    #[must_use]
    pub fn disk_bytes(&self) -> Option<u64> {
        let Root::Disks(disks) = &self.root else { return None };
        Some(disks.iter().filter_map(|disk| std::fs::metadata(&disk.path).ok()).map(|file| file.len()).sum())
    }

    /// Whether the store still has it.
    #[must_use]
    pub fn is_there(&self) -> bool {
        match &self.root {
            Root::Folder(folder) => folder.is_dir(),
            Root::Disks(disks) => disks.iter().all(|disk| disk.path.exists()),
        }
    }
}

/// Notes that an image was asked for by this name.
pub(crate) fn note(store: &Path, name: &str, platform: &str, image: &Image) -> Result<()> {
    let folder = store.join(FOLDER);
    std::fs::create_dir_all(&folder).map_err(Error::file(&folder))?;
    let used = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let entry = Entry {
        name: name.to_owned(),
        platform: platform.to_owned(),
        digest: image.digest.clone(),
        root: image.root.clone(),
        used,
    };
    // A name may hold anything; a file's may not.
    let file = folder.join(hex::encode(Sha256::digest(format!("{name}\n{platform}"))));
    let beside = folder.join(format!("new-{}", std::process::id()));
    let text = serde_json::to_vec(&entry).map_err(|error| Error::file(&file)(error.into()))?;
    std::fs::write(&beside, text).and_then(|()| std::fs::rename(&beside, &file)).map_err(Error::file(&file))
}

/// All of them that the store still has, by name.
pub(crate) fn all(store: &Path) -> Vec<Entry> {
    let files = std::fs::read_dir(store.join(FOLDER)).into_iter().flatten().flatten();
    let read = |path: PathBuf| serde_json::from_slice::<Entry>(&std::fs::read(path).ok()?).ok();
    let mut all: Vec<_> = files.filter_map(|file| read(file.path())).filter(Entry::is_there).collect();
    all.sort_by(|one, other| (&one.name, &one.platform).cmp(&(&other.name, &other.platform)));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;

    #[test]
    fn what_was_asked_for_is_known_until_it_is_gone() {
        let store = tempfile::tempdir().unwrap();
        let root = store.path().join("rootfs");
        std::fs::create_dir(&root).unwrap();
        let image =
            |digest: &str| Image { digest: digest.into(), root: Root::Folder(root.clone()), config: Config::default() };
        note(store.path(), "b/../c", "linux/amd64", &image("sha256:1")).unwrap();
        note(store.path(), "a", "linux/amd64", &image("sha256:2")).unwrap();
        note(store.path(), "a", "linux/amd64", &image("sha256:3")).unwrap();
        let found: Vec<_> = all(store.path()).into_iter().map(|entry| (entry.name, entry.digest)).collect();
        assert_eq!(found, [("a".to_owned(), "sha256:3".to_owned()), ("b/../c".to_owned(), "sha256:1".to_owned())]);
        std::fs::remove_dir(&root).unwrap();
        assert_eq!(all(store.path()), []);
    }
}

//! A container on disk: a folder that is its OCI bundle, with a record, its writable layer and its output.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

/// The folder for images and containers.
#[derive(Debug, Clone)]
pub(crate) struct Root(PathBuf);

/// What is known of a container whether it runs or not: `container.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) command: Vec<String>,
    /// Seconds since 1970.
    pub(crate) created: u64,
    pub(crate) terminal: bool,
    pub(crate) detached: bool,
    pub(crate) remove: bool,
    pub(crate) stop_signal: String,
    /// What runs the machine's instructions.
    pub(crate) accelerator: String,
    /// The image's root file system.
    pub(crate) root: coracle_images::Root,
    /// Settings for the shim that count more than the file's.
    pub(crate) overrides: String,
    /// The network that it is part of, or is to be.
    #[serde(default)]
    pub(crate) network: Option<coracle_cni::Attachment>,
    /// Ports of the host that the container's monitor, or its helper, serves for it where its network is the user's.
    #[serde(default)]
    pub(crate) ports: Vec<coracle_cni::Port>,
    /// The shim's address while there is one.
    pub(crate) address: Option<String>,
    /// The exit code once it has ended.
    pub(crate) exit: Option<u32>,
}

impl Record {
    /// The ports of the host that lead to the container, or are to. Those of the user's network end with the container, those of
    /// others when the network is taken down.
    pub(crate) fn published(&self) -> impl Iterator<Item = &coracle_cni::Port> {
        let own = self.ports.iter().filter(|_| self.exit.is_none());
        self.network.iter().flat_map(|network| &network.ports).chain(own)
    }
}

/// A container's folder.
#[derive(Debug, Clone)]
pub(crate) struct Folder(PathBuf);

impl Root {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    fn containers(&self) -> PathBuf {
        self.0.join("containers")
    }

    /// Makes the folder of a new container, whose name no other one has.
    pub(crate) fn create(&self, name: &str) -> Result<Folder> {
        if !is_name(name) {
            bail!("{name:?} is no container name: letters, digits, dots, dashes and underscores, at most 64");
        }
        let folder = self.containers().join(name);
        self.make_containers()?;
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => Ok(Folder(folder)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                bail!("there is a container {name} already: give another --name, or remove it with `coracle rm {name}`")
            }
            Err(error) => Err(error).with_context(|| format!("make {}", folder.display())),
        }
    }

    fn make_containers(&self) -> Result<()> {
        let made = std::fs::DirBuilder::new().mode(0o700).recursive(true).create(self.containers());
        made.with_context(|| format!("make {}", self.containers().display()))
    }

    /// Waits until nobody else is between looking what containers have and noting what a new one is to have, and lets nobody be
    /// there for as long as what it gives lives.
    pub(crate) fn turn(&self) -> Result<Lock> {
        self.make_containers()?;
        let folder = std::fs::File::open(self.containers());
        let folder = folder.with_context(|| format!("open {}", self.containers().display()))?;
        rustix::fs::flock(&folder, FlockOperation::LockExclusive)
            .with_context(|| format!("lock {}", self.containers().display()))?;
        Ok(Lock { _folder: folder })
    }

    /// The container of this name, or whose id begins with it.
    pub(crate) fn find(&self, name: &str) -> Result<(Folder, Record)> {
        let all = self.all()?;
        let exact = all.iter().find(|(_, record)| record.name == name || record.id == name);
        let mut by_start = all.iter().filter(|(_, record)| !name.is_empty() && record.id.starts_with(name));
        match (exact, by_start.next(), by_start.next()) {
            (Some(found), _, _) | (None, Some(found), None) => Ok(found.clone()),
            (None, Some(_), Some(_)) => bail!("{name} is the beginning of more than one container's id"),
            (None, None, _) => bail!("there is no container {name}; `coracle ps --all` lists them"),
        }
    }

    /// All containers, oldest first.
    pub(crate) fn all(&self) -> Result<Vec<(Folder, Record)>> {
        let mut all = Vec::new();
        let entries = match std::fs::read_dir(self.containers()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(all),
            Err(error) => return Err(error).with_context(|| format!("list {}", self.containers().display())),
        };
        for entry in entries.flatten() {
            let folder = Folder(entry.path());
            // One that is being made has no record yet.
            if let Ok(record) = folder.read() {
                all.push((folder, record));
            }
        }
        all.sort_by_key(|(_, record)| record.created);
        Ok(all)
    }
}

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn read(&self) -> Result<Record> {
        let path = self.join("container.json");
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("read {}", path.display()))
    }

    /// Replaces the record; a reader sees the old or the new one.
    pub(crate) fn write(&self, record: &Record) -> Result<()> {
        // Two processes may write at once, each to a file of its own; the last one's stays.
        let path = self.join("container.json");
        let beside = self.join(&format!("container.json.{}", std::process::id()));
        std::fs::write(&beside, serde_json::to_vec_pretty(record)?)
            .with_context(|| format!("write {}", beside.display()))?;
        std::fs::rename(&beside, &path).with_context(|| format!("write {}", path.display()))
    }

    /// Waits until nobody else cleans up after the container `id`, and gives its record as it is then. `None` where there is nothing
    /// left of it: the folder has gone, or is another container's of the same name.
    pub(crate) async fn lock(&self, id: &str) -> Result<Option<(Lock, Record)>> {
        let path = self.0.clone();
        let locked = tokio::task::spawn_blocking(move || match std::fs::File::open(&path) {
            Ok(folder) => rustix::fs::flock(&folder, FlockOperation::LockExclusive).map(|()| Some(folder)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO)),
        });
        let locked = locked.await?.with_context(|| format!("lock {}", self.0.display()))?;
        let Some(folder) = locked else { return Ok(None) };
        let record = self.read().ok().filter(|record| record.id == id);
        Ok(record.map(|record| (Lock { _folder: folder }, record)))
    }

    /// Removes it. Who holds its lock is alone with it.
    pub(crate) fn remove(&self, _lock: &Lock) -> Result<()> {
        self.clear()
    }

    /// Removes that of the container `id`, unless it is gone, or something of its network is not: then it stays for `coracle rm`.
    pub(crate) async fn discard(&self, id: &str) -> Result<()> {
        match self.lock(id).await? {
            Some((lock, record)) if record.network.is_none() => self.remove(&lock),
            _ => Ok(()),
        }
    }

    /// Removes that of a container that has never been known to anybody.
    pub(crate) fn clear(&self) -> Result<()> {
        // The container's own process may be writing its last word while this removes: then once more.
        for _ in 0..16 {
            match std::fs::remove_dir_all(&self.0) {
                Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {}
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("remove {}", self.0.display()));
                }
                _ => return Ok(()),
            }
        }
        bail!("{} fills again while it is removed", self.0.display())
    }
}

/// The right to do something alone; see [`Folder::lock`] and [`Root::turn`].
#[derive(Debug)]
pub(crate) struct Lock {
    _folder: std::fs::File,
}

/// A fresh container id: 12 hexadecimal digits.
pub(crate) fn new_id() -> Result<String> {
    let mut bytes = [0; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).context("get randomness")?;
    Ok(hex::encode(bytes))
}

fn is_name(name: &str) -> bool {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    first && name.len() <= 64 && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names() {
        for good in ["a", "web-1.x_y"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "-a", "a b", &"a".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_name_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::new(folder.path().into());
        root.create("a").unwrap();
        assert!(root.create("a").unwrap_err().to_string().contains("coracle rm a"));
        assert!(root.find("a").unwrap_err().to_string().contains("no container a"));
    }
}

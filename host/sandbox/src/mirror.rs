//! Folders of the host's that the guest has a copy of, which follows them: what Kubernetes writes as a whole (ConfigMaps, Secrets and
//! what is projected of them). Its atomic writer makes a new folder, then turns the link `..data` to it: the copy does the same, in
//! that order, so that a program in the guest sees it whole, and hears of it by inotify.

use std::collections::HashMap;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use coracle_protocol::agent::CopyFileRequest;
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_protocol::paths::DATA;
use coracle_storage::Mirror;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::task::{AbortHandle, spawn_blocking};

use crate::agent::Patience;
use crate::pod::Pod;
use crate::{Error, Result, copy};

/// The most entries of a folder, and the most bytes of its files: several times what Kubernetes allows, and no more than a guest of
/// the default size has room for.
const ENTRIES_MAX: usize = 20_000;
const BYTES_MAX: u64 = 64 << 20;

/// The folders that are followed, by their paths, until this is dropped: that is with the pod.
#[derive(Debug, Default)]
pub(crate) struct Mirrors(Mutex<HashMap<PathBuf, Follower>>);

#[derive(Debug)]
struct Follower(AbortHandle);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sees to it that the guest has these, as they are now at least.
///
/// # Errors
/// Where one can't be read, or the guest does not take it.
pub(crate) async fn follow(pod: &Arc<Pod>, mirrors: &[Mirror]) -> Result<()> {
    for mirror in mirrors {
        let mut followed = pod.mirrors.0.lock().await;
        if followed.contains_key(&mirror.source) {
            continue;
        }
        let failed = |error: std::io::Error| Error::Failed(format!("watch {}: {error}", mirror.source.display()));
        // Watched before it is read.
        let changes = changes(&mirror.source).map_err(failed)?;
        let shown = update(pod, mirror, None).await?;
        let task = tokio::spawn(keep_up(Arc::downgrade(pod), mirror.clone(), shown, changes));
        followed.insert(mirror.source.clone(), Follower(task.abort_handle()));
    }
    Ok(())
}

/// What tells of changes of a folder's own entries.
fn changes(folder: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let flags = WatchFlags::MOVED_TO | WatchFlags::CREATE | WatchFlags::DELETE_SELF | WatchFlags::ONLYDIR;
    inotify::add_watch(&watch, folder, flags)?;
    coracle_process::watched(watch, Interest::READABLE)
}

/// After how long what could not be copied is tried again, where nothing changes meanwhile.
const RETRY: Duration = Duration::from_secs(5);

async fn keep_up(pod: Weak<Pod>, mirror: Mirror, mut shown: Shown, changes: AsyncFd<OwnedFd>) {
    let mut has_failed = false;
    loop {
        let wait = if has_failed { RETRY } else { Duration::MAX };
        if let Ok(ready) = tokio::time::timeout(wait, changes.readable()).await {
            let Ok(mut ready) = ready else { return };
            // Which ones they were does not matter.
            let mut bytes = [0; 4096];
            while let Ok(1..) = rustix::io::read(changes.get_ref(), &mut bytes) {}
            ready.clear_ready();
        }
        let Some(pod) = pod.upgrade() else { return };
        match update(&pod, &mirror, Some(&shown)).await {
            Ok(now) => (shown, has_failed) = (now, false),
            // Kubelet has removed it.
            Err(_) if !mirror.source.exists() => return,
            Err(error) => {
                log::warn!("the guest does not have {} as it is: {error}", mirror.source.display());
                has_failed = true;
            }
        }
    }
}

/// Copies what the folder shows, unless that is what `before` says; what it shows now.
async fn update(pod: &Pod, mirror: &Mirror, before: Option<&Shown>) -> Result<Shown> {
    loop {
        let now = Shown::of(&mirror.source)?;
        if Some(&now) == before {
            return Ok(now);
        }
        match copy_all(pod, mirror, &now).await {
            Ok(()) => return Ok(now),
            // It was changed while it was read.
            Err(_) if Shown::of(&mirror.source)? != now => {}
            Err(error) => return Err(error),
        }
    }
}

/// What a folder shows: the one that the link `..data` names, and by which names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    data: OsString,
    names: Vec<OsString>,
}

impl Shown {
    fn of(source: &Path) -> Result<Self> {
        let link = source.join(DATA);
        let target = std::fs::read_link(&link).map_err(failed(&link))?;
        let mut parts = target.components();
        let (Some(std::path::Component::Normal(data)), None) = (parts.next(), parts.next()) else {
            return Err(Error::Invalid(format!("{} leads out of its folder", link.display())));
        };
        let mut names = names(source)?;
        // The writer makes nothing but links there.
        names.retain(|name| {
            let is_link = || std::fs::symlink_metadata(source.join(name)).is_ok_and(|found| found.is_symlink());
            !name.as_bytes().starts_with(b"..") && is_link()
        });
        names.sort();
        Ok(Self { data: data.to_owned(), names })
    }
}

async fn copy_all(pod: &Pod, mirror: &Mirror, shown: &Shown) -> Result<()> {
    let (source, wanted) = (mirror.source.clone(), shown.clone());
    let list = spawn_blocking(move || list(&source, &wanted));
    for entry in list.await.map_err(|error| Error::Failed(error.to_string()))?? {
        let (path, target) = (mirror.source.join(&entry.path), guest_path(mirror, &entry.path)?);
        // Where it leads is what was copied, and not what it has been turned to since.
        let data = (entry.path == Path::new(DATA)).then(|| shown.data.clone());
        let requests = spawn_blocking(move || entry.requests(&path, &target, data));
        for request in requests.await.map_err(|error| Error::Failed(error.to_string()))?? {
            let call = async |agent: &AgentServiceClient, ctx| agent.copy_file(ctx, &request).await;
            pod.agent.call("CopyFile", Patience::Bounded, call).await?;
        }
    }
    Ok(())
}

fn guest_path(mirror: &Mirror, path: &Path) -> Result<String> {
    let path = path.to_str().ok_or_else(|| Error::Invalid(format!("{} is no text", path.display())))?;
    Ok(if path.is_empty() { mirror.target.clone() } else { format!("{}/{path}", mirror.target) })
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.display().to_string();
    move |error| Error::Failed(format!("copy {path} to the guest: {error}"))
}

/// A file, folder or link, by its path below the folder that is followed.
struct Entry {
    path: PathBuf,
    metadata: std::fs::Metadata,
}

impl Entry {
    fn of(source: &Path, path: &Path) -> Result<Self> {
        let whole = source.join(path);
        let metadata = std::fs::symlink_metadata(&whole).map_err(failed(&whole))?;
        Ok(Self { path: path.to_owned(), metadata })
    }

    /// The calls that make it in the guest; a link leads to `to` where that is given.
    fn requests(&self, path: &Path, target: &str, to: Option<OsString>) -> Result<Vec<CopyFileRequest>> {
        let (user, group) = (self.metadata.uid().cast_signed(), self.metadata.gid().cast_signed());
        if self.metadata.is_file() {
            let mut pieces = copy::pieces(path, target)?;
            for piece in &mut pieces {
                (piece.uid, piece.gid) = (user, group);
            }
            return Ok(pieces);
        }
        let data = match to {
            Some(to) => to.as_bytes().to_vec(),
            None if self.metadata.is_symlink() => {
                std::fs::read_link(path).map_err(failed(path))?.as_os_str().as_bytes().to_vec()
            }
            None => Vec::new(),
        };
        let file_mode = self.metadata.mode();
        let request =
            CopyFileRequest { path: target.into(), file_mode, uid: user, gid: group, data, ..Default::default() };
        Ok(vec![request])
    }
}

/// All that makes up what the folder shows, in the order in which it has to be made.
fn list(source: &Path, shown: &Shown) -> Result<Vec<Entry>> {
    let mut all = vec![Entry::of(source, Path::new(""))?];
    let mut bytes = 0_u64;
    let mut folders = vec![PathBuf::from(&shown.data)];
    while let Some(folder) = folders.pop() {
        all.push(Entry::of(source, &folder)?);
        for name in names(&source.join(&folder))? {
            let entry = Entry::of(source, &folder.join(name))?;
            if entry.metadata.is_dir() {
                folders.push(entry.path);
                continue;
            }
            bytes = bytes.saturating_add(entry.metadata.len());
            all.push(entry);
            if all.len() + folders.len() > ENTRIES_MAX || bytes > BYTES_MAX {
                return Err(Error::Invalid(format!(
                    "the volume {} has more than {ENTRIES_MAX} entries or {BYTES_MAX} bytes, and can't be copied to a guest",
                    source.display()
                )));
            }
        }
    }
    // What leads to the data comes behind it.
    all.push(Entry::of(source, Path::new(DATA))?);
    for name in &shown.names {
        all.push(Entry::of(source, Path::new(name))?);
    }
    Ok(all)
}

fn names(folder: &Path) -> Result<Vec<OsString>> {
    let entries = std::fs::read_dir(folder).map_err(failed(folder))?;
    entries.map(|entry| entry.map(|entry| entry.file_name()).map_err(failed(folder))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_link_comes_behind_what_it_leads_to() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        std::fs::create_dir_all(at("..new/deep")).unwrap();
        std::fs::create_dir_all(at("..old")).unwrap();
        std::fs::write(at("..new/key"), "value").unwrap();
        std::fs::write(at("..new/deep/key"), "value").unwrap();
        std::fs::write(at("..old/key"), "before").unwrap();
        for (target, link) in [("..new", DATA), ("..data/key", "key"), ("..data/deep", "deep")] {
            std::os::unix::fs::symlink(target, at(link)).unwrap();
        }
        let shown = Shown::of(folder.path()).unwrap();
        assert_eq!(shown.names, ["deep", "key"]);
        let all: Vec<String> =
            list(folder.path(), &shown).unwrap().iter().map(|entry| entry.path.display().to_string()).collect();
        let place = |path: &str| all.iter().position(|found| found == path);
        assert_eq!(all.first().map(String::as_str), Some(""));
        assert!(place("..new") < place("..new/key") && place("..new/deep") < place("..new/deep/key"), "{all:?}");
        assert!(place("..new/deep/key") < place(DATA) && place(DATA) < place("key"), "{all:?}");
        assert!(place("..old").is_none() && place("deep").is_some(), "{all:?}");
    }

    #[test]
    fn what_is_too_large_or_leads_out_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |path: &str| folder.path().join(path);
        std::fs::create_dir(at("..big")).unwrap();
        std::fs::File::create(at("..big/f")).unwrap().set_len(BYTES_MAX + 1).unwrap();
        let big = Shown { data: "..big".into(), names: Vec::new() };
        let error = list(folder.path(), &big).err().unwrap().to_string();
        assert!(error.contains("can't be copied"), "{error}");
        for target in ["../elsewhere", "/etc", "a/b"] {
            let _ = std::fs::remove_file(at(DATA));
            std::os::unix::fs::symlink(target, at(DATA)).unwrap();
            assert!(matches!(Shown::of(folder.path()), Err(Error::Invalid(_))), "{target}");
        }
    }
}

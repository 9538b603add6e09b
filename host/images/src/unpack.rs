//! Layers: tar archives (image-spec, layer.md) applied to a root.
//!
//! Every path is resolved inside the root by the kernel (`openat2`, `RESOLVE_IN_ROOT`), so a link that an earlier entry has
//! made leads nowhere else. Names with `..` are refused outright.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::EntryType;

use crate::layer::{self, broken};
use crate::layout::Layer;
use crate::{Error, Result};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Applies a layer to `root`, and verifies both of its digests to the last byte.
pub(crate) fn layer(layer: &Layer, root: &Path) -> Result<()> {
    layer::read(layer, |reader| apply(reader, root))
}

pub(crate) fn apply(reader: impl Read, root: &Path) -> Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(root, flags, Mode::empty()).map_err(|error| Error::file(root)(error.into()))?;
    let mut target = Target { root: fd, made: HashSet::new() };
    let mut archive = tar::Archive::new(reader);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let path = PathBuf::from(OsStr::from_bytes(&entry.path_bytes()));
        target.entry(&path, &mut entry).map_err(|error| match error {
            Failure::Refused(text) => Error::Refused(format!("{}: {text}", path.display())),
            Failure::System(source) => Error::File { path: path.clone(), source },
        })?;
    }
    Ok(())
}

enum Failure {
    Refused(String),
    System(std::io::Error),
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::System(error)
    }
}

impl From<Errno> for Failure {
    fn from(error: Errno) -> Self {
        Self::System(error.into())
    }
}

struct Target {
    root: OwnedFd,
    /// Paths that this layer has made: an opaque mark spares them.
    made: HashSet<PathBuf>,
}

/// A plain relative path without `..`; empty for the root itself.
fn plain(path: &Path) -> std::result::Result<PathBuf, Failure> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(Failure::Refused("it leaves the image's root".into()));
            }
        }
    }
    Ok(plain)
}

impl Target {
    fn open(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(&self.root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// The folder `path`, made where parts of it are missing.
    fn folder(&self, path: &Path) -> std::result::Result<OwnedFd, Failure> {
        let directory = OFlags::PATH | OFlags::DIRECTORY;
        match self.open(path, directory) {
            Err(Errno::NOENT) => {}
            other => return Ok(other?),
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Failure::Refused("it has no folder".into()));
        };
        let parent = self.folder(parent)?;
        rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
        Ok(self.open(path, directory)?)
    }

    fn entry(&mut self, path: &Path, entry: &mut tar::Entry<'_, impl Read>) -> std::result::Result<(), Failure> {
        let path = plain(path)?;
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            // The root itself: its mode and owner.
            let root = self.open(Path::new("."), OFlags::RDONLY | OFlags::DIRECTORY)?;
            return set_metadata(&root, entry);
        };
        let parent_path = path.parent().unwrap_or(Path::new("")).to_owned();
        let parent = self.folder(&parent_path)?;
        if name.as_bytes() == OPAQUE {
            return self.clear(&parent, &parent_path);
        }
        if let Some(hidden) = name.as_bytes().strip_prefix(WHITEOUT) {
            let hidden = OsStr::from_bytes(hidden);
            if hidden.is_empty() || hidden == "." || hidden == ".." {
                return Err(Failure::Refused("it hides no name".into()));
            }
            return remove(&parent, hidden);
        }
        self.made.insert(path);
        self.make(&parent, &name, entry)
    }

    fn make(
        &self,
        parent: &OwnedFd,
        name: &OsStr,
        entry: &mut tar::Entry<'_, impl Read>,
    ) -> std::result::Result<(), Failure> {
        let kind = entry.header().entry_type();
        if kind == EntryType::Directory {
            match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => {}
                Err(Errno::EXIST) => {
                    let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                        remove(parent, name)?;
                        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))?;
                    }
                }
                Err(error) => return Err(error.into()),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            return set_metadata(&rustix::fs::openat(parent, name, flags, Mode::empty())?, entry);
        }
        // Whatever was there makes way, and is not followed.
        remove(parent, name)?;
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut file = File::from(rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))?);
                std::io::copy(entry, &mut file)?;
                set_metadata(&file.into(), entry)
            }
            EntryType::Symlink => {
                let target = link_name(entry)?;
                rustix::fs::symlinkat(target.as_path(), parent, name)?;
                let (uid, gid) = owner(entry)?;
                Ok(rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
            }
            EntryType::Link => {
                let target = plain(&link_name(entry)?)?;
                let folder = self.open(target.parent().unwrap_or(Path::new("")), OFlags::PATH | OFlags::DIRECTORY)?;
                let old = target.file_name().ok_or_else(|| Failure::Refused("it links to the root".into()))?;
                Ok(rustix::fs::linkat(&folder, old, parent, name, AtFlags::empty())?)
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => make_node(parent, name, kind, entry),
            // Headers that the library has taken in already, and kinds that no image needs.
            EntryType::XGlobalHeader => Ok(()),
            other => Err(Failure::Refused(format!("it is of the unknown kind {other:?}"))),
        }
    }

    /// Removes what lower layers have put into a folder.
    fn clear(&self, folder: &OwnedFd, path: &Path) -> std::result::Result<(), Failure> {
        for name in names(folder)? {
            let inner = path.join(&name);
            if !self.made.iter().any(|made| made.starts_with(&inner)) {
                remove(folder, &name)?;
            }
        }
        Ok(())
    }
}

fn make_node(
    parent: &OwnedFd,
    name: &OsStr,
    kind: EntryType,
    entry: &mut tar::Entry<'_, impl Read>,
) -> std::result::Result<(), Failure> {
    let header = entry.header();
    let kind = match kind {
        EntryType::Fifo => FileType::Fifo,
        EntryType::Block => FileType::BlockDevice,
        _ => FileType::CharacterDevice,
    };
    let number = (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
    let mode = Mode::from_raw_mode(header.mode()? & 0o7777);
    rustix::fs::mknodat(parent, name, kind, mode, rustix::fs::makedev(number.0, number.1))?;
    let (uid, gid) = owner(entry)?;
    Ok(rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
}

fn link_name(entry: &tar::Entry<'_, impl Read>) -> std::result::Result<PathBuf, Failure> {
    let name = entry.link_name()?.ok_or_else(|| Failure::Refused("it is a link to nothing".into()))?;
    Ok(name.into_owned())
}

fn owner(entry: &tar::Entry<'_, impl Read>) -> std::result::Result<(Uid, Gid), Failure> {
    let number = |value: u64| u32::try_from(value).map_err(|_| Failure::Refused("its owner is out of range".into()));
    let (uid, gid) = (number(entry.header().uid()?)?, number(entry.header().gid()?)?);
    Ok((Uid::from_raw(uid), Gid::from_raw(gid)))
}

/// Owner, extended attributes, mode (in this order: a change of owner clears setuid) and time of an open file.
fn set_metadata(file: &OwnedFd, entry: &mut tar::Entry<'_, impl Read>) -> std::result::Result<(), Failure> {
    let (uid, gid) = owner(entry)?;
    rustix::fs::fchown(file, Some(uid), Some(gid))?;
    let mut attributes: Vec<(OsString, Vec<u8>)> = Vec::new();
    if let Some(extensions) = entry.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            let key = extension.key_bytes().strip_prefix(b"SCHILY.xattr.");
            // File capabilities and users' attributes; those of security modules belong to the host.
            if let Some(key) = key.filter(|key| *key == b"security.capability" || key.starts_with(b"user.")) {
                attributes.push((OsStr::from_bytes(key).to_owned(), extension.value_bytes().to_vec()));
            }
        }
    }
    for (key, value) in attributes {
        rustix::fs::fsetxattr(file, key.as_os_str(), &value, XattrFlags::empty())?;
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(entry.header().mode()? & 0o7777))?;
    let time = Timespec { tv_sec: i64::try_from(entry.header().mtime()?).unwrap_or(0), tv_nsec: 0 };
    Ok(rustix::fs::futimens(file, &Timestamps { last_access: time, last_modification: time })?)
}

fn names(folder: &OwnedFd) -> std::result::Result<Vec<OsString>, Failure> {
    let path = format!("/proc/self/fd/{}", folder.as_raw_fd());
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path)? {
        names.push(entry?.file_name());
    }
    Ok(names)
}

/// Removes a name and what is below it; nothing where there is nothing. No link is followed.
fn remove(parent: &OwnedFd, name: &OsStr) -> std::result::Result<(), Failure> {
    let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
        return Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(parent.as_fd(), name, flags, Mode::empty())?;
    for inner in names(&folder)? {
        remove(&folder, &inner)?;
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use sha2::{Digest, Sha256};

    use super::*;

    /// A tar archive whose names are written as they are, `..` and all.
    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_ustar();
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o755);
            header.set_uid(u64::from(rustix::process::getuid().as_raw()));
            header.set_gid(u64::from(rustix::process::getgid().as_raw()));
            let data = if matches!(kind, EntryType::Symlink | EntryType::Link) {
                header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
                ""
            } else {
                content
            };
            header.set_size(data.len() as u64);
            header.set_cksum();
            builder.append(&header, data.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn unpack(root: &Path, entries: &[(&str, EntryType, &str)]) -> Result<()> {
        apply(archive(entries).as_slice(), root)
    }

    const FILE: EntryType = EntryType::Regular;

    #[test]
    fn nothing_leaves_the_root() {
        let outer = tempfile::tempdir().unwrap();
        let root = outer.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(outer.path().join("secret"), "s").unwrap();
        for entries in [
            vec![("../evil", FILE, "x")],
            vec![("a/../../evil", FILE, "x")],
            vec![("link", EntryType::Link, "../secret")],
            vec![("d/..", EntryType::Directory, "")],
            vec![("a/.wh...", FILE, "")],
        ] {
            assert!(matches!(unpack(&root, &entries), Err(Error::Refused(_))), "{entries:?}");
        }
        // Links of any target are kept, and nothing is written through them.
        unpack(
            &root,
            &[
                ("up", EntryType::Symlink, "../.."),
                ("up/evil", FILE, "x"),
                ("abs", EntryType::Symlink, "/"),
                ("abs/evil2", FILE, "x"),
            ],
        )
        .unwrap();
        assert!(root.join("evil").is_file() && root.join("evil2").is_file());
        let outside: Vec<_> =
            std::fs::read_dir(outer.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(outside.len(), 2, "{outside:?}");
    }

    #[test]
    fn a_file_replaces_a_link_and_does_not_follow_it() {
        let root = tempfile::tempdir().unwrap();
        unpack(root.path(), &[("target", FILE, "old"), ("l", EntryType::Symlink, "target"), ("l", FILE, "new")])
            .unwrap();
        assert_eq!(std::fs::read_to_string(root.path().join("target")).unwrap(), "old");
        assert_eq!(std::fs::read_to_string(root.path().join("l")).unwrap(), "new");
    }

    #[test]
    fn whiteouts_and_opaque_folders() {
        let root = tempfile::tempdir().unwrap();
        let exists = |name: &str| root.path().join(name).symlink_metadata().is_ok();
        unpack(root.path(), &[("a/x", FILE, ""), ("a/y/z", FILE, ""), ("b/x", FILE, ""), ("b/keep/old", FILE, "")])
            .unwrap();
        unpack(
            root.path(),
            &[("a/.wh.y", FILE, ""), ("b/keep/new", FILE, ""), ("b/.wh..wh..opq", FILE, ""), ("b/n", FILE, "")],
        )
        .unwrap();
        assert!(exists("a/x") && !exists("a/y"));
        assert!(!exists("b/x") && exists("b/n") && exists("b/keep/new"));
        unpack(root.path(), &[(".wh.a", FILE, "")]).unwrap();
        assert!(!exists("a") && exists("b"));
    }

    #[test]
    fn digests_and_truncation() {
        let root = tempfile::tempdir().unwrap();
        let tar = archive(&[("f", FILE, "content")]);
        let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&tar)));
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        let packed = gzip.finish().unwrap();
        let digest = |bytes: &[u8]| Some(format!("sha256:{}", hex::encode(Sha256::digest(bytes))));
        let run = |bytes: &[u8], digest: Option<String>, diff_id: &str| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            layer(&Layer { file: file.path().into(), digest, diff_id: diff_id.into() }, root.path())
        };
        run(&packed, digest(&packed), &diff_id).unwrap();
        run(&zstd::encode_all(tar.as_slice(), 1).unwrap(), None, &diff_id).unwrap();
        run(&tar, None, &diff_id).unwrap();
        assert!(matches!(run(&packed, digest(b"other"), &diff_id), Err(Error::Digest { .. })));
        assert!(matches!(run(&packed, None, &digest(b"other").unwrap()), Err(Error::Digest { .. })));
        let cut = &packed[..packed.len() - 20];
        assert!(run(cut, digest(cut), &diff_id).is_err());
        assert!(run(&packed, Some("md5:0".into()), &diff_id).is_err());
    }
}

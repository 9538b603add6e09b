//! CopyFile: files for a guest that has no file system of the host's, piece by piece.
//!
//! Everything stays below the shared folder: each part of a path is opened by itself, and none may be a link.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};
use std::sync::Arc;

use coracle_protocol::agent::CopyFileRequest;
use coracle_protocol::paths::{self, DATA};
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result};

/// The longest target of a link, in bytes (`PATH_MAX`).
const LINK_BYTES_MAX: usize = 4096;

/// Folders that a path has and the guest has not, where the request gives no mode.
const FOLDER_MODE: u32 = 0o755;

/// Takes one piece.
pub(crate) async fn copy(_: &Arc<Agent>, request: CopyFileRequest) -> Result<Empty> {
    on_thread(move || {
        let is_copy = Path::new(&request.path).starts_with(paths::COPIES);
        let root = Path::new(if is_copy { paths::COPIES } else { paths::SHARED });
        write(root, root, &request)
    })
    .await?;
    Ok(Empty::new())
}

/// Writes a piece of what is below `named`, for which `root` stands.
fn write(root: &Path, named: &Path, request: &CopyFileRequest) -> Result<()> {
    let invalid = |what: &str| Error::Invalid(format!("CopyFile {}: {what}", request.path.escape_default()));
    let path = Path::new(&request.path);
    let inside = path.strip_prefix(named).map_err(|_| invalid("it is not below the shared folder"))?;
    let parts: Option<Vec<_>> = inside
        .components()
        .map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let parts = parts.ok_or_else(|| invalid("it climbs"))?;
    let Some((name, folders)) = parts.split_last() else { return Err(invalid("it names nothing")) };
    let name = Path::new(name);
    let failed = |step: &str| Error::system::<Errno>(format!("{step} {}", request.path.escape_default()));
    std::fs::create_dir_all(root).map_err(Error::system("make the shared folder"))?;
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut parent = rustix::fs::open(root, flags, Mode::empty()).map_err(failed("open the folder of"))?;
    for folder in folders {
        parent = enter(&parent, Path::new(folder), request).map_err(failed("make the folder of"))?;
    }
    let place = Place { parent: parent.as_fd(), name, request };
    match FileType::from_raw_mode(request.file_mode) {
        FileType::Directory => place.folder().map_err(failed("make the folder")),
        FileType::Symlink => place.link(),
        FileType::RegularFile => place.piece(),
        // Without a type it is a file, too.
        _ if request.file_mode & 0o170_000 == 0 => place.piece(),
        _ => Err(invalid("it is no file, folder or link")),
    }
}

/// Opens a folder of the path, made where it is missing.
fn enter(parent: &OwnedFd, name: &Path, request: &CopyFileRequest) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => {
            let mode = if request.dir_mode & 0o777 == 0 { FOLDER_MODE } else { request.dir_mode & 0o777 };
            rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(mode))?;
            let folder = rustix::fs::openat(parent, name, flags, Mode::empty())?;
            rustix::fs::fchmod(&folder, Mode::from_raw_mode(mode))?;
            rustix::fs::fchown(&folder, owner(request.uid).map(Uid::from_raw), owner(request.gid).map(Gid::from_raw))?;
            Ok(folder)
        }
        other => other,
    }
}

/// A number below 0 leaves the owner as it is.
fn owner(number: i32) -> Option<u32> {
    u32::try_from(number).ok()
}

#[derive(Clone, Copy)]
struct Place<'a> {
    parent: BorrowedFd<'a>,
    name: &'a Path,
    request: &'a CopyFileRequest,
}

impl Place<'_> {
    /// What there is of this name goes; a folder only where it is empty.
    fn clear(&self) -> rustix::io::Result<()> {
        match rustix::fs::unlinkat(self.parent, self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => rustix::fs::unlinkat(self.parent, self.name, AtFlags::REMOVEDIR),
            other => other,
        }
    }

    /// What it is called until it is there: as short as a file system takes, and nothing that a volume has for its own (Kubernetes' keys
    /// do not begin so).
    fn unfinished(&self) -> String {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        self.name.hash(&mut hasher);
        format!("..coracle-{:016x}", hasher.finish())
    }

    fn chown(&self) -> rustix::io::Result<()> {
        let (user, group) = (owner(self.request.uid).map(Uid::from_raw), owner(self.request.gid).map(Gid::from_raw));
        rustix::fs::chownat(self.parent, self.name, user, group, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn folder(&self) -> rustix::io::Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = match rustix::fs::openat(self.parent, self.name, flags, Mode::empty()) {
            Ok(folder) => folder,
            Err(_) => {
                self.clear()?;
                rustix::fs::mkdirat(self.parent, self.name, Mode::from_raw_mode(0o700))?;
                rustix::fs::openat(self.parent, self.name, flags, Mode::empty())?
            }
        };
        rustix::fs::fchmod(&folder, Mode::from_raw_mode(self.request.file_mode & 0o7777))?;
        self.chown()
    }

    /// The target is not looked at: it is the container that follows it, in its own root.
    fn link(&self) -> Result<()> {
        let target = self.request.data.as_slice();
        if target.is_empty() || target.len() > LINK_BYTES_MAX || target.contains(&0) {
            return Err(Error::Invalid(format!(
                "CopyFile {}: no target for a link",
                self.request.path.escape_default()
            )));
        }
        let target = Path::new(std::ffi::OsStr::from_bytes(target));
        let fresh = self.unfinished();
        let fresh = Place { name: Path::new(&fresh), ..*self };
        let made = fresh
            .clear()
            .and_then(|()| rustix::fs::symlinkat(target, self.parent, fresh.name))
            .and_then(|()| fresh.chown())
            // Whoever reads sees the one or the other.
            .and_then(|()| match rustix::fs::renameat(self.parent, fresh.name, self.parent, self.name) {
                Err(Errno::ISDIR | Errno::EXIST | Errno::NOTEMPTY) => {
                    self.clear().and_then(|()| rustix::fs::renameat(self.parent, fresh.name, self.parent, self.name))
                }
                renamed => renamed,
            });
        made.map_err(Error::system(format!("make the link {}", self.request.path.escape_default())))?;
        if self.name == Path::new(DATA) {
            self.forget_but(target);
        }
        Ok(())
    }

    /// After the link [`DATA`] was turned: the folders to which it led go, and those that were begun and never shown, and with them the
    /// links to what is no more. One that stays is only room that is lost.
    fn forget_but(&self, target: &Path) {
        let here = std::path::PathBuf::from(format!("/proc/self/fd/{}", self.parent.as_raw_fd()));
        for entry in std::fs::read_dir(&here).into_iter().flatten().flatten() {
            let name = entry.file_name();
            if name.as_bytes().starts_with(b"..") {
                if ![Path::new(DATA), target].contains(&Path::new(&name)) {
                    // A link is none, and is not followed.
                    let _ = std::fs::remove_dir_all(entry.path()).or_else(|_| std::fs::remove_file(entry.path()));
                }
                continue;
            }
            let leads_to_data = std::fs::read_link(entry.path()).is_ok_and(|target| target.starts_with(DATA));
            if leads_to_data && !entry.path().exists() {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// A piece of a file. Pieces come in their order; the file shows when the last one is there.
    fn piece(&self) -> Result<()> {
        let request = self.request;
        let refused = |what: &str| Error::Invalid(format!("CopyFile {}: {what}", request.path.escape_default()));
        let (Ok(offset), Ok(size)) = (u64::try_from(request.offset), u64::try_from(request.file_size)) else {
            return Err(refused("a negative size or offset"));
        };
        let end = offset.saturating_add(request.data.len() as u64);
        if end > size {
            return Err(refused("more data than its size"));
        }
        let failed = || Error::system::<std::io::Error>(format!("write {}", request.path.escape_default()));
        let part = self.unfinished();
        let fresh = if offset == 0 { OFlags::CREATE | OFlags::TRUNC } else { OFlags::empty() };
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | fresh;
        let file = rustix::fs::openat(self.parent, &part, flags, Mode::from_raw_mode(0o600));
        let file = std::fs::File::from(file.map_err(|errno| failed()(errno.into()))?);
        if file.metadata().map_err(failed())?.len() != offset {
            return Err(refused("this is not the piece that comes next"));
        }
        file.write_all_at(&request.data, offset).map_err(failed())?;
        if end < size {
            return Ok(());
        }
        let done =
            rustix::fs::fchown(&file, owner(request.uid).map(Uid::from_raw), owner(request.gid).map(Gid::from_raw))
                .and_then(|()| rustix::fs::fchmod(&file, Mode::from_raw_mode(request.file_mode & 0o7777)))
                .and_then(|()| rustix::fs::renameat(self.parent, &part, self.parent, self.name));
        done.map_err(|errno| failed()(errno.into()))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn request(path: &str, mode: u32, data: &[u8]) -> CopyFileRequest {
        CopyFileRequest {
            path: path.into(),
            file_size: i64::try_from(data.len()).unwrap(),
            file_mode: mode,
            uid: -1,
            gid: -1,
            data: data.to_vec(),
            ..Default::default()
        }
    }

    fn shared(rest: &str) -> String {
        format!("{}/{rest}", paths::SHARED)
    }

    #[test]
    fn files_folders_and_links_are_made() {
        let root = tempfile::tempdir().unwrap();
        let write = |request: &CopyFileRequest| write(root.path(), Path::new(paths::SHARED), request);
        write(&request(&shared("v/d"), 0o040_750, b"")).unwrap();
        write(&request(&shared("v/d/f"), 0o100_640, b"text")).unwrap();
        write(&request(&shared("v/l"), 0o120_777, b"d/f")).unwrap();
        write(&request(&shared("v/empty"), 0o644, b"")).unwrap();
        let at = |path: &str| root.path().join(path);
        assert_eq!(std::fs::read_to_string(at("v/l")).unwrap(), "text");
        assert_eq!(std::fs::metadata(at("v/d")).unwrap().permissions().mode() & 0o7777, 0o750);
        assert_eq!(std::fs::metadata(at("v/d/f")).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read(at("v/empty")).unwrap(), b"");
        // Another link in its place, as a projected volume is updated.
        write(&request(&shared("v/l"), 0o120_777, b"empty")).unwrap();
        assert_eq!(std::fs::read_link(at("v/l")).unwrap(), Path::new("empty"));
    }

    #[test]
    fn two_megabytes_come_in_pieces_and_show_at_the_end() {
        let root = tempfile::tempdir().unwrap();
        let data: Vec<u8> = (0..2_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
        for (number, piece) in data.chunks(1 << 20).enumerate() {
            assert!(!root.path().join("big").exists());
            let mut request = request(&shared("big"), 0o100_600, piece);
            request.file_size = 2_000_000;
            request.offset = i64::try_from(number << 20).unwrap();
            write(root.path(), Path::new(paths::SHARED), &request).unwrap();
        }
        assert_eq!(std::fs::read(root.path().join("big")).unwrap(), data);
        let mut late = request(&shared("other"), 0o100_600, b"x");
        (late.offset, late.file_size) = (5, 6);
        assert!(write(root.path(), Path::new(paths::SHARED), &late).is_err(), "a piece without those before it");
    }

    #[test]
    fn a_volume_is_turned_as_a_whole_and_what_was_goes() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, mode: u32, data: &[u8]| {
            write(root.path(), Path::new(paths::SHARED), &request(&shared(path), mode, data)).unwrap();
        };
        write("v/..1/a", 0o100_644, b"one");
        write("v/..1/b", 0o100_644, b"one");
        write("v/..data", 0o120_777, b"..1");
        write("v/a", 0o120_777, b"..data/a");
        write("v/b", 0o120_777, b"..data/b");
        write("v/other", 0o120_777, b"nowhere");
        write("v/..2/a", 0o100_644, b"two");
        write("v/..data", 0o120_777, b"..2");
        let mut names: Vec<_> = std::fs::read_dir(root.path().join("v"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["..2", "..data", "a", "other"]);
        assert_eq!(std::fs::read_to_string(root.path().join("v/a")).unwrap(), "two");
        // The same again takes nothing away.
        write("v/..data", 0o120_777, b"..2");
        assert_eq!(std::fs::read_to_string(root.path().join("v/a")).unwrap(), "two");
        // What a hostile host has in its stead leads nowhere else.
        std::fs::create_dir(root.path().join("outside")).unwrap();
        for before in ["../outside", "/etc/none", "a"] {
            write("v/..data", 0o120_777, before.as_bytes());
            write("v/..data", 0o120_777, b"..2");
        }
        assert!(root.path().join("outside").exists());
    }

    #[test]
    fn nothing_leaves_the_shared_folder() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(outside.path(), root.path().join("out")).unwrap();
        let below = shared("out/x");
        for path in ["/tmp/x", "/run/kata-containers/shared/foo", &shared("a/../../x"), &shared(""), "x", &below] {
            assert!(write(root.path(), Path::new(paths::SHARED), &request(path, 0o100_644, b"x")).is_err(), "{path}");
            assert!(write(root.path(), Path::new(paths::SHARED), &request(path, 0o040_755, b"")).is_err(), "{path}");
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        // The link itself may be replaced, and what it led to is untouched.
        write(root.path(), Path::new(paths::SHARED), &request(&shared("out"), 0o100_644, b"x")).unwrap();
        assert!(root.path().join("out").symlink_metadata().unwrap().is_file());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let mut long = request(&shared("f"), 0o100_644, b"longer");
        long.file_size = 2;
        let mut negative = request(&shared("f"), 0o100_644, b"x");
        negative.offset = -1;
        for bad in [long, negative, request(&shared("p"), 0o010_644, b""), request(&shared("l"), 0o120_777, b"")] {
            assert!(matches!(write(root.path(), Path::new(paths::SHARED), &bad), Err(Error::Invalid(_))), "{bad}");
        }
    }
}

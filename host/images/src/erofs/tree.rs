//! The tree of files that archives make (image-spec, layer.md), in memory. Paths never touch the host's file system.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use tar::EntryType;

use super::write::{ATTRIBUTES_MAX, Content, Contents, REST_MAX, attributes_bytes};
use crate::layer::broken;
use crate::{Error, Result};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// How many links a path may lead through, as in Linux.
const LINKS_MAX: usize = 40;
/// The longest name, in bytes (`NAME_MAX`).
const NAME_MAX: usize = 255;
/// The most entries of all layers that are read: far more than any image has, and what a few hundred megabytes of memory hold.
const NODES_MAX: usize = 2_000_000;
/// Types of files in a mode (stat(2)).
const DIRECTORY: u16 = 0o040_000;
const REGULAR: u16 = 0o100_000;
const SYMLINK: u16 = 0o120_000;
const CHARACTER: u16 = 0o020_000;
const BLOCK_DEVICE: u16 = 0o060_000;
const FIFO: u16 = 0o010_000;

/// Number of the root's node.
pub(super) const ROOT: usize = 0;

/// Whether layers can be overlaid on others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stands {
    /// They can.
    Alone,
    /// They can't: they link to a file of another layer, or say nothing of a folder that one may have.
    OnOthers,
}

/// A file of any type.
#[derive(Debug)]
pub(super) struct Node {
    /// Type and permissions, as in stat(2).
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970.
    pub(super) mtime: u64,
    pub(super) links: u32,
    /// By name, whole: `user.x`.
    pub(super) attributes: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) body: Body,
    /// The layer that it is of.
    layer: u32,
    /// Whether no entry has said what it is, but only what is in it.
    implied: bool,
}

#[derive(Debug)]
pub(super) enum Body {
    Directory(BTreeMap<Vec<u8>, usize>),
    File(Content),
    Symlink(Vec<u8>),
    /// Number of a device as the kernel stores it.
    Device(u32),
    /// A pipe.
    Other,
}

/// See the module.
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) contents: Contents,
    is_lowest: bool,
    /// The layer that is being read, from 1.
    layer: u32,
    stands: Stands,
}

enum Failure {
    Refused(String),
    System(std::io::Error),
    /// A link to a file of a layer below.
    Below,
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::System(error)
    }
}

type Step<T> = std::result::Result<T, Failure>;

fn refused<T>(text: &str) -> Step<T> {
    Err(Failure::Refused(text.to_owned()))
}

fn directory(layer: u32, implied: bool) -> Node {
    Node {
        mode: DIRECTORY | 0o755,
        uid: 0,
        gid: 0,
        mtime: 0,
        links: 1,
        attributes: BTreeMap::new(),
        body: Body::Directory(BTreeMap::new()),
        layer,
        implied,
    }
}

/// A plain relative path without `..`; empty for the root itself.
fn plain(path: &Path) -> Step<Vec<Vec<u8>>> {
    let mut plain = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) if name.len() > NAME_MAX => return refused("its name is too long"),
            Component::Normal(name) => plain.push(name.as_bytes().to_vec()),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return refused("it leaves the image's root"),
        }
    }
    Ok(plain)
}

impl Tree {
    pub(super) fn new(contents: Contents, is_lowest: bool) -> Self {
        Self { nodes: vec![directory(0, true)], contents, is_lowest, layer: 0, stands: Stands::Alone }
    }

    /// Adds what a layer's archive has.
    pub(super) fn apply(&mut self, reader: &mut dyn Read) -> Result<()> {
        self.layer += 1;
        let mut archive = tar::Archive::new(reader);
        for entry in archive.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            let path = PathBuf::from(OsStr::from_bytes(&entry.path_bytes()));
            match self.entry(&path, &mut entry) {
                Ok(()) => {}
                Err(Failure::Below) if !self.is_lowest => self.stands = Stands::OnOthers,
                Err(Failure::Below) => return Err(refuse(&path, "it links to a file that is not there")),
                Err(Failure::Refused(text)) => return Err(refuse(&path, &text)),
                Err(Failure::System(source)) => return Err(Error::File { path, source }),
            }
        }
        Ok(())
    }

    /// Whether what was read can lie on other layers.
    pub(super) fn stands(&self) -> Stands {
        // Of the root's own attributes the overlay takes its upper folder's.
        let implied = self.nodes.iter().skip(1).any(|node| node.implied && node.links > 0);
        if implied && !self.is_lowest { Stands::OnOthers } else { self.stands }
    }

    fn children(&self, node: usize) -> Option<&BTreeMap<Vec<u8>, usize>> {
        match self.nodes.get(node).map(|node| &node.body) {
            Some(Body::Directory(children)) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, node: usize) -> Step<&mut BTreeMap<Vec<u8>, usize>> {
        match self.nodes.get_mut(node).map(|node| &mut node.body) {
            Some(Body::Directory(children)) => Ok(children),
            _ => refused("it is in something that is no folder"),
        }
    }

    fn node_mut(&mut self, node: usize) -> Step<&mut Node> {
        self.nodes.get_mut(node).ok_or_else(|| Failure::Refused("it has no place".into()))
    }

    fn add(&mut self, node: Node) -> Step<usize> {
        if self.nodes.len() >= NODES_MAX {
            return refused("the image has more files than are taken");
        }
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    /// The folder at `path`, links followed inside the root, and made where parts of it are missing.
    fn folder(&mut self, path: &[Vec<u8>]) -> Step<usize> {
        // What is still to be walked, the next part last.
        let mut rest: Vec<Vec<u8>> = path.iter().rev().cloned().collect();
        let mut at = vec![ROOT];
        let mut links = 0;
        while let Some(name) = rest.pop() {
            let folder = at.last().copied().unwrap_or(ROOT);
            if name == b".." {
                if at.len() > 1 {
                    at.pop();
                }
                continue;
            }
            let Some(next) = self.children(folder).and_then(|children| children.get(&name)).copied() else {
                let made = self.add(directory(self.layer, true))?;
                self.children_mut(folder)?.insert(name, made);
                at.push(made);
                continue;
            };
            match self.nodes.get(next).map(|node| &node.body) {
                Some(Body::Directory(_)) => at.push(next),
                Some(Body::Symlink(target)) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return refused("it leads through too many links");
                    }
                    if target.first() == Some(&b'/') {
                        at.truncate(1);
                    }
                    let parts = target.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
                    rest.extend(parts.rev().map(<[u8]>::to_vec));
                }
                _ => return refused("it is in something that is no folder"),
            }
        }
        Ok(at.last().copied().unwrap_or(ROOT))
    }

    fn entry(&mut self, path: &Path, entry: &mut tar::Entry<'_, impl Read>) -> Step<()> {
        let path = plain(path)?;
        let Some((name, parents)) = path.split_last() else {
            let root = self.describe(DIRECTORY, Body::Directory(BTreeMap::new()), entry)?;
            return self.redescribe(ROOT, root);
        };
        let parent = self.folder(parents)?;
        if name == OPAQUE {
            return self.clear(parent);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return refused("it hides no name");
            }
            return self.hide(parent, hidden);
        }
        let present = self.children(parent).and_then(|children| children.get(name)).copied();
        match entry.header().entry_type() {
            EntryType::Directory => {
                let node = self.describe(DIRECTORY, Body::Directory(BTreeMap::new()), entry)?;
                match present {
                    Some(present) if self.children(present).is_some() => self.redescribe(present, node),
                    _ => {
                        let hides = present.is_some_and(|present| self.is_whiteout(present));
                        self.put(parent, name, node)?;
                        if hides { self.clear_new(parent, name) } else { Ok(()) }
                    }
                }
            }
            EntryType::Link => {
                let target = plain(&link_name(entry)?)?;
                let Some((last, parents)) = target.split_last() else { return refused("it links to the root") };
                let old = self.find(parents).and_then(|folder| self.children(folder)?.get(last).copied());
                let old = old.filter(|old| !self.is_whiteout(*old)).ok_or(Failure::Below)?;
                if self.children(old).is_some() {
                    return refused("it links to a folder");
                }
                if present == Some(old) {
                    return Ok(());
                }
                self.node_mut(old)?.links += 1;
                self.take_out(parent, name)?;
                self.children_mut(parent)?.insert(name.clone(), old);
                Ok(())
            }
            kind => {
                let Some((file_type, body)) = self.body(kind, entry)? else { return Ok(()) };
                let node = self.describe(file_type, body, entry)?;
                self.put(parent, name, node)
            }
        }
    }

    /// The folder at `path`, where there is one; no link is followed.
    fn find(&self, path: &[Vec<u8>]) -> Option<usize> {
        path.iter().try_fold(ROOT, |folder, name| self.children(folder)?.get(name).copied())
    }

    /// What is in an entry that is neither folder nor hard link; `None` for one that is no file.
    fn body(&mut self, kind: EntryType, entry: &mut tar::Entry<'_, impl Read>) -> Step<Option<(u16, Body)>> {
        Ok(Some(match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let size = entry.size();
                (REGULAR, Body::File(self.contents.add(entry, size)?))
            }
            EntryType::Symlink => {
                let target = link_name(entry)?.into_os_string().as_bytes().to_vec();
                if target.is_empty() || target.len() > REST_MAX {
                    return refused("its target is empty or too long");
                }
                (SYMLINK, Body::Symlink(target))
            }
            EntryType::Fifo => (FIFO, Body::Other),
            EntryType::Char => (CHARACTER, Body::Device(device_number(entry)?)),
            EntryType::Block => (BLOCK_DEVICE, Body::Device(device_number(entry)?)),
            // Headers that the library has taken in already, and kinds that no image needs.
            EntryType::XGlobalHeader => return Ok(None),
            other => return refused(&format!("it is of the unknown kind {other:?}")),
        }))
    }

    fn describe(&self, file_type: u16, body: Body, entry: &mut tar::Entry<'_, impl Read>) -> Step<Node> {
        let header = entry.header();
        let number =
            |value: u64| u32::try_from(value).map_err(|_| Failure::Refused("its owner is out of range".into()));
        let (uid, gid, mtime) = (number(header.uid()?)?, number(header.gid()?)?, header.mtime()?);
        let mode = file_type | u16::try_from(header.mode()? & 0o7777).unwrap_or(0);
        let mut attributes = BTreeMap::new();
        for extension in entry.pax_extensions()?.into_iter().flatten() {
            let extension = extension?;
            let key = extension.key_bytes().strip_prefix(b"SCHILY.xattr.");
            // File capabilities and users' attributes; those of security modules belong to the host.
            if let Some(key) = key.filter(|key| *key == b"security.capability" || key.starts_with(b"user.")) {
                attributes.insert(key.to_vec(), extension.value_bytes().to_vec());
            }
        }
        if attributes_bytes(&attributes) > ATTRIBUTES_MAX || attributes.keys().any(|name| name.len() > NAME_MAX) {
            return refused("its extended attributes are too large");
        }
        Ok(Node { mode, uid, gid, mtime, links: 1, attributes, body, layer: self.layer, implied: false })
    }

    /// Gives a folder that is there the attributes of `node`; what is in it stays.
    fn redescribe(&mut self, folder: usize, node: Node) -> Step<()> {
        let opaque = self.node_mut(folder)?.attributes.remove(&OVERLAY_OPAQUE[..]);
        let old = self.node_mut(folder)?;
        let body = std::mem::replace(&mut old.body, Body::Other);
        *old = Node { body, ..node };
        if let Some(value) = opaque {
            old.attributes.insert(OVERLAY_OPAQUE.to_vec(), value);
        }
        Ok(())
    }

    /// Puts `node` at a name; what was there makes way.
    fn put(&mut self, parent: usize, name: &[u8], node: Node) -> Step<()> {
        self.take_out(parent, name)?;
        let made = self.add(node)?;
        self.children_mut(parent)?.insert(name.to_vec(), made);
        Ok(())
    }

    /// Takes a name and all below it out of the tree.
    fn take_out(&mut self, parent: usize, name: &[u8]) -> Step<()> {
        let Some(gone) = self.children_mut(parent)?.remove(name) else { return Ok(()) };
        let mut all = vec![gone];
        while let Some(gone) = all.pop() {
            let node = self.node_mut(gone)?;
            node.links = node.links.saturating_sub(1);
            if let Body::Directory(children) = &mut node.body {
                all.extend(std::mem::take(children).into_values());
            }
        }
        Ok(())
    }

    fn is_whiteout(&self, node: usize) -> bool {
        let node = self.nodes.get(node);
        node.is_some_and(|node| node.mode & 0o170_000 == CHARACTER && matches!(node.body, Body::Device(0)))
    }

    /// What a layer below has of this name is not to be seen. What this layer itself has put there is.
    fn hide(&mut self, parent: usize, name: &[u8]) -> Step<()> {
        let present = self.children(parent).and_then(|children| children.get(name)).copied();
        let own = present.and_then(|present| self.nodes.get(present)).is_some_and(|node| node.layer == self.layer);
        if own {
            return if present.is_some_and(|present| self.children(present).is_some()) {
                self.clear_new(parent, name)
            } else {
                Ok(())
            };
        }
        self.take_out(parent, name)?;
        if self.is_lowest {
            return Ok(());
        }
        let whiteout = Node { mode: CHARACTER, body: Body::Device(0), ..directory(self.layer, false) };
        self.put(parent, name, whiteout)
    }

    fn clear_new(&mut self, parent: usize, name: &[u8]) -> Step<()> {
        match self.children(parent).and_then(|children| children.get(name)).copied() {
            Some(folder) => self.clear(folder),
            None => Ok(()),
        }
    }

    /// What layers below have in a folder is not to be seen.
    fn clear(&mut self, folder: usize) -> Step<()> {
        if !self.is_lowest {
            self.node_mut(folder)?.attributes.insert(OVERLAY_OPAQUE.to_vec(), b"y".to_vec());
            return Ok(());
        }
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            let children: Vec<_> = self.children(folder).into_iter().flatten().map(|(n, c)| (n.clone(), *c)).collect();
            for (name, child) in children {
                let own = self.nodes.get(child).is_some_and(|node| node.layer == self.layer);
                if !own && !self.holds_own(child) {
                    self.take_out(folder, &name)?;
                } else if self.children(child).is_some() {
                    folders.push(child);
                }
            }
        }
        Ok(())
    }

    /// Whether something below a folder is of the layer that is being read.
    fn holds_own(&self, folder: usize) -> bool {
        let mut all = vec![folder];
        while let Some(at) = all.pop() {
            if self.nodes.get(at).is_some_and(|node| node.layer == self.layer) {
                return true;
            }
            all.extend(self.children(at).into_iter().flat_map(BTreeMap::values));
        }
        false
    }
}

/// The type of a file as folders name it (`EROFS_FT_*`).
pub(super) fn file_type(node: &Node) -> u8 {
    match node.mode & 0o170_000 {
        REGULAR => 1,
        DIRECTORY => 2,
        CHARACTER => 3,
        BLOCK_DEVICE => 4,
        FIFO => 5,
        SYMLINK => 7,
        _ => 0,
    }
}

/// By which overlayfs knows a folder that hides what is below it (Documentation/filesystems/overlayfs.rst).
const OVERLAY_OPAQUE: [u8; 22] = *b"trusted.overlay.opaque";

fn refuse(path: &Path, text: &str) -> Error {
    Error::Refused(format!("{}: {text}", path.display()))
}

fn link_name(entry: &tar::Entry<'_, impl Read>) -> Step<PathBuf> {
    let name = entry.link_name()?.ok_or_else(|| Failure::Refused("it is a link to nothing".into()))?;
    Ok(name.into_owned())
}

/// A device's number as the kernel stores it: 12 bits of the major number between the lower 8 and the upper 12 of the minor one.
fn device_number(entry: &tar::Entry<'_, impl Read>) -> Step<u32> {
    let header = entry.header();
    let (major, minor) = (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0));
    if major >= 1 << 12 || minor >= 1 << 20 {
        return refused("it is a device whose number is out of range");
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

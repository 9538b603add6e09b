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
/// The most parts of a path, with those of the links on its way.
const PARTS_MAX: usize = 1024;
/// How much memory the tree may take, in bytes, and what a file takes beside its name, its target and its attributes: some two
/// million files.
const MEMORY_MAX: usize = 512 << 20;
const NODE_BYTES: usize = 160;
/// What a name takes beside itself.
const NAME_BYTES: usize = 64;
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
    /// Whether no entry has said what it is, but only what is in it.
    implied: bool,
}

/// What is in a folder, by name.
pub(super) type Children = BTreeMap<Vec<u8>, Child>;

/// A name in a folder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Child {
    pub(super) node: usize,
    /// The layer that has put it there.
    layer: u32,
}

#[derive(Debug)]
pub(super) enum Body {
    Directory(Children),
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
    /// Bytes that the tree takes.
    memory: usize,
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

fn directory(implied: bool) -> Node {
    Node {
        mode: DIRECTORY | 0o755,
        uid: 0,
        gid: 0,
        mtime: 0,
        links: 1,
        attributes: BTreeMap::new(),
        body: Body::Directory(BTreeMap::new()),
        implied,
    }
}

/// A name that a folder can hold.
fn check_name(name: &[u8]) -> Step<&[u8]> {
    if name.len() > NAME_MAX || name.contains(&0) {
        return refused("a name on its way is too long, or has a NUL byte");
    }
    Ok(name)
}

/// A plain relative path without `..`; empty for the root itself.
fn plain(path: &Path) -> Step<Vec<Vec<u8>>> {
    let mut plain = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(check_name(name.as_bytes())?.to_vec()),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return refused("it leaves the image's root"),
        }
    }
    if plain.len() > PARTS_MAX {
        return refused("its path has too many parts");
    }
    Ok(plain)
}

impl Tree {
    pub(super) fn new(contents: Contents, is_lowest: bool) -> Self {
        Self { nodes: vec![directory(true)], contents, is_lowest, layer: 0, stands: Stands::Alone, memory: 0 }
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

    fn children(&self, node: usize) -> Option<&Children> {
        match self.nodes.get(node).map(|node| &node.body) {
            Some(Body::Directory(children)) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, node: usize) -> Step<&mut Children> {
        match self.nodes.get_mut(node).map(|node| &mut node.body) {
            Some(Body::Directory(children)) => Ok(children),
            _ => refused("it is in something that is no folder"),
        }
    }

    fn node_mut(&mut self, node: usize) -> Step<&mut Node> {
        self.nodes.get_mut(node).ok_or_else(|| Failure::Refused("it has no place".into()))
    }

    /// Bytes that it takes, as they are counted against the most.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    fn child(&self, folder: usize, name: &[u8]) -> Option<usize> {
        self.children(folder)?.get(name).map(|child| child.node)
    }

    fn add(&mut self, node: Node) -> Step<usize> {
        let target = if let Body::Symlink(target) = &node.body { target.len() } else { 0 };
        self.take_memory(NODE_BYTES + target + attributes_bytes(&node.attributes))?;
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn take_memory(&mut self, bytes: usize) -> Step<()> {
        self.memory = self.memory.saturating_add(bytes);
        if self.memory > MEMORY_MAX { refused("the image has more files than are taken") } else { Ok(()) }
    }

    /// Gives a node a name of the layer that is being read.
    fn name(&mut self, folder: usize, name: &[u8], node: usize) -> Step<()> {
        self.take_memory(NAME_BYTES + name.len())?;
        let layer = self.layer;
        self.children_mut(folder)?.insert(name.to_vec(), Child { node, layer });
        Ok(())
    }

    /// The folder at `path`, links followed inside the root; made where parts of it are missing, with `make`, else `None`.
    fn walk(&mut self, path: &[Vec<u8>], make: bool) -> Step<Option<usize>> {
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
            let present = self.child(folder, &name);
            let hidden = present.is_some_and(|present| self.is_whiteout(present));
            let Some(next) = present.filter(|_| !hidden) else {
                if !make {
                    return Ok(None);
                }
                let made = self.add(directory(true))?;
                self.take_out(folder, &name)?;
                self.name(folder, check_name(&name)?, made)?;
                if hidden {
                    self.clear(made)?;
                }
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
                    if rest.len() > PARTS_MAX {
                        return refused("it leads through links of too many parts");
                    }
                }
                _ => return refused("it is in something that is no folder"),
            }
        }
        Ok(at.last().copied())
    }

    /// The folder at `path`, made where parts of it are missing.
    fn folder(&mut self, path: &[Vec<u8>]) -> Step<usize> {
        Ok(self.walk(path, true)?.unwrap_or(ROOT))
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
        let present = self.child(parent, name);
        match entry.header().entry_type() {
            EntryType::Directory => {
                let node = self.describe(DIRECTORY, Body::Directory(BTreeMap::new()), entry)?;
                match present {
                    Some(present) if self.children(present).is_some() => self.redescribe(present, node),
                    _ => {
                        let hides = present.is_some_and(|present| self.is_whiteout(present));
                        self.put(parent, name, node)?;
                        match self.child(parent, name) {
                            Some(made) if hides => self.clear(made),
                            _ => Ok(()),
                        }
                    }
                }
            }
            EntryType::Link => {
                let target = plain(&link_name(entry)?)?;
                let Some((last, parents)) = target.split_last() else { return refused("it links to the root") };
                let old = self.walk(parents, false)?.and_then(|folder| self.child(folder, last));
                let old = old.filter(|old| !self.is_whiteout(*old)).ok_or(Failure::Below)?;
                if self.children(old).is_some() {
                    return refused("it links to a folder");
                }
                if present == Some(old) {
                    return Ok(());
                }
                self.node_mut(old)?.links += 1;
                self.take_out(parent, name)?;
                self.name(parent, name, old)
            }
            kind => {
                let Some((file_type, body)) = self.body(kind, entry)? else { return Ok(()) };
                let node = self.describe(file_type, body, entry)?;
                self.put(parent, name, node)
            }
        }
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
            // The library looks for the records' ends, and does not count.
            let Ok(extension) = extension else {
                return refused(
                    "its extended attributes can't be read; one with a line feed in its value is not supported",
                );
            };
            let key = extension.key_bytes().strip_prefix(b"SCHILY.xattr.");
            // File capabilities and users' attributes; those of security modules belong to the host.
            if let Some(key) = key.filter(|key| *key == b"security.capability" || key.starts_with(b"user.")) {
                attributes.insert(key.to_vec(), extension.value_bytes().to_vec());
            }
        }
        if attributes_bytes(&attributes) > ATTRIBUTES_MAX || attributes.keys().any(|name| name.len() > NAME_MAX) {
            return refused("its extended attributes are too large");
        }
        Ok(Node { mode, uid, gid, mtime, links: 1, attributes, body, implied: false })
    }

    /// Gives a folder that is there the attributes of `node`; what is in it stays.
    fn redescribe(&mut self, folder: usize, node: Node) -> Step<()> {
        self.take_memory(attributes_bytes(&node.attributes))?;
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
        self.name(parent, name, made)
    }

    /// Takes a name and all below it out of the tree.
    fn take_out(&mut self, parent: usize, name: &[u8]) -> Step<()> {
        let Some(gone) = self.children_mut(parent)?.remove(name) else { return Ok(()) };
        let mut all = vec![gone.node];
        while let Some(gone) = all.pop() {
            let node = self.node_mut(gone)?;
            node.links = node.links.saturating_sub(1);
            if let Body::Directory(children) = &mut node.body {
                all.extend(std::mem::take(children).into_values().map(|child| child.node));
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
        if let Some(present) = present.filter(|child| child.layer == self.layer || self.holds_own(child.node)) {
            return if self.children(present.node).is_some() { self.clear(present.node) } else { Ok(()) };
        }
        self.take_out(parent, name)?;
        // In an opaque folder there is nothing to hide, and the mark would be seen.
        let opaque = |node: &Node| node.attributes.contains_key(&OVERLAY_OPAQUE[..]);
        if self.is_lowest || self.nodes.get(parent).is_some_and(opaque) {
            return Ok(());
        }
        let whiteout = Node { mode: CHARACTER, body: Body::Device(0), ..directory(false) };
        self.put(parent, name, whiteout)
    }

    /// What layers below have in a folder is not to be seen.
    fn clear(&mut self, folder: usize) -> Step<()> {
        if !self.is_lowest {
            if folder == ROOT {
                // overlayfs does not look at the root of a layer for that.
                self.stands = Stands::OnOthers;
            }
            self.node_mut(folder)?.attributes.insert(OVERLAY_OPAQUE.to_vec(), b"y".to_vec());
            return Ok(());
        }
        let mut folders = vec![folder];
        while let Some(folder) = folders.pop() {
            let children: Vec<_> = self.children(folder).into_iter().flatten().map(|(n, c)| (n.clone(), *c)).collect();
            for (name, child) in children {
                if child.layer != self.layer && !self.holds_own(child.node) {
                    self.take_out(folder, &name)?;
                } else if self.children(child.node).is_some() {
                    folders.push(child.node);
                }
            }
        }
        Ok(())
    }

    /// Whether something below a folder is of the layer that is being read.
    fn holds_own(&self, folder: usize) -> bool {
        let mut all = vec![folder];
        while let Some(at) = all.pop() {
            for child in self.children(at).into_iter().flat_map(BTreeMap::values) {
                if child.layer == self.layer {
                    return true;
                }
                all.push(child.node);
            }
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

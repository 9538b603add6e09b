//! The bytes of the image.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Error, Read, Result, Seek, SeekFrom, Write};
use std::path::Path;

use super::tree::{Body, Child, Children, Node, ROOT, Tree, file_type};
use super::{BLOCK, Size, copy};

/// `EROFS_SUPER_MAGIC_V1`, and where the superblock is.
const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK: u64 = 1024;
/// `EROFS_FEATURE_COMPAT_MTIME`: the time of an inode is that of its last change.
const COMPAT_MTIME: u32 = 2;
/// An extended inode's size, and the unit in which inodes are numbered.
const INODE: usize = 64;
const SLOT: usize = 32;
/// Layouts of an inode's data: in blocks of its own, or with the rest that fills no block behind the inode.
const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
/// The header of an inode's extended attributes, and of each of them.
const ATTRIBUTES_HEADER: usize = 12;
const ATTRIBUTE_HEADER: usize = 4;
/// The most bytes of an inode's extended attributes, with the marks of overlayfs that may still come to them.
const ATTRIBUTES_LIMIT: usize = BLOCK - INODE - REST_MAX;
/// The most bytes of a file's own ones.
pub(super) const ATTRIBUTES_MAX: usize = ATTRIBUTES_LIMIT - 64;
/// An entry of a folder, without its name.
const ENTRY: usize = 12;
/// No block.
const NOWHERE: u32 = u32::MAX;

fn too_large() -> Error {
    Error::other("the file system would have more than 2^32 blocks")
}

/// Where a file's contents are: in whole blocks from the first one, and what is left behind the inode or in one more block.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Content {
    size: u64,
    first_block: u32,
    /// Where the rest is kept until its inode is written.
    kept_at: Option<u64>,
}

/// The contents of files, on their way into the image.
pub(super) struct Contents {
    out: BufWriter<File>,
    /// The next free block.
    next: u32,
    /// What is to lie behind inodes, in a file without a name.
    rests: BufWriter<File>,
    rests_end: u64,
}

/// The most bytes of all files of an image's layers: more than images have, and less than fills every host.
const BYTES_MAX: u64 = 256 << 30;

/// The most bytes that lie behind an inode: beside inode and attributes they fit in a block, as they must.
pub(super) const REST_MAX: usize = 3072;

/// Files of so many bytes are in blocks of their own to their end: those alone a guest can read without a copy of its own, where the image is its
/// memory (Linux: fs/erofs/inode.c, `DAX_ALWAYS`). They grow by a sixteenth at most.
const MAPPED_MIN: u64 = 32 << 10;

impl Contents {
    /// Contents on their way into `file`; what is kept until the end is kept in `folder`.
    pub(super) fn new(file: File, folder: &Path) -> Result<Self> {
        let mut out = BufWriter::with_capacity(1 << 18, file);
        out.write_all(&[0; BLOCK])?;
        Ok(Self { out, next: 1, rests: BufWriter::new(tempfile::tempfile_in(folder)?), rests_end: 0 })
    }

    /// Takes a file's contents, `size` bytes.
    pub(super) fn add(&mut self, reader: &mut impl Read, size: u64) -> Result<Content> {
        let rest = size % BLOCK as u64;
        let whole = size - rest;
        let mut content = Content { size, first_block: self.next, kept_at: None };
        // Before anything is written: an entry can say any size, and bring it along as nothing.
        if u64::from(self.next) * BLOCK as u64 + size > BYTES_MAX {
            return Err(Error::other(format!("the layers have more than {} GiB", BYTES_MAX >> 30)));
        }
        self.use_blocks(whole / BLOCK as u64)?;
        let short = || Error::new(std::io::ErrorKind::UnexpectedEof, "the archive ends within a file");
        if copy(reader, &mut self.out, whole)? != whole {
            return Err(short());
        }
        if rest > REST_MAX as u64 || rest > 0 && size >= MAPPED_MIN {
            if copy(reader, &mut self.out, rest)? != rest {
                return Err(short());
            }
            self.pad(rest)?;
        } else if rest > 0 {
            content.kept_at = Some(self.rests_end);
            if copy(reader, &mut self.rests, rest)? != rest {
                return Err(short());
            }
            self.rests_end += rest;
        }
        Ok(content)
    }

    fn use_blocks(&mut self, count: u64) -> Result<()> {
        let count = u32::try_from(count).map_err(|_| too_large())?;
        self.next = self.next.checked_add(count).filter(|next| *next < NOWHERE).ok_or_else(too_large)?;
        Ok(())
    }

    /// Fills the block up of which `used` bytes were written.
    fn pad(&mut self, used: u64) -> Result<()> {
        let used = usize::try_from(used).unwrap_or(BLOCK);
        self.out.write_all(&ZEROS[used.min(BLOCK)..])?;
        self.use_blocks(1)
    }

    /// Writes bytes into blocks of their own, and gives the first one.
    fn block(&mut self, bytes: &[u8]) -> Result<u32> {
        let first = self.next;
        self.out.write_all(bytes)?;
        self.use_blocks((bytes.len() / BLOCK) as u64)?;
        let rest = bytes.len() % BLOCK;
        if rest > 0 {
            self.pad(rest as u64)?;
        }
        Ok(first)
    }
}

const ZEROS: [u8; BLOCK] = [0; BLOCK];

/// An inode that has its place.
struct Inode<'a> {
    node: &'a Node,
    /// Its number: its place among the inodes in units of [`SLOT`].
    number: u64,
    /// For a folder, the node that it is in.
    parent: usize,
    links: u32,
    /// Size of its data in bytes.
    size: u64,
    first_block: u32,
    /// How many bytes of its data lie behind it.
    inline: usize,
    /// Those bytes, where they are not kept in a file.
    rest: Vec<u8>,
}

/// Writes the tree behind the contents, and the superblock.
pub(super) fn finish(tree: Tree) -> Result<Size> {
    let Tree { nodes, mut contents, .. } = tree;
    let (mut inodes, order) = lay_out(&nodes);
    for node in &order {
        fill_folder(*node, &mut inodes, &mut contents)?;
    }
    let first_block = contents.next;
    let mut rests = contents.rests.into_inner().map_err(std::io::IntoInnerError::into_error)?;
    let mut out = contents.out;
    let mut at = 0;
    for (count, node) in order.iter().enumerate() {
        let Some(inode) = inodes.get(node) else { continue };
        let start = inode.number * SLOT as u64;
        let gap = usize::try_from(start - at).unwrap_or(BLOCK);
        out.write_all(ZEROS.get(..gap).ok_or_else(too_large)?)?;
        out.write_all(&inode.bytes(count))?;
        out.write_all(&attributes(inode.node))?;
        if let Body::File(Content { kept_at: Some(kept_at), .. }) = inode.node.body {
            rests.seek(SeekFrom::Start(kept_at))?;
            copy(&mut rests, &mut out, inode.inline as u64)?;
        } else {
            out.write_all(&inode.rest)?;
        }
        at = start + (INODE + attributes_bytes(&inode.node.attributes) + inode.inline) as u64;
    }
    let used = usize::try_from(at % BLOCK as u64).unwrap_or(0);
    if used > 0 {
        out.write_all(&ZEROS[used..])?;
    }
    let blocks = u32::try_from(at.div_ceil(BLOCK as u64)).ok().and_then(|blocks| first_block.checked_add(blocks));
    let blocks = blocks.ok_or_else(too_large)?;
    let root = inodes.get(&ROOT).map_or(0, |inode| inode.number);
    out.seek(SeekFrom::Start(SUPERBLOCK))?;
    out.write_all(&superblock(root, order.len() as u64, blocks, first_block))?;
    out.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()?;
    Ok(Size { blocks })
}

/// Gives each inode its place; the order is that of the places.
fn lay_out(nodes: &[Node]) -> (HashMap<usize, Inode<'_>>, Vec<usize>) {
    let (mut inodes, mut order) = (HashMap::new(), Vec::new());
    let mut todo = VecDeque::from([(ROOT, ROOT)]);
    // The number 0 would be no file to those who read folders.
    let mut at = INODE;
    while let Some((number, parent)) = todo.pop_front() {
        let Some(node) = nodes.get(number).filter(|_| !inodes.contains_key(&number)) else { continue };
        let mut inode = Inode {
            node,
            number: 0,
            parent,
            links: node.links,
            size: 0,
            first_block: NOWHERE,
            inline: 0,
            rest: Vec::new(),
        };
        match &node.body {
            Body::Directory(children) => {
                let is_folder =
                    |child: &&Child| matches!(nodes.get(child.node), Some(Node { body: Body::Directory(_), .. }));
                inode.links = 2 + u32::try_from(children.values().filter(is_folder).count()).unwrap_or(u32::MAX - 2);
                inode.size = split(names(children, 0, 0).iter().map(|(name, _)| name.len())).1;
                todo.extend(children.values().map(|child| (child.node, number)));
            }
            Body::File(content) => {
                (inode.size, inode.first_block) = (content.size, content.first_block);
                if content.kept_at.is_some() {
                    inode.inline = rest(content.size);
                }
            }
            Body::Symlink(target) => {
                (inode.size, inode.inline, inode.rest) = (target.len() as u64, target.len(), target.clone());
            }
            Body::Device(number) => inode.first_block = *number,
            Body::Other => inode.first_block = 0,
        }
        if let Body::Directory(_) = node.body
            && rest(inode.size) <= REST_MAX
        {
            inode.inline = rest(inode.size);
        }
        let bytes = INODE + attributes_bytes(&node.attributes) + inode.inline;
        // What lies behind an inode may not go over the end of a block.
        if inode.inline > 0 && at % BLOCK + bytes > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        inode.number = (at / SLOT) as u64;
        at = (at + bytes).next_multiple_of(SLOT);
        inodes.insert(number, inode);
        order.push(number);
    }
    (inodes, order)
}

/// Bytes that fill no block.
fn rest(size: u64) -> usize {
    usize::try_from(size % BLOCK as u64).unwrap_or(0)
}

/// All names of a folder with their nodes, in the order of their bytes, as they are looked up.
fn names(children: &Children, own: usize, parent: usize) -> Vec<(&[u8], usize)> {
    let mut all: Vec<(&[u8], usize)> = vec![(b".", own), (b"..", parent)];
    all.extend(children.iter().map(|(name, child)| (name.as_slice(), child.node)));
    all.sort_unstable();
    all
}

/// How names of these lengths go into blocks: how many are in each, and the size of it all, of whose last block only what is used
/// counts.
fn split(lengths: impl Iterator<Item = usize>) -> (Vec<usize>, u64) {
    let (mut blocks, mut used) = (vec![0], 0);
    for length in lengths {
        if used + ENTRY + length > BLOCK {
            blocks.push(0);
            used = 0;
        }
        used += ENTRY + length;
        if let Some(count) = blocks.last_mut() {
            *count += 1;
        }
    }
    let size = ((blocks.len() - 1) * BLOCK + used) as u64;
    (blocks, size)
}

/// Writes a folder's entries: whole blocks to where contents are, the rest to its inode.
fn fill_folder(number: usize, inodes: &mut HashMap<usize, Inode<'_>>, contents: &mut Contents) -> Result<()> {
    let Some(Inode { node: Node { body: Body::Directory(children), .. }, parent, inline, .. }) = inodes.get(&number)
    else {
        return Ok(());
    };
    let names = names(children, number, *parent);
    let (blocks, _) = split(names.iter().map(|(name, _)| name.len()));
    let (mut bytes, mut names, inline) = (Vec::new(), names.as_slice(), *inline);
    for count in blocks {
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        let (now, later) = names.split_at(count.min(names.len()));
        let mut name_at = count * ENTRY;
        for (name, node) in now {
            let child = inodes.get(node).ok_or_else(|| Error::other("a folder names a file that has no place"))?;
            bytes.extend(child.number.to_le_bytes());
            bytes.extend(u16::try_from(name_at).unwrap_or(0).to_le_bytes());
            bytes.extend([file_type(child.node), 0]);
            name_at += name.len();
        }
        bytes.extend(now.iter().flat_map(|(name, _)| name.iter()));
        names = later;
    }
    let behind = bytes.split_off(bytes.len() - inline);
    let first_block = if bytes.is_empty() { NOWHERE } else { contents.block(&bytes)? };
    if let Some(inode) = inodes.get_mut(&number) {
        (inode.first_block, inode.rest) = (first_block, behind);
    }
    Ok(())
}

impl Inode<'_> {
    /// `struct erofs_inode_extended`.
    fn bytes(&self, count: usize) -> [u8; INODE] {
        let attributes = attributes_bytes(&self.node.attributes);
        let layout = if self.inline > 0 { FLAT_INLINE } else { FLAT_PLAIN };
        let units = if attributes == 0 { 0 } else { (attributes - ATTRIBUTES_HEADER) / 4 + 1 };
        let mut out = [0; INODE];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(place) = out.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(0, &(1 | layout << 1).to_le_bytes());
        put(2, &u16::try_from(units).unwrap_or(0).to_le_bytes());
        put(4, &self.node.mode.to_le_bytes());
        put(8, &self.size.to_le_bytes());
        put(16, &self.first_block.to_le_bytes());
        // For programs of 32 bits; a file's own number is its place.
        put(20, &u32::try_from(count + 1).unwrap_or(u32::MAX).to_le_bytes());
        put(24, &self.node.uid.to_le_bytes());
        put(28, &self.node.gid.to_le_bytes());
        put(32, &self.node.mtime.to_le_bytes());
        put(44, &self.links.to_le_bytes());
        out
    }
}

/// The kernel's numbers for the beginnings of attributes' names.
const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];

/// An attribute's name as it is stored: the number of its beginning, and the rest.
fn short(name: &[u8]) -> (u8, &[u8]) {
    PREFIXES.iter().find_map(|(prefix, number)| Some((*number, name.strip_prefix(*prefix)?))).unwrap_or((0, name))
}

/// How many bytes an inode's attributes take.
pub(super) fn attributes_bytes(attributes: &BTreeMap<Vec<u8>, Vec<u8>>) -> usize {
    if attributes.is_empty() {
        return 0;
    }
    let all = attributes.iter();
    let sizes = all.map(|(name, value)| (ATTRIBUTE_HEADER + short(name).1.len() + value.len()).next_multiple_of(4));
    ATTRIBUTES_HEADER + sizes.sum::<usize>()
}

/// `struct erofs_xattr_ibody_header` and an `erofs_xattr_entry` for each.
fn attributes(node: &Node) -> Vec<u8> {
    if node.attributes.is_empty() {
        return Vec::new();
    }
    let mut out = vec![0; ATTRIBUTES_HEADER];
    for (name, value) in &node.attributes {
        let (index, name) = short(name);
        out.extend([u8::try_from(name.len()).unwrap_or(0), index]);
        out.extend(u16::try_from(value.len()).unwrap_or(0).to_le_bytes());
        out.extend(name);
        out.extend(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

/// `struct erofs_super_block`.
fn superblock(root: u64, files: u64, blocks: u32, inodes: u32) -> [u8; 128] {
    let mut out = [0; 128];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = out.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &MAGIC.to_le_bytes());
    put(8, &COMPAT_MTIME.to_le_bytes());
    put(12, &[u8::try_from(BLOCK.trailing_zeros()).unwrap_or(0)]);
    put(14, &u16::try_from(root).unwrap_or(0).to_le_bytes());
    put(16, &files.to_le_bytes());
    put(36, &blocks.to_le_bytes());
    put(40, &inodes.to_le_bytes());
    out
}

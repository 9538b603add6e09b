use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use tar::EntryType;

use super::*;

/// What a test reads back of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Seen {
    mode: u16,
    owner: (u32, u32),
    mtime: u64,
    links: u32,
    number: u64,
    data: Vec<u8>,
    device: u32,
    attributes: Vec<(u8, Vec<u8>, Vec<u8>)>,
}

/// A reader of its own, by the kernel's description of the format.
struct Image(Vec<u8>);

impl Image {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn inode(&self, number: u64) -> Seen {
        let inodes = self.u32(1024 + 40) as usize * BLOCK;
        let at = inodes + usize::try_from(number).unwrap() * 32;
        let format = self.u16(at);
        assert_eq!(format & 1, 1, "an extended inode");
        let units = usize::from(self.u16(at + 2));
        let attributes_size = if units == 0 { 0 } else { 12 + 4 * (units - 1) };
        let (mode, size, block) = (self.u16(at + 4), usize::try_from(self.u64(at + 8)).unwrap(), self.u32(at + 16));
        let mut seen = Seen {
            mode,
            owner: (self.u32(at + 24), self.u32(at + 28)),
            mtime: self.u64(at + 32),
            links: self.u32(at + 44),
            number,
            ..Seen::default()
        };
        let mut attribute = at + 64 + 12;
        while attribute < at + 64 + attributes_size {
            let (name, value) = (usize::from(self.0[attribute]), usize::from(self.u16(attribute + 2)));
            let start = attribute + 4;
            let (name, value) = (start..start + name, start + name..start + name + value);
            attribute = (value.end - at).next_multiple_of(4) + at;
            seen.attributes.push((self.0[start - 3], self.0[name].to_vec(), self.0[value].to_vec()));
        }
        match mode & 0o170_000 {
            0o100_000 | 0o040_000 | 0o120_000 => {
                let behind = if format >> 1 == 2 { size % BLOCK } else { 0 };
                let whole = size - behind;
                if whole > 0 {
                    let first = block as usize * BLOCK;
                    seen.data.extend(&self.0[first..first + whole]);
                }
                let start = at + 64 + attributes_size;
                if behind > 0 {
                    assert_eq!(start / BLOCK, (start + behind - 1) / BLOCK, "what is behind an inode is in one block");
                }
                seen.data.extend(&self.0[start..start + behind]);
            }
            _ => seen.device = block,
        }
        seen
    }

    fn folder(&self, path: &str, number: u64, parent: u64, all: &mut BTreeMap<String, Seen>) {
        let seen = self.inode(number);
        let mut names: Vec<Vec<u8>> = Vec::new();
        for block in seen.data.chunks(BLOCK) {
            let count = usize::from(u16::from_le_bytes(block[8..10].try_into().unwrap())) / 12;
            let place = |entry: usize| usize::from(u16::from_le_bytes([block[entry * 12 + 8], block[entry * 12 + 9]]));
            for entry in 0..count {
                let end = if entry + 1 < count { place(entry + 1) } else { block.len() };
                let name: Vec<u8> = block[place(entry)..end].iter().copied().take_while(|byte| *byte != 0).collect();
                let child = u64::from_le_bytes(block[entry * 12..entry * 12 + 8].try_into().unwrap());
                match name.as_slice() {
                    b"." => assert_eq!(child, number),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        let inner = format!("{path}/{}", String::from_utf8_lossy(&name));
                        let is_folder = block[entry * 12 + 10] == 2;
                        assert_eq!(is_folder, self.inode(child).mode & 0o170_000 == 0o040_000);
                        if is_folder {
                            self.folder(&inner, child, number, all);
                        } else {
                            all.insert(inner, self.inode(child));
                        }
                    }
                }
                names.push(name);
            }
        }
        assert!(names.is_sorted(), "names are looked up by bisection: {names:?}");
        all.insert(if path.is_empty() { "/".into() } else { path.into() }, Seen { data: Vec::new(), ..seen });
    }

    fn all(&self) -> BTreeMap<String, Seen> {
        assert_eq!(self.u32(1024), 0xe0f5_e1e2);
        assert_eq!(self.0.len(), self.u32(1024 + 36) as usize * BLOCK);
        let (mut all, root) = (BTreeMap::new(), u64::from(self.u16(1024 + 14)));
        self.folder("", root, root, &mut all);
        all
    }
}

struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    /// Adds an entry whose name is written as it is, `..` and all.
    fn with(mut self, name: &str, kind: EntryType, content: &[u8]) -> Self {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o4751);
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_700_000_000);
        let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
        if is_link {
            header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content);
        }
        if kind == EntryType::Char {
            header.set_device_major(1).unwrap();
            header.set_device_minor(259).unwrap();
        }
        let content = if is_link { &[] } else { content };
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    fn folder(self, name: &str) -> Self {
        self.with(name, EntryType::Directory, b"")
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.with(name, EntryType::Regular, content)
    }

    fn attributes(mut self, all: &[(&str, &[u8])]) -> Self {
        self.0.append_pax_extensions(all.iter().copied()).unwrap();
        self
    }
}

fn image(archives: Vec<Archive>, is_lowest: bool) -> Result<(BTreeMap<String, Seen>, Stands)> {
    let folder = tempfile::tempdir().unwrap();
    let layers = archives.into_iter().enumerate().map(|(number, archive)| {
        let file = folder.path().join(number.to_string());
        let bytes = archive.0.into_inner().unwrap();
        let diff_id = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        std::fs::write(&file, bytes).unwrap();
        Layer { file, digest: None, diff_id }
    });
    let layers: Vec<Layer> = layers.collect();
    let path = folder.path().join("image");
    let (size, stands) = write(&layers, is_lowest, &path)?;
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), size.blocks as usize * BLOCK);
    write(&layers, is_lowest, &path).unwrap();
    assert_eq!(bytes, std::fs::read(&path).unwrap(), "the same layers make the same bytes");
    Ok((Image(bytes).all(), stands))
}

fn one(archive: Archive) -> BTreeMap<String, Seen> {
    image(vec![archive], true).unwrap().0
}

fn refusal(archive: Archive) -> String {
    image(vec![archive], true).unwrap_err().to_string()
}

#[test]
fn contents_of_every_size_come_back() {
    let sizes = [0, 1, 31, 3071, 3072, 3073, 4095, 4096, 4097, 8192, 11_264, 11_265, 1 << 20];
    let content = |size: usize| -> Vec<u8> { (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect() };
    let archive =
        sizes.iter().fold(Archive::new().folder("d"), |all, size| all.file(&format!("d/{size}"), &content(*size)));
    let all = one(archive);
    for size in sizes {
        let seen = &all[&format!("/d/{size}")];
        assert_eq!(seen.data, content(size), "{size}");
        assert_eq!((seen.mode, seen.owner, seen.mtime, seen.links), (0o104_751, (1000, 1001), 1_700_000_000, 1));
    }
    assert_eq!(all["/d"].mode, 0o044_751);
    assert_eq!((all["/d"].links, all["/"].links), (2, 3));
}

#[test]
fn folders_of_every_size_come_back() {
    // Names around the dots' place in the order, and as many as fill blocks to the last byte and beyond.
    for count in [1, 2, 50, 200, 1000] {
        let names: Vec<String> = (0..count).map(|number| format!("-{number:0>60}")).collect();
        let archive = names.iter().fold(Archive::new(), |all, name| all.file(name, b"x"));
        let all = one(archive.file("zz", b"").file("+", b""));
        assert_eq!(all.len(), count + 3);
        assert!(names.iter().all(|name| all.contains_key(&format!("/{name}"))));
    }
}

#[test]
fn every_type_of_file_comes_back() {
    let archive = Archive::new()
        .folder("usr")
        .with("bin", EntryType::Symlink, b"usr/./bin")
        // A folder that no entry names, behind a link.
        .file("bin/tool", b"#!")
        .with("hard", EntryType::Link, b"usr/bin/tool")
        .with("null", EntryType::Char, b"")
        .with("pipe", EntryType::Fifo, b"")
        .attributes(&[
            ("SCHILY.xattr.user.note", b"hello"),
            ("SCHILY.xattr.security.capability", &[1, 2, 3]),
            ("SCHILY.xattr.security.selinux", b"x"),
        ])
        .file("tagged", b"content");
    let all = one(archive);
    assert_eq!((all["/bin"].mode & 0o170_000, all["/bin"].data.as_slice()), (0o120_000, b"usr/./bin".as_slice()));
    assert_eq!(all["/usr/bin/tool"].links, 2);
    assert_eq!(all["/usr/bin/tool"].number, all["/hard"].number);
    assert_eq!((all["/usr/bin"].mode, all["/usr/bin"].owner), (0o040_755, (0, 0)));
    // Major 1, minor 259.
    assert_eq!((all["/null"].mode & 0o170_000, all["/null"].device), (0o020_000, 0x0010_0103));
    assert_eq!(all["/pipe"].mode & 0o170_000, 0o010_000);
    let attributes = [(1, b"note".to_vec(), b"hello".to_vec()), (6, b"capability".to_vec(), vec![1, 2, 3])];
    let mut found = all["/tagged"].attributes.clone();
    found.sort();
    assert_eq!((found.as_slice(), all["/tagged"].data.as_slice()), (attributes.as_slice(), b"content".as_slice()));
}

#[test]
fn nothing_leaves_the_root_and_nothing_runs_on_for_ever() {
    for (name, kind, content) in [
        ("../evil", EntryType::Regular, &b"x"[..]),
        ("a/../../evil", EntryType::Regular, b"x"),
        ("a/.wh...", EntryType::Regular, b""),
        ("a/.wh.", EntryType::Regular, b""),
        ("link", EntryType::Link, b"../secret"),
        ("link", EntryType::Link, b"missing"),
        ("link", EntryType::Symlink, b""),
    ] {
        assert!(refusal(Archive::new().with(name, kind, content)).contains("refused"), "{name}");
    }
    let circle = Archive::new().with("a", EntryType::Symlink, b"b").with("b", EntryType::Symlink, b"a");
    assert!(refusal(circle.file("a/x", b"")).contains("too many links"));
    assert!(refusal(Archive::new().file("a", b"").file("a/x", b"")).contains("no folder"));
    let folder = Archive::new().folder("d").with("hard", EntryType::Link, b"d");
    assert!(refusal(folder).contains("links to a folder"));
    let long = [b'v'; 900];
    let large = Archive::new().attributes(&[("SCHILY.xattr.user.a", &long)]).file("f", b"");
    assert!(refusal(large).contains("attributes"));
    // Links that lead out lead to the image's own root.
    let all = one(Archive::new().with("up", EntryType::Symlink, b"../../..").file("up/x", b"y"));
    assert_eq!(all["/x"].data, b"y");
}

#[test]
fn layers_on_one_another_hide_what_they_say() {
    let below = || {
        Archive::new()
            .folder("a")
            .file("a/x", b"1")
            .folder("a/y")
            .file("a/y/z", b"2")
            .folder("b")
            .file("b/old", b"3")
            .file("f", b"4")
    };
    let above = || {
        Archive::new()
            .folder("a")
            .file("a/.wh.y", b"")
            .folder("b")
            .file("b/new", b"5")
            .file("b/.wh..wh..opq", b"")
            .file(".wh.f", b"")
    };
    let (all, _) = image(vec![below(), above()], true).unwrap();
    assert_eq!(all.keys().map(String::as_str).collect::<Vec<_>>(), ["/", "/a", "/a/x", "/b", "/b/new"]);
    // By itself the layer has the marks of overlayfs.
    let (all, stands) = image(vec![above()], false).unwrap();
    assert_eq!(stands, Stands::Alone);
    for hidden in ["/a/y", "/f"] {
        assert_eq!((all[hidden].mode & 0o170_000, all[hidden].device), (0o020_000, 0), "{hidden}");
    }
    assert_eq!(all["/b"].attributes, [(4, b"overlay.opaque".to_vec(), b"y".to_vec())]);
    // A folder that takes the place of a hidden one shows nothing of it.
    let (all, _) = image(vec![Archive::new().file(".wh.d", b"").folder("d")], false).unwrap();
    assert_eq!(all["/d"].attributes.len(), 1);
    let (all, _) = image(vec![Archive::new().folder("d").file(".wh.d", b"").folder("d")], false).unwrap();
    assert_eq!(all["/d"].attributes.len(), 1);
}

#[test]
fn names_of_a_layer_survive_what_it_hides() {
    // A hard link to a file of another layer is this layer's, wherever the file was first.
    let below = || {
        Archive::new().folder("a").folder("b").file("b/old", b"1").file("a/gone", b"2").folder("d").file("d/gone", b"3")
    };
    let above = Archive::new()
        .with("a/new", EntryType::Link, b"b/old")
        .file("a/.wh..wh..opq", b"")
        .file("d/x", b"4")
        .file(".wh.d", b"");
    let (all, _) = image(vec![below(), above], true).unwrap();
    assert_eq!(all["/a/new"].number, all["/b/old"].number);
    assert!(
        all.contains_key("/d/x") && !all.contains_key("/a/gone") && !all.contains_key("/d/gone"),
        "{:?}",
        all.keys()
    );
    // A file below a name that the same layer hides, in a folder of which it says nothing.
    let (all, stands) = image(vec![Archive::new().file(".wh.d", b"").file("d/x", b"")], false).unwrap();
    assert_eq!((all["/d"].attributes.len(), stands), (1, Stands::OnOthers));
    // In an opaque folder there is nothing to hide.
    let opaque = Archive::new().folder("d").file("d/.wh..wh..opq", b"").file("d/.wh.x", b"");
    assert!(!image(vec![opaque], false).unwrap().0.contains_key("/d/x"));
    // overlayfs does not look for the mark at a layer's root.
    assert_eq!(image(vec![Archive::new().file(".wh..wh..opq", b"")], false).unwrap().1, Stands::OnOthers);
}

#[test]
fn a_hard_links_target_may_lead_through_links() {
    let below = || Archive::new().folder("usr").folder("usr/bin").with("bin", EntryType::Symlink, b"usr/bin");
    let above = || Archive::new().file("bin/tool", b"#!").with("bin/sh", EntryType::Link, b"bin/tool");
    let (all, _) = image(vec![below(), above()], true).unwrap();
    assert_eq!(all["/usr/bin/sh"].number, all["/usr/bin/tool"].number);
    assert_eq!(image(vec![above()], false).unwrap().1, Stands::OnOthers);
}

#[test]
fn what_is_too_much_is_refused_before_it_is_made() {
    // Names cost memory, whether they are of files or of links to one.
    let mut tree = Tree::new(Contents::new(tempfile::tempfile().unwrap(), std::path::Path::new("/tmp")).unwrap(), true);
    let name = |number: u32| format!("{number}-{}", "n".repeat(90));
    let archive =
        (0..100).fold(Archive::new().file("f", b""), |all, number| all.with(&name(number), EntryType::Link, b"f"));
    let bytes = archive.0.into_inner().unwrap();
    tree.apply(&mut bytes.as_slice()).unwrap();
    assert!(tree.memory() > 100 * 150, "{}", tree.memory());
    // A file that says a size which nobody has.
    let mut header = tar::Header::new_ustar();
    header.as_mut_bytes()[..1].copy_from_slice(b"f");
    header.set_size(1 << 50);
    header.set_mode(0o644);
    header.set_cksum();
    let error = tree.apply(&mut header.as_bytes().as_slice()).unwrap_err().to_string();
    assert!(error.contains("256 GiB"), "{error}");
}

#[test]
fn a_layer_that_needs_others_says_so() {
    let link = || Archive::new().with("hard", EntryType::Link, b"below");
    assert_eq!(image(vec![link()], false).unwrap().1, Stands::OnOthers);
    // What the folder is like only the layer below may know.
    assert_eq!(image(vec![Archive::new().file("tmp/x", b"")], false).unwrap().1, Stands::OnOthers);
    assert_eq!(image(vec![Archive::new().folder("tmp").file("tmp/x", b"")], false).unwrap().1, Stands::Alone);
    let (all, _) = image(vec![Archive::new().file("below", b"b"), link()], true).unwrap();
    assert_eq!(all["/hard"].data, b"b");
}

//! A layer of an image, unpacked into a folder and made into a disk.

use std::path::Path;

/// Runs one input: the layer's archive, with any contents behind its headers.
///
/// # Panics
/// Where something of it is outside of the folder.
pub fn one(data: &[u8]) {
    let work = tempfile::tempdir().expect("a folder");
    let (root, beside) = (work.path().join("root"), work.path().join("beside"));
    for folder in [&root, &beside] {
        std::fs::create_dir(folder).expect("a folder");
    }
    let archive = whole(data);
    let _ = coracle_images::fuzzing::unpack(&archive, &root);
    let _ = coracle_images::fuzzing::disk(&archive, &work.path().join("disk"));
    assert_eq!(std::fs::read_dir(&beside).expect("a folder").count(), 0, "something came beside the root");
    let known = ["root", "beside", "disk"];
    let names = std::fs::read_dir(work.path()).expect("a folder").flatten().map(|entry| entry.file_name());
    assert!(names.into_iter().all(|name| known.iter().any(|known| name == *known)), "something came above the root");
    assert!(!Path::new("/coracle-fuzz").exists());
}

/// An archive (ustar, pax(1)) of entries: each is said by a few bytes, a kind, and two names; checksums are right, so that what is behind them is read.
fn whole(data: &[u8]) -> Vec<u8> {
    const KINDS: [u8; 12] = [b'0', b'1', b'2', b'3', b'4', b'5', b'6', b'L', b'K', b'x', b'g', b'S'];
    const NAMES: [&str; 16] = [
        "a",
        "b",
        "a/b",
        "a/b/c",
        "..",
        "../beside/x",
        "/beside/x",
        "a/../../beside/x",
        ".wh.a",
        "a/.wh.b",
        "a/.wh..wh..opq",
        ".wh..",
        "./a",
        "",
        "/coracle-fuzz",
        "a/.",
    ];
    let mut archive = Vec::new();
    for entry in data.chunks(6) {
        let at = |place: usize| entry.get(place).copied().unwrap_or_default();
        let kind = KINDS[usize::from(at(0)) % KINDS.len()];
        let mut header = [0_u8; 512];
        let name = NAMES[usize::from(at(1)) % NAMES.len()];
        let link = NAMES[usize::from(at(2)) % NAMES.len()];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header[156] = kind;
        // A record of another path or link (pax(1)), whose length is in front of it.
        let record = format!("{}={link}\n", if at(3) % 2 == 0 { "path" } else { "linkpath" });
        let record = format!("{} {record}", record.len() + 3);
        let is_record = matches!(kind, b'x' | b'g');
        let size = if is_record { record.len() } else { usize::from(at(3)) };
        header[100..108].copy_from_slice(format!("{:07o}\0", u32::from(at(4)) * 17).as_bytes());
        header[108..116].copy_from_slice(b"0000000\0");
        header[116..124].copy_from_slice(b"0000000\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", size).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[257..265].copy_from_slice(b"ustar\x0000");
        // A byte that is wrong, now and then.
        if at(5) > 200 {
            header[usize::from(at(5)) * 2] ^= at(4);
        }
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.extend(header);
        let mut contents: Vec<u8> = entry.iter().cycle().take(size).copied().collect();
        if is_record {
            contents = record.into_bytes();
        }
        contents.resize(size.next_multiple_of(512), 0);
        archive.extend(contents);
    }
    archive.extend([0; 1024]);
    archive
}

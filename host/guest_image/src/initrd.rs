//! The initrd: a cpio archive in the `newc` form (kernel: Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! It is not compressed: unpacking costs a guest more than reading. No entry carries a time or an owner but 0.

use std::io::Write;

use cpio::newc;

use crate::Error;
use crate::modules::{Module, Need};

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;

/// The archive with `agent` as `/init` and the modules in their order; and with busybox, or a program like it, for the debug console.
pub(crate) fn pack(agent: &[u8], modules: &[Module], shell: Option<&[u8]>) -> Result<Vec<u8>, Error> {
    let line = |module: &Module| match &module.need {
        Need::Always => format!("{}\n", module.file),
        Need::Device(device) => format!("{} {device}\n", module.file),
        Need::FromStart(device) => format!("{} {device} start\n", module.file),
    };
    let order: String = modules.iter().map(line).collect();
    let mut entries: Vec<(String, u32, &[u8])> = Vec::new();
    for folder in ["dev", "proc", "sys", "run", "modules"] {
        entries.push((folder.to_owned(), DIRECTORY, &[]));
    }
    entries.push(("init".to_owned(), PROGRAM, agent));
    if let Some(shell) = shell {
        entries.push(("bin".to_owned(), DIRECTORY, &[]));
        entries.push(("bin/busybox".to_owned(), PROGRAM, shell));
    }
    entries.push(("modules/order".to_owned(), FILE, order.as_bytes()));
    for module in modules {
        entries.push((format!("modules/{}", module.file), FILE, &module.content));
    }
    let mut archive = Vec::new();
    for (number, (name, mode, bytes)) in entries.iter().enumerate() {
        let inode = u32::try_from(number + 1).map_err(|_| Error::Kernel("too many files for an initrd".into()))?;
        let size =
            u32::try_from(bytes.len()).map_err(|_| Error::Kernel(format!("{name} is too large for an initrd")))?;
        let links = if *mode == DIRECTORY { 2 } else { 1 };
        let builder = newc::Builder::new(name).ino(inode).mode(*mode).nlink(links);
        let write = || {
            let mut writer = builder.write(&mut archive, size);
            writer.write_all(bytes)?;
            writer.finish().map(drop)
        };
        write().map_err(|error: std::io::Error| Error::Kernel(format!("the initrd: {error}")))?;
    }
    newc::trailer(&mut archive).map_err(|error| Error::Kernel(format!("the initrd: {error}")))?;
    Ok(archive)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_input_gives_the_same_bytes() {
        let module = |file: &str, need: Need| Module { file: file.into(), content: vec![1, 2, 3], need };
        let device = "virtio:d1v".to_owned();
        let modules = [
            module("a.ko", Need::Always),
            module("b.ko", Need::Device(device.clone())),
            module("c.ko", Need::FromStart(device)),
        ];
        let first = pack(b"agent", &modules, None).unwrap();
        assert_eq!(first, pack(b"agent", &modules, None).unwrap());
        assert!(first.starts_with(b"070701"));
        let mut reader = newc::Reader::new(first.as_slice()).unwrap();
        let mut names = Vec::new();
        while !reader.entry().is_trailer() {
            names.push(reader.entry().name().to_owned());
            assert_eq!((reader.entry().mtime(), reader.entry().uid()), (0, 0));
            if names.last().is_some_and(|name| name == "modules/order") {
                let mut order = String::new();
                std::io::Read::read_to_string(&mut reader, &mut order).unwrap();
                assert_eq!(order, "a.ko\nb.ko virtio:d1v\nc.ko virtio:d1v start\n");
            }
            reader = newc::Reader::new(reader.finish().unwrap()).unwrap();
        }
        let files = ["init", "modules/order", "modules/a.ko", "modules/b.ko", "modules/c.ko"];
        assert_eq!(names, [&["dev", "proc", "sys", "run", "modules"][..], &files].concat());
    }
}

//! What the clone's kernel starts from: a cpio archive in the `newc` form, with busybox, modules and scripts.

use std::io::Write;

use anyhow::{Context, Result};
use cpio::newc;

use super::modules::Module;
use super::script::{self, Job};
use crate::image;

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;
const PROGRAM: u32 = 0o100_755;

const FOLDERS: [&str; 9] = ["bin", "clone", "dev", "lab", "lower", "modules", "proc", "sys", "upper"];

/// The archive. It is not compressed: it is never written anywhere.
pub(crate) fn pack(modules: &[Module], job: &Job<'_>) -> Result<Vec<u8>> {
    let busybox = image::busybox()?;
    let order: String = modules.iter().map(|module| format!("{}\n", module.file)).collect();
    let (start, command) = (script::start(job), script::command(job));
    let mut entries: Vec<(String, u32, &[u8])> =
        FOLDERS.iter().map(|name| ((*name).to_owned(), DIRECTORY, &[][..])).collect();
    entries.push(("init".to_owned(), PROGRAM, script::INIT.as_bytes()));
    entries.push(("bin/busybox".to_owned(), PROGRAM, &busybox));
    entries.extend(script::APPLETS.iter().map(|name| (format!("bin/{name}"), LINK, &b"busybox"[..])));
    entries.push(("lab/start".to_owned(), FILE, &start));
    entries.push(("lab/command".to_owned(), FILE, &command));
    entries.push(("modules/order".to_owned(), FILE, order.as_bytes()));
    entries.extend(modules.iter().map(|module| (format!("modules/{}", module.file), FILE, module.content.as_slice())));
    let mut archive = Vec::new();
    for (number, (name, mode, bytes)) in entries.iter().enumerate() {
        let builder = newc::Builder::new(name).ino(u32::try_from(number + 1)?).mode(*mode);
        let mut writer = builder.write(&mut archive, u32::try_from(bytes.len())?);
        writer.write_all(bytes).and_then(|()| writer.finish()).with_context(|| format!("pack {name}"))?;
    }
    newc::trailer(&mut archive).context("pack the initrd")?;
    Ok(archive)
}

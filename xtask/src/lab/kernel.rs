//! The clone's kernel: a distribution's package, unpacked once into a folder of the cache.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::cache;
use crate::setup;
use crate::steps::{self, command, output};

/// An unpacked kernel package.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) folder: PathBuf,
    /// As `uname -r` gives it.
    pub(crate) release: String,
    pub(crate) vmlinuz: PathBuf,
}

impl Kernel {
    /// Finds the kernel in an unpacked package.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let boot = std::fs::read_dir(folder.join("boot")).into_iter().flatten().flatten();
        let found = boot.map(|entry| entry.path()).find_map(|path| {
            let release = path.file_name()?.to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            Some(Self { folder: folder.to_owned(), release, vmlinuz: path })
        });
        let kernel = found.context("the package holds no boot/vmlinuz-*: give one that is named linux-image-*")?;
        if !kernel.modules().join("modules.builtin").exists() {
            bail!(
                "the package holds no modules of the kernel {}: give one that is named linux-image-*",
                kernel.release
            );
        }
        Ok(kernel)
    }

    /// The folder of its modules.
    pub(crate) fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules").join(&self.release)
    }
}

/// The kernel of a package's file.
pub(crate) fn from_file(cache: &Path, file: &Path) -> Result<Kernel> {
    let wanted = || format!("--kernel {}: the .deb file of a linux-image-* package is wanted", file.display());
    let metadata = std::fs::metadata(file).with_context(wanted)?;
    let file = file.canonicalize().with_context(wanted)?;
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    // Another file of the same name has another length or another time.
    let name = format!("{stem}-{:x}-{:x}-{:x}", metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    kept(cache, &name, |folder| unpack(&file, folder)).with_context(wanted)
}

/// The newest kernel that apt knows, of those that the package `of` stands for.
pub(crate) fn newest(cache: &Path, of: &str) -> Result<Kernel> {
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("this system has no apt-get: give a kernel package by --kernel DEB");
    }
    // apt's lists may be missing on a fresh machine.
    let name = concrete(of).or_else(|_| setup::update_lists().and_then(|()| concrete(of)))?;
    kept(cache, &name, |folder| cache::fetch(&name, folder, unpack))
}

/// The package with files behind `of`, which only depends on it.
fn concrete(of: &str) -> Result<String> {
    let text = output(command("apt-cache", &["depends", "--important", of]))?;
    let mut dependencies = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let found = dependencies.find(|name| name.starts_with("linux-image-"));
    found.map(str::to_owned).with_context(|| {
        format!("apt knows no {of} that stands for a kernel: give the lab a kernel package by --kernel DEB")
    })
}

/// The kernel of that name in the cache, where `make` puts it if it is not there.
fn kept(cache: &Path, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<Kernel> {
    let made = |folder: &Path| make(folder).and_then(|()| index(&Kernel::open(folder)?));
    Kernel::open(&cache::kept(cache, name, made)?)
}

fn unpack(file: &Path, folder: &Path) -> Result<()> {
    cache::unpack(file, folder)?;
    // Where a package has its modules depends on the release; where depmod looks for them, too.
    for (link, target) in [("lib/modules", "../usr/lib/modules"), ("usr/lib/modules", "../../lib/modules")] {
        let link = folder.join(link);
        if let (false, Some(parent)) = (link.exists(), link.parent()) {
            let make = std::fs::create_dir_all(parent).and_then(|()| std::os::unix::fs::symlink(target, &link));
            make.with_context(|| format!("make {}", link.display()))?;
        }
    }
    Ok(())
}

/// Makes the list of dependencies, which Debian makes where a kernel is installed.
fn index(kernel: &Kernel) -> Result<()> {
    if kernel.modules().join("modules.dep").exists() {
        return Ok(());
    }
    let mut depmod = command("/sbin/depmod", &["--basedir"]);
    depmod.arg(&kernel.folder).arg(&kernel.release);
    steps::run(depmod)
}

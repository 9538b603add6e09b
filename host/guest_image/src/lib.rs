//! The guest image: a kernel as an ELF file, an initrd with the agent as `/init`, and a manifest that says what they are.
//!
//! It is made from a distribution's kernel package and our agent, without root, and reproducibly: the same package and the
//! same agent give the same bytes.
//!
//! ```text
//! linux-image-*.deb ─┬─ boot/vmlinuz-* ─ bzImage ─▶ vmlinux          (kernel.rs)
//!                    └─ lib/modules/*  ─ those of the recipe ─┐      (package.rs, modules.rs)
//! coracle-agent ────────────────────────────────────── /init ─┴▶ initrd.img   (initrd.rs)
//! ```

mod initrd;
mod kernel;
mod modules;
mod package;
mod recipe;

use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use package::Package;
pub use recipe::{Recipe, command_line};

/// What the manifest's format is called; a reader refuses another.
const FORMAT: u32 = 1;

/// Why an image could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel package has not what is needed.
    #[error("the kernel package {package}: {problem}")]
    Package {
        /// The file.
        package: PathBuf,
        /// What is missing or wrong.
        problem: String,
    },
    /// The kernel image can't be read.
    #[error("the kernel image is not usable: {0}")]
    Kernel(String),
    /// The image's manifest is malformed.
    #[error("{path} is not a guest image's manifest ({problem}): run `coracle image build`")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl Error {
    fn file(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
}

/// What an image says of itself, in `manifest.json` beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format of this file.
    pub format: u32,
    /// The version of the agent in it.
    pub version: String,
    /// The kernel's release, as `uname -r` gives it.
    pub kernel_release: String,
    /// SHA-256 of the kernel file, as hexadecimal digits.
    pub kernel_sha256: String,
    /// SHA-256 of the initrd, as hexadecimal digits.
    pub initrd_sha256: String,
}

/// The file names of an image.
pub const KERNEL: &str = "vmlinux";
/// See [`KERNEL`].
pub const INITRD: &str = "initrd.img";
/// See [`KERNEL`].
pub const MANIFEST: &str = "manifest.json";

/// Makes an image in `folder` with a shell for the debug console where one is given, a static program as busybox is. The folder is made where it is missing; what is there is replaced, file by file.
///
/// # Errors
/// [`Error`].
pub fn build(package: &Package, agent: &Path, shell: Option<&Path>, folder: &Path) -> Result<Manifest, Error> {
    let recipe = Recipe::ours();
    let kernel = kernel::extract(package.vmlinuz())?;
    let modules = modules::choose(package, &recipe)?;
    let agent = std::fs::read(agent).map_err(Error::file(agent))?;
    let shell = shell.map(|shell| std::fs::read(shell).map_err(Error::file(shell))).transpose()?;
    let initrd = initrd::pack(&agent, &modules, shell.as_deref())?;
    std::fs::create_dir_all(folder).map_err(Error::file(folder))?;
    let manifest = Manifest {
        format: FORMAT,
        version: coracle_protocol::VERSION.to_owned(),
        kernel_release: package.release().to_owned(),
        kernel_sha256: hex::encode(Sha256::digest(&kernel)),
        initrd_sha256: hex::encode(Sha256::digest(&initrd)),
    };
    let text = serde_json::to_string_pretty(&manifest).map_err(|error| Error::Kernel(error.to_string()))?;
    // The manifest last: whoever reads it finds what it names.
    replace(&folder.join(KERNEL), &kernel)?;
    replace(&folder.join(INITRD), &initrd)?;
    replace(&folder.join(MANIFEST), text.as_bytes())?;
    Ok(manifest)
}

/// Reads the manifest of the image in `folder`.
///
/// # Errors
/// [`Error::File`] where it is missing, [`Error::Manifest`] where it is malformed.
pub fn read_manifest(folder: &Path) -> Result<Manifest, Error> {
    let path = folder.join(MANIFEST);
    let text = std::fs::read(&path).map_err(Error::file(&path))?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|error| Error::Manifest { path: path.clone(), problem: error.to_string() })?;
    if manifest.format != FORMAT {
        return Err(Error::Manifest { path, problem: format!("its format is {}, not {FORMAT}", manifest.format) });
    }
    Ok(manifest)
}

/// Reads the image in `folder` and compares it with its manifest.
///
/// # Errors
/// As [`read_manifest`], and [`Error::Manifest`] where a file is another than the manifest says.
pub fn verify(folder: &Path) -> Result<Manifest, Error> {
    let manifest = read_manifest(folder)?;
    for (name, expected) in [(KERNEL, &manifest.kernel_sha256), (INITRD, &manifest.initrd_sha256)] {
        let path = folder.join(name);
        let bytes = std::fs::read(&path).map_err(Error::file(&path))?;
        let found = hex::encode(Sha256::digest(&bytes));
        if found != *expected {
            let problem = format!("{name} has the SHA-256 {found}, not {expected}: run `coracle image build`");
            return Err(Error::Manifest { path: folder.join(MANIFEST), problem });
        }
    }
    Ok(manifest)
}

/// Writes a file beside its place and moves it there, so that a machine which starts meanwhile sees the old or the new.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let beside = path.with_extension("new");
    let write = || {
        let mut file = std::fs::File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, path)
    };
    write().map_err(Error::file(path))
}

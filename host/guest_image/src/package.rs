//! A distribution's kernel package, read without root and without installing it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::Error;

/// The largest file that is taken from a package, in bytes.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// The kernel and the modules of a package.
#[derive(Debug)]
pub struct Package {
    path: PathBuf,
    release: String,
    vmlinuz: Vec<u8>,
    /// Module files as they are in the package, by file name.
    modules: BTreeMap<String, Vec<u8>>,
    /// The names of modules that are built in, with underscores.
    builtin: Vec<String>,
}

impl Package {
    /// Reads a Debian package of a kernel.
    ///
    /// # Errors
    /// [`Error::Package`] where it is none, or `dpkg-deb` is missing.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |problem: String| Error::Package { package: path.to_owned(), problem };
        if let Err(error) = std::fs::File::open(path) {
            return Err(failed(error.to_string()));
        }
        let mut child = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| failed(format!("dpkg-deb does not start ({error}): install dpkg")))?;
        let stdout = child.stdout.take().ok_or_else(|| failed("dpkg-deb has no output".into()))?;
        let read = Self::read(path, stdout);
        let status = child.wait().map_err(|error| failed(error.to_string()))?;
        if !status.success() {
            return Err(failed(format!("dpkg-deb ended with {status}")));
        }
        read
    }

    fn read(path: &Path, stream: impl Read) -> Result<Self, Error> {
        let failed = |problem: String| Error::Package { package: path.to_owned(), problem };
        let mut release = None;
        let mut vmlinuz = None;
        let mut modules = BTreeMap::new();
        let mut builtin = Vec::new();
        let mut archive = tar::Archive::new(stream);
        for entry in archive.entries().map_err(|error| failed(error.to_string()))? {
            let mut entry = entry.map_err(|error| failed(error.to_string()))?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
            let file = name.rsplit('/').next().unwrap_or_default().to_owned();
            let mut contents = || {
                let mut bytes = Vec::new();
                entry
                    .by_ref()
                    .take(FILE_BYTES_MAX)
                    .read_to_end(&mut bytes)
                    .map_err(|error| failed(error.to_string()))?;
                Ok::<_, Error>(bytes)
            };
            if let Some(version) = name.strip_prefix("boot/vmlinuz-") {
                release = Some(version.to_owned());
                vmlinuz = Some(contents()?);
            } else if name.contains("lib/modules/") && file.contains(".ko") {
                modules.insert(file, contents()?);
            } else if name.contains("lib/modules/") && file == "modules.builtin" {
                let text = String::from_utf8_lossy(&contents()?).into_owned();
                builtin = text.lines().map(module_name).collect();
            }
        }
        match (release, vmlinuz) {
            (Some(release), Some(vmlinuz)) => Ok(Self { path: path.to_owned(), release, vmlinuz, modules, builtin }),
            _ => Err(failed("it holds no boot/vmlinuz-*; give a linux-image-* package".into())),
        }
    }

    /// The kernel's release.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The package's file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn vmlinuz(&self) -> &[u8] {
        &self.vmlinuz
    }

    pub(crate) fn is_builtin(&self, name: &str) -> bool {
        self.builtin.iter().any(|builtin| builtin == name)
    }

    /// The module `name` (with underscores), unpacked.
    pub(crate) fn module(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let Some((file, bytes)) = self.modules.iter().find(|(file, _)| module_name(file) == name) else {
            return Ok(None);
        };
        let failed = |error: std::io::Error| Error::Package {
            package: self.path.clone(),
            problem: format!("the module {file}: {error}"),
        };
        let mut unpacked = Vec::new();
        if file.ends_with(".xz") {
            liblzma::read::XzDecoder::new(bytes.as_slice()).read_to_end(&mut unpacked).map_err(failed)?;
        } else if file.ends_with(".zst") {
            unpacked = zstd::decode_all(bytes.as_slice()).map_err(failed)?;
        } else {
            unpacked.clone_from(bytes);
        }
        Ok(Some(unpacked))
    }
}

/// `kernel/fs/fuse/virtio-fs.ko.xz` is the module `virtio_fs`.
pub(crate) fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_modules() {
        assert_eq!(module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz"), "virtio_rng");
        assert_eq!(module_name("overlay.ko"), "overlay");
    }

    #[test]
    fn a_file_that_is_no_package_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Package::open(file.path()).unwrap_err().to_string();
        assert!(error.contains(file.path().to_str().unwrap()), "{error}");
        assert!(Package::open(Path::new("/nowhere.deb")).unwrap_err().to_string().contains("/nowhere.deb"));
    }
}

//! Which modules the clone loads before it has a root, and in which order (modules.dep(5)). All others are loaded from that
//! root when they are asked for.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::kernel::Kernel;

/// Those without which there is no lab.
const NEEDED: [&str; 5] = ["virtio_pci", "virtio_console", "virtiofs", "overlay", "kvm_amd"];
/// Those whose devices exist only after they are loaded; nobody could ask for them by opening these.
const WANTED: [&str; 4] = ["vhost_vsock", "vhost_net", "tun", "loop"];

/// A module, unpacked.
pub(crate) struct Module {
    pub(crate) file: String,
    pub(crate) content: Vec<u8>,
}

/// The modules, each after those that it depends on.
pub(crate) fn choose(kernel: &Kernel) -> Result<Vec<Module>> {
    let folder = kernel.modules();
    let text = |name: &str| {
        let path = folder.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    };
    let index = Index { dependencies: &text("modules.dep")?, builtin: &text("modules.builtin")? };
    let mut order = Vec::new();
    for name in NEEDED {
        if !index.add(name, &mut order) {
            bail!(
                "the kernel {} has no module {name}, which the lab needs: give another by --kernel DEB",
                kernel.release
            );
        }
    }
    for name in WANTED {
        index.add(name, &mut order);
    }
    order.into_iter().map(|path| read(&folder, path)).collect()
}

/// The lists that come with a kernel.
struct Index<'a> {
    /// Lines of a module's path, a colon, and the paths of those that it needs.
    dependencies: &'a str,
    /// Lines of paths of what is built in.
    builtin: &'a str,
}

impl<'a> Index<'a> {
    /// Puts the paths of a module and of what it depends on at the end of `order`. False where the kernel has no such thing.
    fn add(&self, name: &str, order: &mut Vec<&'a str>) -> bool {
        if self.builtin.lines().any(|path| module_name(path) == name) {
            return true;
        }
        let mut lines = self.dependencies.lines().filter_map(|line| line.split_once(':'));
        let Some((path, needs)) = lines.find(|(path, _)| module_name(path) == name) else { return false };
        if !order.contains(&path) {
            for need in needs.split_whitespace() {
                self.add(&module_name(need), order);
            }
            order.push(path);
        }
        true
    }
}

/// `kernel/fs/fuse/virtio-fs.ko.xz` is the module `virtio_fs`.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split(".ko").next().unwrap_or_default().replace('-', "_")
}

/// Reads and unpacks the module at `path` below `folder`.
fn read(folder: &Path, path: &str) -> Result<Module> {
    let packed = std::fs::read(folder.join(path)).with_context(|| format!("read the module {path}"))?;
    let mut content = Vec::new();
    let unpacked = match path.rsplit('.').next() {
        Some("xz") => liblzma::read::XzDecoder::new(packed.as_slice()).read_to_end(&mut content).map(drop),
        Some("zst") => zstd::stream::copy_decode(packed.as_slice(), &mut content),
        _ => {
            content = packed;
            Ok(())
        }
    };
    unpacked.with_context(|| format!("unpack the module {path}"))?;
    Ok(Module { file: format!("{}.ko", module_name(path)), content })
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "kernel/fs/fuse/virtiofs.ko.xz: kernel/fs/fuse/fuse.ko.xz kernel/virtio.ko kernel/ring.ko\n\
        kernel/fs/fuse/fuse.ko.xz:\nkernel/virtio.ko: kernel/ring.ko\nkernel/ring.ko:\n\
        kernel/arch/x86/kvm/kvm-amd.ko.zst: kernel/kvm.ko kernel/ring.ko\nkernel/kvm.ko:\n";

    #[test]
    fn each_module_comes_after_those_that_it_needs() {
        let index = Index { dependencies: DEPENDENCIES, builtin: "kernel/fs/overlayfs/overlay.ko\n" };
        let mut order = Vec::new();
        for name in ["virtiofs", "overlay", "kvm_amd"] {
            assert!(index.add(name, &mut order), "{name}");
        }
        assert!(!index.add("tun", &mut order));
        let names: Vec<String> = order.into_iter().map(module_name).collect();
        assert_eq!(names, ["fuse", "ring", "virtio", "virtiofs", "kvm", "kvm_amd"]);
    }

    #[test]
    fn modules_are_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        std::io::Write::write_all(&mut xz, b"module").unwrap();
        let forms =
            [("a.ko.xz", xz.finish().unwrap()), ("b-c.ko.zst", zstd::encode_all(b"module".as_slice(), 1).unwrap())];
        for (name, bytes) in forms.into_iter().chain([("d.ko", b"module".to_vec())]) {
            std::fs::write(folder.path().join(name), bytes).unwrap();
            let module = read(folder.path(), name).unwrap();
            assert_eq!(module.content, b"module", "{name}");
            assert!(["a.ko", "b_c.ko", "d.ko"].contains(&module.file.as_str()));
        }
    }
}

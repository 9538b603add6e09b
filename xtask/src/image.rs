//! A small OCI image from Debian's busybox-static, as a layout on disk.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Busybox commands that the image has by name.
const COMMANDS: [&str; 44] = [
    "sh",
    "ls",
    "cat",
    "echo",
    "uname",
    "true",
    "false",
    "sleep",
    "id",
    "env",
    "hostname",
    "stty",
    "dd",
    "wc",
    "md5sum",
    "sha256sum",
    "ps",
    "mount",
    "grep",
    "kill",
    "head",
    "tail",
    "tr",
    "seq",
    "touch",
    "rm",
    "mkdir",
    "stat",
    "pwd",
    "test",
    "expr",
    "date",
    "df",
    "free",
    "nproc",
    "yes",
    "tee",
    "readlink",
    "chmod",
    "ulimit",
    "ip",
    "ping",
    "nc",
    "httpd",
];

/// The program, static.
pub(crate) fn busybox() -> Result<Vec<u8>> {
    let path = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    std::fs::read(path.context("busybox is missing: install busybox-static")?).context("read busybox")
}

struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn add(&mut self, path: &str, kind: tar::EntryType, mode: u32, content: &[u8], link: Option<&str>) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(content.len() as u64);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        match link {
            Some(target) => self.0.append_link(&mut header, path, target),
            None => self.0.append_data(&mut header, path, content),
        }
        .with_context(|| format!("add {path}"))
    }
}

/// The layer: the same input gives the same bytes. `extra` are programs to put into `/bin`.
fn layer(extra: &[(&str, PathBuf)]) -> Result<Vec<u8>> {
    let mut layer = Layer(tar::Builder::new(Vec::new()));
    for folder in ["bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "home", "home/app"] {
        let mode = if folder == "tmp" { 0o1777 } else { 0o755 };
        layer.add(&format!("{folder}/"), tar::EntryType::Directory, mode, b"", None)?;
    }
    layer.add("bin/busybox", tar::EntryType::Regular, 0o755, &busybox()?, None)?;
    for name in COMMANDS {
        layer.add(&format!("bin/{name}"), tar::EntryType::Symlink, 0o777, b"", Some("busybox"))?;
    }
    for (name, path) in extra {
        let program = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
        layer.add(&format!("bin/{name}"), tar::EntryType::Regular, 0o755, &program, None)?;
    }
    let passwd = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n";
    layer.add("etc/passwd", tar::EntryType::Regular, 0o644, passwd, None)?;
    let group = b"root:x:0:\napp:x:1000:\nstaff:x:50:app\naudio:x:29:app\n";
    layer.add("etc/group", tar::EntryType::Regular, 0o644, group, None)?;
    layer.add("etc/not-a-program", tar::EntryType::Regular, 0o644, b"text\n", None)?;
    layer.0.into_inner().context("close the layer")
}

fn blob(folder: &Path, bytes: &[u8]) -> Result<(String, usize)> {
    let digest = hex::encode(Sha256::digest(bytes));
    let path = folder.join("blobs/sha256").join(&digest);
    std::fs::write(&path, bytes).with_context(|| format!("write {}", path.display()))?;
    Ok((format!("sha256:{digest}"), bytes.len()))
}

/// Writes the image into `folder`.
pub(crate) fn make(folder: &Path, extra: &[(&str, PathBuf)]) -> Result<()> {
    let blobs = folder.join("blobs/sha256");
    if folder.exists() {
        std::fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    std::fs::create_dir_all(&blobs).with_context(|| format!("make {}", blobs.display()))?;
    let (layer_digest, layer_size) = blob(folder, &layer(extra)?)?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": ["PATH=/bin"], "Cmd": ["sh"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] }
    });
    let (config_digest, config_size) = blob(folder, config.to_string().as_bytes())?;
    let descriptor = |kind: &str, digest: &str, size: usize| -> Value {
        json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size })
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", &config_digest, config_size),
        "layers": [descriptor("layer.v1.tar", &layer_digest, layer_size)]
    });
    let (digest, size) = blob(folder, manifest.to_string().as_bytes())?;
    let mut entry = descriptor("manifest.v1+json", &digest, size);
    entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    std::fs::write(folder.join("index.json"), index.to_string()).context("write the index")?;
    std::fs::write(folder.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").context("write the layout")
}

/// Packs a layout into a tar archive, as containerd imports it.
pub(crate) fn archive(folder: &Path, file: &Path) -> Result<()> {
    let mut builder =
        tar::Builder::new(std::fs::File::create(file).with_context(|| format!("make {}", file.display()))?);
    builder.append_dir_all(".", folder).context("pack the image")?;
    builder.finish().context("pack the image")
}

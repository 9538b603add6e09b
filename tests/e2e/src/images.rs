//! Images made for a test, good and bad.

use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest, Sha256};

/// One entry of a layer: its name as it is written, its kind, and its content or target.
pub type LayerEntry<'a> = (&'a str, tar::EntryType, &'a str);

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn blob(folder: &Path, bytes: &[u8]) -> String {
    let digest = digest(bytes);
    std::fs::write(folder.join("blobs/sha256").join(&digest[7..]), bytes).expect("a blob");
    digest
}

/// A layer of these entries, names unchecked.
fn layer(entries: &[LayerEntry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, kind, content) in entries {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        let mut data = content.as_bytes();
        if matches!(kind, tar::EntryType::Symlink | tar::EntryType::Link) {
            header.as_mut_bytes()[157..157 + content.len()].copy_from_slice(content.as_bytes());
            data = b"";
        }
        header.set_size(data.len() as u64);
        header.set_cksum();
        builder.append(&header, data).expect("an entry");
    }
    builder.into_inner().expect("a layer")
}

/// A layout with one layer of these entries, names unchecked.
///
/// # Panics
/// Where files can't be written.
pub fn layout_with_layer(folder: &Path, entries: &[LayerEntry<'_>]) {
    std::fs::create_dir_all(folder.join("blobs/sha256")).expect("a layout");
    let layer = layer(entries);
    let layer_digest = blob(folder, &layer);
    let config = json!({ "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/x"] },
        "rootfs": { "type": "layers", "diff_ids": [layer_digest] } });
    let config_digest = blob(folder, config.to_string().as_bytes());
    let manifest = json!({ "schemaVersion": 2, "config": { "digest": config_digest },
        "layers": [{ "digest": layer_digest, "size": layer.len() }] });
    let digest = blob(folder, manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [{ "digest": digest }] });
    std::fs::write(folder.join("index.json"), index.to_string()).expect("the index");
}

/// Copies a layout with more layers on its own.
///
/// # Panics
/// Where files can't be read or written.
pub fn copy_layout_with_layers(from: &Path, to: &Path, layers: &[&[LayerEntry<'_>]]) {
    change_layout(from, to, |manifest, config| {
        for entries in layers {
            let bytes = layer(entries);
            let digest = blob(to, &bytes);
            config["rootfs"]["diff_ids"].as_array_mut().expect("layers").push(digest.as_str().into());
            let descriptor = json!({ "digest": digest, "size": bytes.len() });
            manifest["layers"].as_array_mut().expect("layers").push(descriptor);
        }
    });
}

/// Copies a layout, to spoil the copy.
///
/// # Panics
/// Where files can't be copied.
pub fn copy_layout(from: &Path, to: &Path) {
    std::fs::create_dir_all(to.join("blobs/sha256")).expect("a layout");
    std::fs::copy(from.join("index.json"), to.join("index.json")).expect("the index");
    for entry in std::fs::read_dir(from.join("blobs/sha256")).expect("blobs").flatten() {
        std::fs::copy(entry.path(), to.join("blobs/sha256").join(entry.file_name())).expect("a blob");
    }
}

/// Copies a layout, with another default command.
///
/// # Panics
/// Where files can't be read or written.
pub(crate) fn copy_layout_with_command(from: &Path, to: &Path, command: &[&str]) {
    change_layout(from, to, |_, config| config["config"]["Cmd"] = json!(command));
}

/// Copies a layout, with its manifest and configuration changed.
fn change_layout(from: &Path, to: &Path, change: impl FnOnce(&mut serde_json::Value, &mut serde_json::Value)) {
    copy_layout(from, to);
    std::fs::copy(from.join("oci-layout"), to.join("oci-layout")).expect("a layout");
    let read = |digest: &serde_json::Value| -> serde_json::Value {
        let path = to.join("blobs/sha256").join(&digest.as_str().expect("a digest")[7..]);
        serde_json::from_slice(&std::fs::read(path).expect("a document")).expect("JSON")
    };
    let text = std::fs::read(to.join("index.json")).expect("the index");
    let mut index: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let mut manifest = read(&index["manifests"][0]["digest"]);
    let mut config = read(&manifest["config"]["digest"]);
    change(&mut manifest, &mut config);
    let write = |document: &serde_json::Value| {
        let bytes = document.to_string();
        (blob(to, bytes.as_bytes()), bytes.len())
    };
    let (digest, size) = write(&config);
    (manifest["config"]["digest"], manifest["config"]["size"]) = (digest.into(), size.into());
    let (digest, size) = write(&manifest);
    (index["manifests"][0]["digest"], index["manifests"][0]["size"]) = (digest.into(), size.into());
    std::fs::write(to.join("index.json"), index.to_string()).expect("the index");
}

/// Packs a layout into a tar archive.
///
/// # Panics
/// Where files can't be written.
pub fn layout_archive(layout: &Path, file: &Path) {
    let mut builder = tar::Builder::new(std::fs::File::create(file).expect("an archive"));
    builder.append_dir_all(".", layout).expect("the layout");
    builder.finish().expect("an archive");
}

/// Writes a layout with one layer as `docker save` would.
///
/// # Panics
/// Where files can't be read or written.
pub fn docker_archive(layout: &Path, file: &Path) {
    let read = |path: PathBuf| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path).expect("a document")).expect("JSON")
    };
    let path_of =
        |digest: &serde_json::Value| layout.join("blobs/sha256").join(&digest.as_str().expect("a digest")[7..]);
    let index = read(layout.join("index.json"));
    let manifest = read(path_of(&index["manifests"][0]["digest"]));
    let mut builder = tar::Builder::new(std::fs::File::create(file).expect("an archive"));
    let (config, layer) = (path_of(&manifest["config"]["digest"]), path_of(&manifest["layers"][0]["digest"]));
    builder.append_path_with_name(config, "config.json").expect("the configuration");
    builder.append_path_with_name(layer, "layer/layer.tar").expect("the layer");
    let text = json!([{ "Config": "config.json", "RepoTags": ["x:y"], "Layers": ["layer/layer.tar"] }]).to_string();
    let mut header = tar::Header::new_gnu();
    header.set_size(text.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, "manifest.json", text.as_bytes()).expect("the manifest");
    builder.finish().expect("an archive");
}

//! The archive that `docker save` writes: `manifest.json`, a configuration, and layers as tar files.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::layout::{Layer, Parts, configuration, parse, read_bounded};
use crate::{Error, Result};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    layers: Vec<String>,
}

/// Finds the parts of the only image in the archive that was taken apart into `folder`.
pub(crate) fn open(folder: &Path, platform: &str) -> Result<Parts> {
    let entries: Vec<Entry> = parse("manifest.json", &read_bounded(&folder.join("manifest.json"))?)?;
    let [entry] = entries.as_slice() else {
        return Err(Error::Refused(format!("the archive holds {} images, not one", entries.len())));
    };
    let bytes = read_bounded(&inside(folder, &entry.config)?)?;
    let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
    let configuration = configuration(&bytes, platform)?;
    let diff_ids = configuration.rootfs.diff_ids;
    if diff_ids.len() != entry.layers.len() {
        return Err(Error::Refused(format!("it names {} layers and {} digests", entry.layers.len(), diff_ids.len())));
    }
    let layers = entry
        .layers
        .iter()
        .zip(diff_ids)
        .map(|(name, diff_id)| Ok(Layer { file: inside(folder, name)?, digest: None, diff_id }))
        .collect::<Result<_>>()?;
    Ok(Parts { digest, config: configuration.config.unwrap_or_default(), layers })
}

fn inside(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.components().all(|part| matches!(part, Component::Normal(_))) && !name.is_empty() {
        Ok(folder.join(path))
    } else {
        Err(Error::Refused(format!("the archive's manifest names the path {name}")))
    }
}

//! An OCI layout (image-spec, image-layout.md): from its index to one manifest, and the blobs behind it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{Config, Error, Result};

/// The largest index, manifest or configuration that is read, in bytes.
const DOCUMENT_BYTES_MAX: u64 = 8 << 20;

/// How many indexes may name one another.
const INDEX_DEPTH_MAX: usize = 4;

/// A reference to a blob.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: String,
    #[serde(default)]
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: std::collections::HashMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Platform {
    pub(crate) architecture: String,
    pub(crate) os: String,
}

impl std::fmt::Display for Platform {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)
    }
}

/// An index or a manifest: both have a list, and only one of the lists.
#[derive(Debug, Deserialize)]
pub(crate) struct Document {
    #[serde(default)]
    pub(crate) manifests: Vec<Descriptor>,
    #[serde(default)]
    pub(crate) config: Option<Descriptor>,
    #[serde(default)]
    pub(crate) layers: Vec<Descriptor>,
}

/// An image's configuration, as far as it is used.
#[derive(Debug, Deserialize)]
pub(crate) struct Configuration {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default)]
    pub(crate) config: Option<Config>,
    pub(crate) rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    pub(crate) diff_ids: Vec<String>,
}

/// A layer as a file that is still to be verified.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) file: PathBuf,
    /// The digest of the file; none in a docker archive, where only the contents have one.
    pub(crate) digest: Option<String>,
    /// The digest of its unpacked contents.
    pub(crate) diff_id: String,
}

/// All that is needed to unpack an image.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) digest: String,
    pub(crate) config: Config,
    pub(crate) layers: Vec<Layer>,
}

/// Checks that `digest` is a SHA-256 digest, and gives its hexadecimal part.
pub(crate) fn hex_of(digest: &str) -> Result<&str> {
    digest
        .strip_prefix("sha256:")
        .filter(|hex| hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
        .ok_or_else(|| Error::Refused(format!("{digest:?} is no sha256 digest")))
}

/// Fails where `bytes` have not the digest `expected`.
pub(crate) fn verify(what: &str, bytes: &[u8], expected: &str) -> Result<()> {
    let found = format!("sha256:{}", hex::encode(Sha256::digest(bytes)));
    if found == expected {
        return Ok(());
    }
    Err(Error::Digest { what: what.to_owned(), expected: expected.to_owned(), found })
}

/// Where a blob lies in a layout.
pub(crate) fn blob_path(folder: &Path, digest: &str) -> Result<PathBuf> {
    Ok(folder.join("blobs/sha256").join(hex_of(digest)?))
}

/// Reads a document of bounded size.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::file(path))?;
    file.take(DOCUMENT_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(Error::file(path))?;
    if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
        return Err(Error::Refused(format!("{} is larger than {DOCUMENT_BYTES_MAX} bytes", path.display())));
    }
    Ok(bytes)
}

/// Parses JSON.
pub(crate) fn parse<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| Error::Refused(format!("{what}: {error}")))
}

/// Picks the manifest for `platform` (`os/architecture`), or the only one that says nothing of platforms.
pub(crate) fn pick<'a>(manifests: &'a [Descriptor], platform: &str, tag: Option<&str>) -> Result<&'a Descriptor> {
    let named = |descriptor: &&Descriptor| {
        tag.is_none_or(|tag| {
            descriptor.annotations.get("org.opencontainers.image.ref.name").is_some_and(|name| name == tag)
        })
    };
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform
            .as_ref()
            .is_none_or(|found| wanted(platform) == (found.os.as_str(), found.architecture.as_str()))
    };
    manifests.iter().filter(named).find(fits).ok_or_else(|| {
        let found: Vec<String> = manifests
            .iter()
            .map(|descriptor| {
                match (&descriptor.platform, descriptor.annotations.get("org.opencontainers.image.ref.name")) {
                    (Some(platform), _) => platform.to_string(),
                    (None, Some(name)) => name.clone(),
                    (None, None) => "an unnamed image".to_owned(),
                }
            })
            .collect();
        Error::Platform {
            wanted: tag.map_or_else(|| platform.to_owned(), |tag| format!("{tag} ({platform})")),
            found: found.join(", "),
        }
    })
}

fn wanted(platform: &str) -> (&str, &str) {
    let mut parts = platform.split('/');
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

/// Finds the parts of the image for `platform` in the layout at `folder`.
pub(crate) fn open(folder: &Path, platform: &str, tag: Option<&str>) -> Result<Parts> {
    let index = folder.join("index.json");
    let mut document: Document = parse("index.json", &read_bounded(&index)?)?;
    let mut digest = String::new();
    let mut tag = tag;
    for _ in 0..INDEX_DEPTH_MAX {
        if document.config.is_some() {
            break;
        }
        let chosen = pick(&document.manifests, platform, tag)?;
        digest.clone_from(&chosen.digest);
        let bytes = read_bounded(&blob_path(folder, &digest)?)?;
        verify("a manifest", &bytes, &digest)?;
        document = parse("a manifest", &bytes)?;
        tag = None;
    }
    manifest_parts(folder, &digest, &document, platform)
}

fn manifest_parts(folder: &Path, digest: &str, manifest: &Document, platform: &str) -> Result<Parts> {
    let config =
        manifest.config.as_ref().ok_or_else(|| Error::Refused("it has no manifest with a configuration".into()))?;
    let bytes = read_bounded(&blob_path(folder, &config.digest)?)?;
    verify("the configuration", &bytes, &config.digest)?;
    let configuration = configuration(&bytes, platform)?;
    let diff_ids = configuration.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        let (layers, ids) = (manifest.layers.len(), diff_ids.len());
        return Err(Error::Refused(format!("its manifest has {layers} layers and its configuration {ids}")));
    }
    let layers = manifest
        .layers
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            let file = blob_path(folder, &layer.digest)?;
            let size = std::fs::metadata(&file).map_err(Error::file(&file))?.len();
            if layer.size != 0 && layer.size != size {
                return Err(Error::Refused(format!("the layer {} has {size} bytes, not {}", layer.digest, layer.size)));
            }
            Ok(Layer { file, digest: Some(layer.digest.clone()), diff_id })
        })
        .collect::<Result<_>>()?;
    Ok(Parts { digest: digest.to_owned(), config: configuration.config.unwrap_or_default(), layers })
}

/// Reads a configuration and checks that it is for `platform`.
pub(crate) fn configuration(bytes: &[u8], platform: &str) -> Result<Configuration> {
    let configuration: Configuration = parse("the configuration", bytes)?;
    let found = (configuration.os.as_str(), configuration.architecture.as_str());
    if !configuration.architecture.is_empty() && found != wanted(platform) {
        return Err(Error::Platform { wanted: platform.to_owned(), found: format!("{}/{}", found.0, found.1) });
    }
    Ok(configuration)
}

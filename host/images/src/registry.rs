//! Registries: what is fetched becomes an OCI layout on disk, and is verified there like any other.

use std::path::{Path, PathBuf};

use base64::Engine;
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};
use serde_json::{Value, json};

use crate::layout::{Document, blob_path, parse, pick, verify};
use crate::{Error, Result};

const MEDIA_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// How registries are spoken to.
#[derive(Debug, Clone, Default)]
pub struct RegistryOptions {
    /// Without TLS.
    pub plain_http: bool,
    /// The file with credentials; docker's own where this is none.
    pub credentials: Option<PathBuf>,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Registry(error.to_string())
}

/// Fetches the image `name` for `platform` into a layout at `folder`.
pub(crate) async fn fetch(name: &str, platform: &str, options: &RegistryOptions, folder: &Path) -> Result<()> {
    // A second installation is refused, and the first one serves.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let reference: Reference =
        name.parse().map_err(|error| Error::Name(format!("{name:?} names no image: {error}")))?;
    let protocol = if options.plain_http { ClientProtocol::Http } else { ClientProtocol::Https };
    let client = Client::try_from(ClientConfig { protocol, ..Default::default() }).map_err(failed)?;
    let auth = credentials(options, reference.resolve_registry())?;
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).map_err(Error::file(&blobs))?;
    let (bytes, mut digest) = client.pull_manifest_raw(&reference, &auth, &MEDIA_TYPES).await.map_err(failed)?;
    let mut bytes = bytes.to_vec();
    verify("the manifest", &bytes, &digest)?;
    let mut document: Document = parse("the manifest", &bytes)?;
    if document.config.is_none() {
        digest.clone_from(&pick(&document.manifests, platform, None)?.digest);
        let by_digest = reference.clone_with_digest(digest.clone());
        bytes = client.pull_manifest_raw(&by_digest, &auth, &MEDIA_TYPES).await.map_err(failed)?.0.to_vec();
        verify("the manifest", &bytes, &digest)?;
        document = parse("the manifest", &bytes)?;
    }
    std::fs::write(blob_path(folder, &digest)?, &bytes).map_err(Error::file(&blobs))?;
    for descriptor in document.config.iter().chain(&document.layers) {
        let path = blob_path(folder, &descriptor.digest)?;
        let file = tokio::fs::File::create(&path).await.map_err(Error::file(&path))?;
        let wanted = OciDescriptor {
            media_type: descriptor.media_type.clone(),
            digest: descriptor.digest.clone(),
            size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
            ..Default::default()
        };
        client.pull_blob(&reference, &wanted, file).await.map_err(failed)?;
    }
    let index = json!({ "schemaVersion": 2, "manifests": [{ "digest": digest, "size": bytes.len() }] });
    let path = folder.join("index.json");
    std::fs::write(&path, index.to_string()).map_err(Error::file(&path))
}

/// The credentials that docker's configuration has for `registry`.
fn credentials(options: &RegistryOptions, registry: &str) -> Result<RegistryAuth> {
    let path = match &options.credentials {
        Some(path) => path.clone(),
        None => match std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or_else(home_docker) {
            Some(folder) => folder.join("config.json"),
            None => return Ok(RegistryAuth::Anonymous),
        },
    };
    let Ok(bytes) = std::fs::read(&path) else { return Ok(RegistryAuth::Anonymous) };
    let config: Value =
        serde_json::from_slice(&bytes).map_err(|error| Error::Name(format!("{}: {error}", path.display())))?;
    // Docker Hub's entry has its old address.
    let keys = if registry == "docker.io" || registry == "index.docker.io" {
        vec!["https://index.docker.io/v1/", "docker.io", "index.docker.io"]
    } else {
        vec![registry]
    };
    let entry = keys.into_iter().find_map(|key| config.get("auths")?.get(key)?.get("auth")?.as_str());
    let Some(entry) = entry else { return Ok(RegistryAuth::Anonymous) };
    let malformed = || Error::Name(format!("{}: the entry for {registry} is malformed", path.display()));
    let decoded = base64::engine::general_purpose::STANDARD.decode(entry).map_err(|_| malformed())?;
    let decoded = String::from_utf8(decoded).map_err(|_| malformed())?;
    let (user, password) = decoded.split_once(':').ok_or_else(malformed)?;
    Ok(RegistryAuth::Basic(user.to_owned(), password.to_owned()))
}

fn home_docker() -> Option<PathBuf> {
    std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".docker"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dockers_credentials_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let options = RegistryOptions { plain_http: true, credentials: Some(path.clone()) };
        assert!(matches!(credentials(&options, "r:5000"), Ok(RegistryAuth::Anonymous)));
        std::fs::write(&path, r#"{"auths":{"r:5000":{"auth":"dTpwOng="}}}"#).unwrap();
        let Ok(RegistryAuth::Basic(user, password)) = credentials(&options, "r:5000") else { panic!("no credentials") };
        assert_eq!((user.as_str(), password.as_str()), ("u", "p:x"));
        std::fs::write(&path, r#"{"auths":{"r:5000":{"auth":"%"}}}"#).unwrap();
        assert!(credentials(&options, "r:5000").is_err());
    }
}

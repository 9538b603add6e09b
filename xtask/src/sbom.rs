//! What the programs and the guest image are made of: CycloneDX 1.5, as JSON.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::metadata;
use crate::steps::top;

/// What is shipped is for this one.
pub(crate) const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// A program's bill: all crates that it reaches by normal dependencies, with their licences and checksums.
pub(crate) fn of_program(metadata: &Value, package: &str, file: &Path) -> Result<Value> {
    let checksums = checksums()?;
    // A macro runs where something is built, and so do those that only it has.
    let crates = metadata::reached(metadata, package, |found| !is_macro(found))?;
    let components: Vec<Value> = crates.iter().map(|found| component(found, &checksums)).collect();
    let own = metadata["packages"].as_array().into_iter().flatten().find(|found| found["name"] == package);
    let version = own.and_then(|own| own["version"].as_str()).unwrap_or_default();
    Ok(bill(json!({ "type": "application", "name": package, "version": version, "hashes": [hash(file)?] }), components))
}

fn is_macro(package: &Value) -> bool {
    let targets = package["targets"].as_array().into_iter().flatten();
    let mut kinds = targets.flat_map(|target| target["kind"].as_array().into_iter().flatten());
    kinds.any(|kind| kind == "proc-macro")
}

/// The guest image's: its kernel, and the agent in it, by the manifest that `coracle image build` writes.
pub(crate) fn of_image(folder: &Path, agent: &Path) -> Result<Value> {
    let manifest = manifest(folder)?;
    let text = |name: &str| manifest[name].as_str().unwrap_or_default().to_owned();
    let components = vec![
        json!({ "type": "operating-system", "name": "linux", "version": text("kernel_release"), "licenses": [{ "license": { "id": "GPL-2.0-only" } }],
            "hashes": [{ "alg": "SHA-256", "content": text("kernel_sha256") }] }),
        json!({ "type": "application", "name": "coracle-agent", "version": text("version"), "licenses": [{ "license": { "id": "Apache-2.0" } }], "hashes": [hash(agent)?] }),
    ];
    let image = json!({ "type": "container", "name": "coracle-guest", "version": text("version"), "hashes": [{ "alg": "SHA-256", "content": text("initrd_sha256") }] });
    Ok(bill(image, components))
}

/// What `coracle image build` says of an image that it has made.
pub(crate) fn manifest(folder: &Path) -> Result<Value> {
    let path = folder.join("manifest.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).context("the image's manifest")
}

fn bill(subject: Value, components: Vec<Value>) -> Value {
    json!({ "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": { "component": subject }, "components": components })
}

fn hash(file: &Path) -> Result<Value> {
    use sha2::{Digest as _, Sha256};
    let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
    Ok(json!({ "alg": "SHA-256", "content": hex::encode(Sha256::digest(bytes)) }))
}

/// Checksums of the registry's crates, by name and version, as Cargo.lock has them.
fn checksums() -> Result<BTreeMap<(String, String), String>> {
    let path = top().join("Cargo.lock");
    let lock: toml::Table =
        toml::from_str(&std::fs::read_to_string(&path).context("read Cargo.lock")?).context("Cargo.lock")?;
    let packages = lock.get("package").and_then(toml::Value::as_array).context("Cargo.lock has no packages")?;
    let text = |package: &toml::Value, name: &str| package.get(name).and_then(toml::Value::as_str).map(str::to_owned);
    Ok(packages
        .iter()
        .filter_map(|package| Some(((text(package, "name")?, text(package, "version")?), text(package, "checksum")?)))
        .collect())
}

fn component(package: &Value, checksums: &BTreeMap<(String, String), String>) -> Value {
    let text = |name: &str| package[name].as_str().unwrap_or_default().to_owned();
    let (name, version) = (text("name"), text("version"));
    let mut component = json!({ "type": "library", "name": name, "version": version });
    // The project's own are in no registry.
    if package["source"].is_string() {
        component["purl"] = format!("pkg:cargo/{name}@{version}").into();
    }
    if let Some(licence) = package["license"].as_str() {
        component["licenses"] = json!([{ "expression": licence.replace('/', " OR ") }]);
    }
    if let Some(checksum) = checksums.get(&(name, version)) {
        component["hashes"] = json!([{ "alg": "SHA-256", "content": checksum }]);
    }
    component
}

#[test]
fn a_program_s_bill_names_what_it_reaches_and_not_what_builds_it() {
    let bill = of_program(
        &metadata::read(Some(PLATFORM)).unwrap(),
        "coracle-agent",
        Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml").as_path(),
    )
    .unwrap();
    let components = bill["components"].as_array().unwrap();
    let find = |name: &str| components.iter().find(|one| one["name"] == name);
    let ttrpc = find("ttrpc").unwrap();
    assert!(ttrpc["purl"].as_str().unwrap().starts_with("pkg:cargo/ttrpc@0."), "{ttrpc}");
    assert_eq!(ttrpc["hashes"][0]["content"].as_str().unwrap().len(), 64);
    assert_eq!(ttrpc["licenses"][0]["expression"], "Apache-2.0");
    // It generates code when something is built, and is in no program.
    assert!(
        find("ttrpc-codegen").is_none()
            && find("serde_derive").is_none()
            && find("syn").is_none()
            && find("coracle-protocol").is_some()
    );
}

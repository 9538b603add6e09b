//! What the programs and the guest image are made of: CycloneDX 1.5, as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::steps::{command, output, top};

/// A program's bill: all crates that it reaches by normal dependencies, with their licences and checksums.
pub(crate) fn of_program(package: &str, file: &Path) -> Result<Value> {
    let text = output(command(
        "cargo",
        &["metadata", "--format-version=1", "--locked", "--filter-platform", "x86_64-unknown-linux-gnu"],
    ))?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata")?;
    let checksums = checksums()?;
    let crates = reached(&metadata, package)?;
    let components: Vec<Value> = crates.iter().map(|found| component(found, &checksums)).collect();
    let version = metadata["packages"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|found| found["name"] == package)
        .and_then(|found| found["version"].as_str())
        .unwrap_or_default();
    Ok(bill(json!({ "type": "application", "name": package, "version": version, "hashes": [hash(file)?] }), components))
}

/// The guest image's: its kernel, and the agent in it, by the manifest that `coracle image build` writes.
pub(crate) fn of_image(folder: &Path, agent: &Path) -> Result<Value> {
    let path = folder.join("manifest.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let manifest: Value = serde_json::from_str(&text).context("the image's manifest")?;
    let text = |name: &str| manifest[name].as_str().unwrap_or_default().to_owned();
    let components = vec![
        json!({ "type": "operating-system", "name": "linux", "version": text("kernel_release"), "licenses": [{ "license": { "id": "GPL-2.0-only" } }],
            "hashes": [{ "alg": "SHA-256", "content": text("kernel_sha256") }] }),
        json!({ "type": "application", "name": "coracle-agent", "version": text("version"), "licenses": [{ "license": { "id": "Apache-2.0" } }], "hashes": [hash(agent)?] }),
    ];
    let image = json!({ "type": "container", "name": "coracle-guest", "version": text("version"), "hashes": [{ "alg": "SHA-256", "content": text("initrd_sha256") }] });
    Ok(bill(image, components))
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

/// The packages that one reaches by normal dependencies.
fn reached<'a>(metadata: &'a Value, package: &str) -> Result<Vec<&'a Value>> {
    let packages = metadata["packages"].as_array().context("packages")?;
    let nodes = metadata["resolve"]["nodes"].as_array().context("resolve")?;
    let start = packages
        .iter()
        .find(|found| found["name"] == package)
        .with_context(|| format!("there is no crate {package}"))?;
    let mut seen = BTreeSet::new();
    let mut stack = vec![start["id"].as_str().context("an id")?];
    while let Some(id) = stack.pop() {
        let node = nodes.iter().find(|node| node["id"] == id).context("a node")?;
        for dependency in node["deps"].as_array().into_iter().flatten() {
            let is_normal = dependency["dep_kinds"].as_array().into_iter().flatten().any(|kind| kind["kind"].is_null());
            // A macro runs where something is built, and so do those that only it has.
            let is_macro = |id: &str| {
                let found = packages.iter().find(|found| found["id"] == id);
                let targets = found.and_then(|found| found["targets"].as_array()).into_iter().flatten();
                targets.into_iter().any(|target| {
                    target["kind"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "proc-macro"))
                })
            };
            if let Some(other) = dependency["pkg"].as_str().filter(|id| is_normal && !is_macro(id))
                && seen.insert(other)
            {
                stack.push(other);
            }
        }
    }
    Ok(packages.iter().filter(|found| found["id"].as_str().is_some_and(|id| seen.contains(id))).collect())
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
    let bill = of_program("coracle-agent", Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml").as_path()).unwrap();
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

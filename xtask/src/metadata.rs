//! What cargo says of the packages.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::steps::{command, output};

/// All packages and how they depend on one another, of one platform or of all.
pub(crate) fn read(platform: Option<&str>) -> Result<Value> {
    let mut metadata = command("cargo", &["metadata", "--format-version=1", "--locked"]);
    metadata.args(platform.iter().flat_map(|platform| ["--filter-platform", platform]));
    serde_json::from_str(&output(metadata)?).context("cargo metadata")
}

/// The packages that one reaches by normal dependencies, those that are `followed` alone.
pub(crate) fn reached<'a>(
    metadata: &'a Value,
    name: &str,
    followed: impl Fn(&Value) -> bool,
) -> Result<Vec<&'a Value>> {
    let packages = metadata["packages"].as_array().context("packages")?;
    let nodes = metadata["resolve"]["nodes"].as_array().context("resolve")?;
    let package = |id: &str| packages.iter().find(|package| package["id"] == id);
    let start = packages.iter().find(|package| package["name"] == name);
    let start = start.with_context(|| format!("there is no crate {name}"))?;
    let (mut seen, mut found, mut stack) = (BTreeSet::new(), Vec::new(), vec![start["id"].as_str().context("an id")?]);
    while let Some(id) = stack.pop() {
        let node = nodes.iter().find(|node| node["id"] == id).context("a package that is in no graph")?;
        for dependency in node["deps"].as_array().into_iter().flatten() {
            let is_normal = dependency["dep_kinds"].as_array().into_iter().flatten().any(|kind| kind["kind"].is_null());
            let Some(other) = dependency["pkg"].as_str().filter(|id| is_normal && seen.insert(*id)) else { continue };
            let Some(own) = package(other).filter(|own| followed(own)) else { continue };
            found.push(own);
            stack.push(other);
        }
    }
    Ok(found)
}

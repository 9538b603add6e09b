//! A network: a list of plugins with their configuration.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::plan;

/// The name of the network that needs no configuration.
pub const BRIDGE: &str = "bridge";

/// The host's link that the containers of [`BRIDGE`] are on.
pub(crate) const LINK: &str = "coracle0";

/// Why there is no such network.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// None of that name.
    #[error("there is no network {name}: {folder} has {}", if known.is_empty() { "none".into() } else { known.join(", ") })]
    Unknown {
        /// The name.
        name: String,
        /// Where networks are.
        folder: PathBuf,
        /// Those that are there.
        known: Vec<String>,
    },
    /// A file that is no network.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// The version of CNI that its plugins are spoken to in.
    pub version: String,
    /// The plugins' own configurations, in the order in which they are called to add.
    pub plugins: Vec<Map<String, Value>>,
}

impl Network {
    /// A bridge on the host with an address of each of `subnets` (as `10.89.0.0/24`), which it translates to its own on the way
    /// out. Which addresses are taken is kept in `folder`.
    #[must_use]
    pub fn bridge(subnets: &[String], folder: &Path) -> Self {
        let ranges: Vec<Value> = subnets.iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
        let everywhere = [(':', "::/0"), ('.', "0.0.0.0/0")];
        let has = |mark: char| subnets.iter().any(|subnet| subnet.contains(mark));
        let routes: Vec<Value> =
            everywhere.iter().filter(|(mark, _)| has(*mark)).map(|(_, all)| json!({ "dst": all })).collect();
        let plugins = [
            json!({
                "type": "bridge", "bridge": LINK, "isGateway": true, "ipMasq": true, "hairpinMode": true,
                "ipam": {
                    "type": "host-local", "dataDir": folder, "ranges": ranges, "routes": routes
                }
            }),
            json!({ "type": "portmap", "capabilities": { "portMappings": true } }),
            // A host that forwards nothing by default lets these through.
            json!({ "type": "firewall" }),
        ];
        let plugins = plugins.into_iter().filter_map(|plugin| plugin.as_object().cloned()).collect();
        Self { name: "coracle".into(), version: "0.4.0".into(), plugins }
    }

    /// The network `name` of the `*.conflist` and `*.conf` files in `folder`.
    ///
    /// # Errors
    /// [`Invalid`].
    pub fn find(name: &str, folder: &Path) -> Result<Self, Invalid> {
        let mut files: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        files.retain(|file| file.extension().is_some_and(|end| end == "conflist" || end == "conf"));
        files.sort();
        let mut known = Vec::new();
        for path in files {
            let problem = |problem: String| Invalid::File { path: path.clone(), problem };
            let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
            match text.and_then(|text| Self::parse(&text)) {
                Ok(network) if network.name == name => return Ok(network),
                Ok(network) => known.push(network.name),
                // Another network's file is no business of this one's.
                Err(text) if path.file_stem().is_some_and(|stem| stem == name) => return Err(problem(text)),
                Err(_) => {}
            }
        }
        Err(Invalid::Unknown { name: name.into(), folder: folder.into(), known })
    }

    /// A list of plugins, or one plugin alone (CNI 1.0, section 1).
    fn parse(text: &str) -> Result<Self, String> {
        let json: Map<String, Value> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let text = |key: &str| json.get(key).and_then(Value::as_str).map(str::to_owned);
        let name = text("name").filter(|name| !name.is_empty()).ok_or("it has no name")?;
        let version = text("cniVersion").unwrap_or_else(|| "0.4.0".into());
        let list = match json.get("plugins") {
            None => vec![Value::from(json)],
            Some(list) => list.as_array().cloned().unwrap_or_default(),
        };
        let plugin = |plugin: Value| match plugin {
            Value::Object(plugin) => Ok(plugin),
            other => Err(format!("{other} is no plugin")),
        };
        let plugins = list.into_iter().map(plugin).collect::<Result<Vec<_>, _>>()?;
        if plugins.is_empty() {
            return Err("it has no plugins".into());
        }
        for plugin in &plugins {
            let program = plan::name(plugin);
            // It becomes a file's name.
            if program.is_empty() || program.contains('/') || program.starts_with('.') {
                return Err(format!("{program:?} is no plugin's name"));
            }
        }
        Ok(Self { name, version, plugins })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_found_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("10-a.conflist", r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"ptp"},{"type":"tuning"}]}"#);
        write("20-b.conf", r#"{"name":"b","type":"macvlan"}"#);
        write("30.conflist", "not json");
        write("evil.conflist", r#"{"name":"evil","plugins":[{"type":"../../bin/sh"}]}"#);
        write("notes.txt", "x");
        let network = Network::find("a", folder.path()).unwrap();
        assert_eq!((network.version.as_str(), network.plugins.len()), ("1.0.0", 2));
        assert_eq!(Network::find("b", folder.path()).unwrap().plugins[0]["type"], "macvlan");
        let error = Network::find("c", folder.path()).unwrap_err().to_string();
        assert!(error.contains("there is no network c") && error.ends_with("has a, b"), "{error}");
        let error = Network::find("evil", folder.path()).unwrap_err().to_string();
        assert!(error.contains("no plugin's name"), "{error}");
    }

    #[test]
    fn the_bridge_is_whole() {
        let network = Network::bridge(&["10.1.0.0/24".into()], Path::new("/x"));
        let types: Vec<_> = network.plugins.iter().map(|plugin| plugin["type"].as_str().unwrap()).collect();
        assert_eq!(types, ["bridge", "portmap", "firewall"]);
        let routes = |subnets: &[&str]| {
            let subnets: Vec<String> = subnets.iter().map(|subnet| (*subnet).to_owned()).collect();
            let ipam = Network::bridge(&subnets, Path::new("/x")).plugins[0]["ipam"].clone();
            assert_eq!(ipam["ranges"].as_array().unwrap().len(), subnets.len());
            ipam["routes"].clone()
        };
        assert_eq!(routes(&["10.1.0.0/24"]), json!([{ "dst": "0.0.0.0/0" }]));
        assert_eq!(routes(&["10.1.0.0/24", "fd00::/64"]), json!([{ "dst": "::/0" }, { "dst": "0.0.0.0/0" }]));
    }
}

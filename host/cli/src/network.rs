//! `--network` and `--publish`: the network of a container, from its namespace to the files in which names are looked up.

use anyhow::{Context, Result, bail};
use coracle_cni::{Attachment, BRIDGE, Namespace, Network, Port, plan};
use coracle_settings::Settings;
use serde_json::{Value, json};

use crate::container::{Folder, Record, Root};
use crate::run::Args;

/// Files of the container's folder that are the container's own.
const FILES: [(&str, &str); 2] = [("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf")];

/// Where the host says whom it asks for names; the second where the first names a service of the host's own (systemd-resolved).
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// What a container is to have.
#[derive(Debug)]
pub(crate) struct Wish {
    network: Network,
    container: String,
    ports: Vec<Port>,
    plugin_folders: Vec<String>,
}

/// The network that the arguments ask for; `None` for no network at all.
pub(crate) fn plan(root: &Root, args: &Args, id: &str) -> Result<Option<Wish>> {
    let name = match args.network.as_str() {
        "none" if args.publish.is_empty() => return Ok(None),
        "none" => BRIDGE,
        "host" => bail!(
            "--network host: a machine can't share the host's own network; give --network bridge, and --publish for its ports"
        ),
        name => name,
    };
    if !rustix::process::geteuid().is_root() {
        bail!("--network {name}: only root can make a network on the host; run this by sudo, or with --network none");
    }
    let settings = Settings::load()?;
    let network = if name == BRIDGE {
        Network::bridge(&settings.network_subnet, &root.path().join("networks"))
    } else {
        Network::find(name, &settings.network_configuration_folder)?
    };
    let plugin_folders = settings.network_plugin_folders;
    Ok(Some(Wish { network, container: id.into(), ports: args.publish.clone(), plugin_folders }))
}

impl Wish {
    /// As that of the container in `folder`, whose specification names its namespace and files from now on.
    pub(crate) fn of(self, folder: &Folder, config: &mut Value) -> Attachment {
        let namespace = folder.join("netns");
        for entry in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if entry["type"] == "network" {
                entry["path"] = namespace.display().to_string().into();
            }
        }
        if let Some(mounts) = config["mounts"].as_array_mut() {
            // Before the user's own, which may be at the same place.
            let own = FILES.map(|(name, target)| {
                json!({ "destination": target, "type": "bind", "source": folder.join(name), "options": ["bind", "rprivate", "rw"] })
            });
            let first_own = mounts.iter().position(|mount| mount["type"] == "bind").unwrap_or(mounts.len());
            mounts.splice(first_own..first_own, own);
        }
        let plugin_folders = self.plugin_folders.into_iter().map(Into::into).collect();
        let Self { network, container, ports, .. } = self;
        Attachment { network, container, namespace, ports, plugin_folders, result: None }
    }
}

/// Makes the container's namespace and its part of the network.
pub(crate) async fn attach(folder: &Folder, record: &mut Record) -> Result<()> {
    let Some(attachment) = &mut record.network else { return Ok(()) };
    Namespace::make(&attachment.namespace).context("make the container's network namespace")?;
    let outcome = coracle_cni::add(attachment).await?;
    let host = resolv_conf();
    let names = plan::resolv_conf(&host, &outcome);
    if !names.contains("nameserver") {
        eprintln!("coracle: warning: the container finds no names: the host names no server that it could ask");
    }
    for ((name, _), text) in FILES.iter().zip([plan::hosts(&attachment.container, &outcome), names]) {
        std::fs::write(folder.join(name), text).with_context(|| format!("write the container's {name}"))?;
    }
    // What the plugins have answered is needed at the end, whoever comes to that.
    folder.write(record)
}

/// The host's `resolv.conf`, or what stands behind it where it names only the host itself.
fn resolv_conf() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let is_of_use = |text: &String| plan::resolv_conf(text, &coracle_cni::Outcome::default()).contains("nameserver");
    let all = RESOLV_CONF.map(read);
    all.iter().find(|text| is_of_use(text)).unwrap_or(&all[0]).clone()
}

/// Takes the container out of its network, and the namespace away. Safe to do again.
pub(crate) async fn detach(folder: &Folder, record: &mut Record) {
    let Some(attachment) = record.network.take() else { return };
    for problem in coracle_cni::del(&attachment).await {
        eprintln!("coracle: warning: {problem}");
    }
    if let Err(error) = Namespace::remove(&folder.join("netns")) {
        eprintln!("coracle: warning: the network namespace of {} can't be removed: {error}", record.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_names_namespace_and_files() {
        let temporary = tempfile::tempdir().unwrap();
        let root = Root::new(temporary.path().into());
        let folder = root.create("web").unwrap();
        let mut config = json!({
            "mounts": [{ "type": "proc", "destination": "/proc" }, { "type": "bind", "destination": "/etc/hosts" }],
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "network" }] }
        });
        let network = Network::bridge("10.89.0.0/24", temporary.path());
        let wish = Wish { network, container: "abc".into(), ports: Vec::new(), plugin_folders: vec!["/x".into()] };
        let attachment = wish.of(&folder, &mut config);
        assert_eq!(config["linux"]["namespaces"][1]["path"], json!(attachment.namespace));
        let places: Vec<_> = config["mounts"].as_array().unwrap().iter().map(|mount| &mount["destination"]).collect();
        assert_eq!(places, ["/proc", "/etc/hosts", "/etc/resolv.conf", "/etc/hosts"]);
    }
}

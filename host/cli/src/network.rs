//! `--network` and `--publish`: the network of a container, from its namespace to the files in which names are looked up.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use coracle_cni::{Attachment, BRIDGE, Network, Port, Protocol, namespace, plan};
use coracle_settings::Settings;
use serde_json::{Value, json};

use crate::container::{Folder, Record, Root};
use crate::run::Args;

/// The name of no network.
const NONE: &str = "none";

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

/// The network that the arguments, or else the settings, ask for; `None` for no network at all.
pub(crate) fn plan(root: &Root, args: &Args, id: &str) -> Result<Option<Wish>> {
    let settings = Settings::load()?;
    let is_root = rustix::process::geteuid().is_root();
    let name = match args.network.as_deref() {
        None if !is_root && args.publish.is_empty() && settings.network_default != NONE => {
            eprintln!("coracle: warning: the container has no network: only root can make one on the host");
            return Ok(None);
        }
        None => settings.network_default.as_str(),
        Some(name) => name,
    };
    match name {
        NONE if args.publish.is_empty() => return Ok(None),
        NONE => {
            bail!("--publish: a container without a network has no ports to publish; give it one by --network bridge")
        }
        "host" => bail!(
            "the network host: a machine can't share the host's own network; give --network bridge, and --publish for its ports"
        ),
        _ if is_root => {}
        _ => bail!(
            "the network {name}: only root can make one on the host; run this by sudo, or with --network none and no ports"
        ),
    }
    let network = network(name, &settings)?;
    if name == BRIDGE {
        let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
        for subnet in &settings.network_subnets {
            if let Some(link) = plan::link_in_the_way(subnet, &routes) {
                bail!("the addresses {subnet} are the link {link}'s on this host: give others in network.subnets");
            }
        }
    }
    check_free(root, &args.publish)?;
    let plugin_folders = settings.network_plugin_folders;
    Ok(Some(Wish { network, container: id.into(), ports: args.publish.clone(), plugin_folders }))
}

/// The network of that name.
fn network(name: &str, settings: &Settings) -> Result<Network> {
    if name == BRIDGE {
        // The bridge is the host's, whatever the root: so are its addresses.
        return Ok(Network::bridge(&settings.network_subnets, &settings.run_folder.join("networks")));
    }
    Ok(Network::find(name, &settings.network_configuration_folder)?)
}

/// By what the network is made that containers have without `--network`, or why it can't be.
pub(crate) fn readiness() -> Result<String> {
    let settings = Settings::load()?;
    let name = settings.network_default.as_str();
    if name == NONE {
        return Ok("none, by the settings".into());
    }
    let folders: Vec<PathBuf> = settings.network_plugin_folders.iter().map(Into::into).collect();
    let programs = coracle_cni::programs(&network(name, &settings)?, &folders)?;
    if name == BRIDGE && !std::env::split_paths(plan::PATH).any(|folder| folder.join("iptables").is_file()) {
        bail!("the bridge's plugins need iptables, which is not in {}: install it", plan::PATH);
    }
    if !rustix::process::geteuid().is_root() {
        return Ok(format!("{name} for root, none for others"));
    }
    let folder = programs.first().and_then(|program| program.parent()).unwrap_or(Path::new("/"));
    Ok(format!("{name}, by the plugins in {}", folder.display()))
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
                json!({ "destination": target, "type": "bind", "source": folder.join(name), "options": ["bind", "rprivate", "rw", "x-coracle.copy"] })
            });
            let first_own = mounts.iter().position(|mount| mount["type"] == "bind").unwrap_or(mounts.len());
            mounts.splice(first_own..first_own, own);
        }
        let plugin_folders = self.plugin_folders.into_iter().map(Into::into).collect();
        let Self { network, container, ports, .. } = self;
        Attachment { network, container, namespace, ports, plugin_folders, result: None }
    }
}

/// Makes the container's namespace and its part of the network. Where it fails, [`detach`] undoes all.
pub(crate) async fn attach(folder: &Folder, record: &mut Record) -> Result<()> {
    connect(folder, record).await.context("the container gets no network (with --network none it runs without)")
}

async fn connect(folder: &Folder, record: &mut Record) -> Result<()> {
    let Some(attachment) = &mut record.network else { return Ok(()) };
    coracle_cni::check(attachment)?;
    namespace::make(&attachment.namespace).context("make the container's network namespace")?;
    for index in 0..attachment.network.plugins.len() {
        let Some(attachment) = &mut record.network else { break };
        coracle_cni::add(attachment, index).await?;
        // What a plugin has answered is needed at the end, whoever comes to that.
        folder.write(record)?;
    }
    let Some(attachment) = &record.network else { return Ok(()) };
    let outcome = attachment.result.as_ref().map(plan::outcome).unwrap_or_default();
    for address in attachment.ports.iter().filter_map(|port| port.host_ip) {
        if !outcome.addresses.iter().any(|own| own.is_ipv4() == address.is_ipv4()) {
            bail!(
                "--publish at {address}: the container has no address of that kind on the network {}",
                attachment.network.name
            );
        }
    }
    let names = plan::resolv_conf(&resolv_conf(), &outcome);
    if !names.contains("nameserver") {
        eprintln!("coracle: warning: the container finds no names: the host names no server that it could ask");
    }
    for ((name, _), text) in FILES.iter().zip([plan::hosts(&attachment.container, &outcome), names]) {
        let path = folder.join(name);
        let written = std::fs::write(&path, text);
        // Whatever the caller's mask: everybody in the container reads them.
        written
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)))
            .with_context(|| format!("write the container's {name}"))?;
    }
    Ok(())
}

/// A port that is published already, by another container or by a program of the host's.
fn check_free(root: &Root, ports: &[Port]) -> Result<()> {
    let all = if ports.is_empty() { Vec::new() } else { root.all()? };
    for port in ports {
        let same = |other: &Port| (other.host_port, other.protocol) == (port.host_port, port.protocol);
        for (_, record) in &all {
            if record.network.iter().any(|network| network.ports.iter().any(same)) {
                bail!("--publish {}: the container {} has that port", port.host_port, record.name);
            }
        }
        let address = std::net::SocketAddr::new(port.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), port.host_port);
        let free = match port.protocol {
            Protocol::Tcp => std::net::TcpListener::bind(address).map(drop),
            Protocol::Udp => std::net::UdpSocket::bind(address).map(drop),
        };
        free.with_context(|| format!("--publish: {address} on the host can't be had"))?;
    }
    Ok(())
}

/// The host's `resolv.conf`, or what stands behind it where it names only the host itself.
fn resolv_conf() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let is_of_use = |text: &String| plan::resolv_conf(text, &coracle_cni::Outcome::default()).contains("nameserver");
    let all = RESOLV_CONF.map(read);
    all.iter().find(|text| is_of_use(text)).unwrap_or(&all[0]).clone()
}

/// Takes the container out of its network, and the namespace away. What can't be done is said, and stays in the record for whoever
/// comes next.
pub(crate) async fn detach(folder: &Folder, record: &mut Record) -> Result<()> {
    let Some(attachment) = &record.network else { return Ok(()) };
    let mut problems: Vec<String> = coracle_cni::del(attachment).await.iter().map(ToString::to_string).collect();
    if let Err(error) = namespace::remove(&attachment.namespace) {
        problems.push(format!("its network namespace can't be removed: {error}"));
    }
    for problem in &problems {
        eprintln!("coracle: warning: the network of {} is not all gone: {problem}", record.name);
    }
    if problems.is_empty() {
        record.network = None;
    }
    folder.write(record)
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
        let network = Network::bridge(&["10.89.0.0/24".into()], temporary.path());
        let wish = Wish { network, container: "abc".into(), ports: Vec::new(), plugin_folders: vec!["/x".into()] };
        let attachment = wish.of(&folder, &mut config);
        assert_eq!(config["linux"]["namespaces"][1]["path"], json!(attachment.namespace));
        let places: Vec<_> = config["mounts"].as_array().unwrap().iter().map(|mount| &mount["destination"]).collect();
        assert_eq!(places, ["/proc", "/etc/hosts", "/etc/resolv.conf", "/etc/hosts"]);
    }
}

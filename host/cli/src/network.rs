//! `--network` and `--publish`: the network of a container, from its namespace to the files in which names are looked up.

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use coracle_cni::{Attachment, BRIDGE, Network, Outcome, Port, Protocol, namespace, plan};
use coracle_settings::{Monitor, Settings};
use serde_json::{Value, json};

use crate::container::{Folder, Record, Root};
use crate::run::Args;
use crate::{place, user};

/// The name of no network.
const NONE: &str = "none";

/// Files of the container's folder that are the container's own.
const FILES: [(&str, &str); 2] = [("hosts", "/etc/hosts"), ("resolv.conf", "/etc/resolv.conf")];

/// Where the host says whom it asks for names; the second where the first names a service of the host's own (systemd-resolved).
const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// What a container is to have.
#[derive(Debug)]
pub(crate) enum Wish {
    /// No network.
    None,
    /// One that plugins make on the host.
    Plugins(Plugins),
    /// One that takes no privileges: an ordinary user's.
    User(Vec<Port>),
}

/// See [`Wish::Plugins`].
#[derive(Debug)]
pub(crate) struct Plugins {
    network: Network,
    container: String,
    ports: Vec<Port>,
    plugin_folders: Vec<String>,
}

/// The name of an ordinary user's network.
const USER: &str = "user";

/// The network that the arguments, or else the settings, ask for.
pub(crate) fn plan(root: &Root, args: &Args, id: &str) -> Result<Wish> {
    let settings = Settings::load()?;
    let is_root = place::is_root();
    let name = match args.network.as_deref() {
        None if !is_root && settings.network_default != NONE => USER,
        None => settings.network_default.as_str(),
        Some(name) => name,
    };
    match name {
        NONE if args.publish.is_empty() => return Ok(Wish::None),
        NONE => {
            bail!("--publish: a container without a network has no ports to publish; give it one by --network bridge")
        }
        "host" => bail!(
            "the network host: a machine can't share the host's own network; give --network bridge, and --publish for its ports"
        ),
        USER => {
            if let Some(address) = args.publish.iter().filter_map(|port| port.host_ip).find(IpAddr::is_ipv6) {
                bail!("--publish at {address}: a user's network is one of IPv4; give an address of that kind, or none");
            }
            check_free(root, &args.publish)?;
            return Ok(Wish::User(args.publish.clone()));
        }
        _ if is_root => {}
        _ => bail!(
            "the network {name}: only root can make one on the host; run this by sudo, or with --network user, which an ordinary \
             user's container has where none is named"
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
    Ok(Wish::Plugins(Plugins { network, container: id.into(), ports: args.publish.clone(), plugin_folders }))
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
    if !place::is_root() || name == USER {
        if !settings.qemu_path.is_file() {
            let qemu = settings.qemu_path.display();
            bail!("a user's network needs QEMU, and there is no {qemu}: install qemu-system-x86 or set `qemu.path`");
        }
        return Ok(match user_server(&settings) {
            Some(passt) => format!("the user's own, by {}", passt.display()),
            None => "the user's own, by QEMU; with passt installed, the host's loopback is out of its reach".into(),
        });
    }
    let folders: Vec<PathBuf> = settings.network_plugin_folders.iter().map(Into::into).collect();
    let programs = coracle_cni::programs(&network(name, &settings)?, &folders)?;
    if name == BRIDGE && !std::env::split_paths(plan::PATH).any(|folder| folder.join("iptables").is_file()) {
        bail!("the bridge's plugins need iptables, which is not in {}: install it", plan::PATH);
    }
    let folder = programs.first().and_then(|program| program.parent()).unwrap_or(Path::new("/"));
    Ok(format!("{name}, by the plugins in {}", folder.display()))
}

/// The program that serves an ordinary user's network, where it is there.
fn user_server(settings: &Settings) -> Option<PathBuf> {
    settings.network_passt_paths.iter().map(PathBuf::from).find(|path| path.is_file())
}

impl Wish {
    /// As that of the container in `folder`: what its record has of it from now on. Its specification names namespace and files.
    pub(crate) fn apply(self, folder: &Folder, config: &mut Value, record: &mut Record) -> Result<()> {
        match self {
            // Whatever the administrator gives to pods without a namespace.
            Self::None => record.overrides.push_str("\nnetwork.user = false"),
            Self::Plugins(wish) => record.network = Some(wish.of(folder, config)),
            Self::User(ports) => {
                own_files(folder, config);
                let settings = Settings::load()?;
                if user_server(&settings).is_none() {
                    eprintln!(
                        "coracle: warning: by QEMU's own network the container reaches what listens on this host's loopback, at \
                         10.0.2.2; install passt, and it does not"
                    );
                }
                let outcome = Outcome { addresses: vec![user::GUEST.into()], ..Outcome::default() };
                write_files(folder, &record.id, &outcome, &format!("nameserver {}\n", user::NAMES))?;
                let text: Vec<String> = ports.iter().map(user::forward).collect();
                record.overrides.push_str(&format!("\nnetwork.user = true\nnetwork.user_ports = {text:?}"));
                record.ports = ports;
            }
        }
        Ok(())
    }
}

/// Settings of a container that count more than the file's, with QEMU as its monitor where the network is QEMU's, or a program's that
/// speaks with QEMU.
pub(crate) fn with_monitor(args: &Args, overrides: String) -> Result<String> {
    let settings = Settings::load()?;
    let is_user = match args.network.as_deref() {
        None => settings.network_default == USER || !place::is_root() && settings.network_default != NONE,
        Some(name) => name == USER,
    };
    if !is_user {
        return Ok(overrides);
    }
    if overrides.contains("\"builtin\"") || overrides.is_empty() && settings.monitor == Monitor::Builtin {
        bail!("the built-in monitor has no network that takes no root: give --network none, or --hypervisor qemu");
    }
    Ok(if overrides.is_empty() { "machine.monitor = \"qemu\"".into() } else { overrides })
}

/// Mounts the container's own files, before the user's own mounts, which may be at the same place.
fn own_files(folder: &Folder, config: &mut Value) {
    if let Some(mounts) = config["mounts"].as_array_mut() {
        let own = FILES.map(|(name, target)| {
            json!({ "destination": target, "type": "bind", "source": folder.join(name), "options": ["bind", "rprivate", "rw", "x-coracle.copy"] })
        });
        let first_own = mounts.iter().position(|mount| mount["type"] == "bind").unwrap_or(mounts.len());
        mounts.splice(first_own..first_own, own);
    }
}

/// Writes the container's own files.
fn write_files(folder: &Folder, container: &str, outcome: &Outcome, names: &str) -> Result<()> {
    for ((name, _), text) in FILES.iter().zip([plan::hosts(container, outcome), names.to_owned()]) {
        let path = folder.join(name);
        let written = std::fs::write(&path, text);
        // Whatever the caller's mask: everybody in the container reads them.
        written
            .and_then(|()| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)))
            .with_context(|| format!("write the container's {name}"))?;
    }
    Ok(())
}

impl Plugins {
    /// As that of the container in `folder`, whose specification names its namespace and files from now on.
    fn of(self, folder: &Folder, config: &mut Value) -> Attachment {
        let namespace = folder.join("netns");
        for entry in config["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            if entry["type"] == "network" {
                entry["path"] = namespace.display().to_string().into();
            }
        }
        own_files(folder, config);
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
    write_files(folder, &attachment.container, &outcome, &names)
}

/// A port that is published already, by another container or by a program of the host's.
fn check_free(root: &Root, ports: &[Port]) -> Result<()> {
    let all = if ports.is_empty() { Vec::new() } else { root.all()? };
    for (number, port) in ports.iter().enumerate() {
        let again = |other: &Port| (other.host_port, other.protocol) == (port.host_port, port.protocol);
        if ports.iter().take(number).any(again) {
            bail!("--publish {}: it is published twice", port.host_port);
        }
        let same = |other: &Port| (other.host_port, other.protocol) == (port.host_port, port.protocol);
        for (_, record) in &all {
            if record.published().any(same) {
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
    let is_of_use = |text: &String| plan::resolv_conf(text, &Outcome::default()).contains("nameserver");
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
        let wish = Plugins { network, container: "abc".into(), ports: Vec::new(), plugin_folders: vec!["/x".into()] };
        let attachment = wish.of(&folder, &mut config);
        assert_eq!(config["linux"]["namespaces"][1]["path"], json!(attachment.namespace));
        let places: Vec<_> = config["mounts"].as_array().unwrap().iter().map(|mount| &mount["destination"]).collect();
        assert_eq!(places, ["/proc", "/etc/hosts", "/etc/resolv.conf", "/etc/hosts"]);
    }
}

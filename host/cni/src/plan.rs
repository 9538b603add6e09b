//! What each plugin is called with, and what their answers mean.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::network::LINK;
use crate::{Network, Port};

/// The container's link.
pub const INTERFACE: &str = "eth0";

/// A container in a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network.
    pub network: Network,
    /// The container's id.
    pub container: String,
    /// The path of its network namespace.
    pub namespace: PathBuf,
    /// Its ports.
    pub ports: Vec<Port>,
    /// Where plugins are looked for.
    pub plugin_folders: Vec<PathBuf>,
    /// What the plugins have answered, once they have; they want it back at the end.
    pub result: Option<Value>,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Make it part of the network.
    Add,
    /// Take it out.
    Del,
}

/// A plugin's call (CNI 1.0, section 2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The program's name.
    pub plugin: String,
    /// Its variables.
    pub environment: Vec<(&'static str, String)>,
    /// What it reads.
    pub input: Value,
}

/// The call of the plugin `index`. `result` is what the one before it has answered; at the end it is that of the last one.
#[must_use]
pub fn call(attachment: &Attachment, command: Command, index: usize, result: Option<&Value>) -> Option<Call> {
    let network = &attachment.network;
    let plugin = network.plugins.get(index)?;
    let mut input = plugin.clone();
    input.insert("name".into(), network.name.clone().into());
    input.insert("cniVersion".into(), network.version.clone().into());
    if let Some(result) = result {
        input.insert("prevResult".into(), result.clone());
    }
    if wants_ports(plugin) && !attachment.ports.is_empty() {
        let ports = serde_json::to_value(&attachment.ports).unwrap_or_default();
        input.insert("runtimeConfig".into(), Map::from_iter([("portMappings".into(), ports)]).into());
    }
    let folders: Vec<_> = attachment.plugin_folders.iter().map(|folder| folder.display().to_string()).collect();
    let environment = vec![
        ("CNI_COMMAND", if command == Command::Add { "ADD".into() } else { "DEL".into() }),
        ("CNI_CONTAINERID", attachment.container.clone()),
        ("CNI_NETNS", attachment.namespace.display().to_string()),
        ("CNI_IFNAME", INTERFACE.into()),
        ("CNI_PATH", folders.join(":")),
        // Plugins start others, such as iptables.
        ("PATH", PATH.into()),
    ];
    Some(Call { plugin: name(plugin).to_owned(), environment, input: input.into() })
}

/// The link, other than the bridge, on which addresses of `subnet` are already, as `/proc/net/route` has it. Only IPv4. A gateway's way
/// to a greater network is in nobody's way: it gives these addresses up.
#[must_use]
pub fn link_in_the_way<'a>(subnet: &str, routes: &'a str) -> Option<&'a str> {
    let (address, bits) = subnet.split_once('/')?;
    let address = u32::from(address.parse::<Ipv4Addr>().ok()?);
    let mask = u32::MAX.checked_shl(32 - bits.parse::<u32>().ok().filter(|bits| *bits <= 32)?).unwrap_or(0);
    routes.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        // As numbers of the network's byte order that are read in the host's.
        let number = |at: usize| u32::from_str_radix(words.get(at)?, 16).ok().map(u32::from_be);
        let (link, destination, gateway, route) = (*words.first()?, number(1)?, number(2)?, number(7)?);
        let both = mask & route;
        let is_in_the_way = address & both == destination & both && (gateway == 0 || route >= mask);
        (link != LINK && route != 0 && is_in_the_way).then_some(link)
    })
}

/// Where plugins find the programs that they start.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether a plugin of the network takes ports.
#[must_use]
pub fn takes_ports(network: &Network) -> bool {
    network.plugins.iter().any(wants_ports)
}

fn wants_ports(plugin: &Map<String, Value>) -> bool {
    plugin.get("capabilities").is_some_and(|all| all.get("portMappings") == Some(&true.into()))
}

/// The name of a plugin's program.
pub(crate) fn name(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// What a container has got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Servers of names, where the network has its own.
    pub name_servers: Vec<String>,
    /// Domains that names are looked up in.
    pub search: Vec<String>,
}

/// Reads the last plugin's answer (CNI 1.0, section 5).
#[must_use]
pub fn outcome(result: &Value) -> Outcome {
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned)).collect()
    };
    let addresses = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
    let addresses = addresses.filter_map(|text| text.split('/').next()?.parse().ok());
    // Each becomes a part of a line of a file.
    let is_server = |text: &String| text.split('%').next().is_some_and(|address| address.parse::<IpAddr>().is_ok());
    let is_word = |text: &String| !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control());
    Outcome {
        addresses: addresses.collect(),
        name_servers: texts(&result["dns"]["nameservers"])
            .into_iter()
            .filter(|text| is_server(text) && is_word(text))
            .collect(),
        search: texts(&result["dns"]["search"]).into_iter().filter(is_word).collect(),
    }
}

/// `/etc/hosts` of a container.
#[must_use]
pub fn hosts(host_name: &str, outcome: &Outcome) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for address in &outcome.addresses {
        text.push_str(&format!("{address}\t{host_name}\n"));
    }
    text
}

/// `/etc/resolv.conf` of a container: the network's own, else the host's without servers that the container can't ask: those on the
/// host's loopback, and those of IPv6 where it has no address of that.
#[must_use]
pub fn resolv_conf(host: &str, outcome: &Outcome) -> String {
    let mut lines: Vec<String> = Vec::new();
    if outcome.name_servers.is_empty() {
        let has_v6 = outcome.addresses.iter().any(IpAddr::is_ipv6);
        let is_out_of_reach = |line: &&str| {
            let mut words = line.split_whitespace();
            let server = words.next() == Some("nameserver");
            let address = words.next().and_then(|word| word.split('%').next()?.parse::<IpAddr>().ok());
            let reached =
                |address: IpAddr| !address.is_loopback() && !address.is_unspecified() && (address.is_ipv4() || has_v6);
            server && !address.is_some_and(reached)
        };
        let text = |line: &&str| !line.trim().is_empty() && !line.trim_start().starts_with(['#', ';']);
        lines.extend(host.lines().filter(text).filter(|line| !is_out_of_reach(line)).map(str::to_owned));
    } else {
        lines.extend(outcome.name_servers.iter().map(|server| format!("nameserver {server}")));
        if !outcome.search.is_empty() {
            lines.push(format!("search {}", outcome.search.join(" ")));
        }
    }
    lines.into_iter().map(|line| line + "\n").collect()
}

/// The plugin's program.
#[must_use]
pub fn program(plugin: &str, folders: &[PathBuf], is_there: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    folders.iter().map(|folder| folder.join(plugin)).find(|path| is_there(path))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_plugin_says_of_names_adds_no_line() {
        let dns = json!({ "nameservers": ["10.0.0.53", "10.0.0.1\nsearch evil", "fe80::1%eth0", "fe80::1%e\nx", "name"],
            "search": ["one.example", "two\nnameserver 6.6.6.6", "a b", ""] });
        let found = outcome(&json!({ "ips": [], "dns": dns }));
        let expected = "nameserver 10.0.0.53\nnameserver fe80::1%eth0\nsearch one.example\n";
        assert_eq!(resolv_conf("", &found), expected);
    }

    #[test]
    fn addresses_that_a_link_has_are_in_the_way() {
        let route = |link: &str, destination: &str, gateway: &str, mask: &str| {
            let reversed = |ip: &str| format!("{:08X}", u32::from(ip.parse::<Ipv4Addr>().unwrap()).to_be());
            let [destination, gateway, mask] = [destination, gateway, mask].map(reversed);
            format!("Iface\tDestination\n{link}\t{destination}\t{gateway}\t0001\t0\t0\t0\t{mask}\t0\t0\t0\n")
        };
        let found = |text: &str| link_in_the_way("10.89.0.0/24", text).map(str::to_owned);
        let none = "0.0.0.0";
        assert_eq!(found(&route("eth0", "10.89.0.0", none, "255.255.255.0")).as_deref(), Some("eth0"));
        assert_eq!(found(&route("lan", "10.0.0.0", none, "255.0.0.0")).as_deref(), Some("lan"));
        assert_eq!(found(&route("a", "10.89.0.128", "10.1.1.1", "255.255.255.128")).as_deref(), Some("a"));
        for other in [
            route("coracle0", "10.89.0.0", none, "255.255.255.0"),
            route("vpn", "10.0.0.0", "10.1.1.1", "255.0.0.0"),
            route("eth0", none, "10.1.1.1", none),
            route("eth0", "10.88.0.0", none, "255.255.255.0"),
            String::from("rubbish\nrubbish rubbish\n"),
        ] {
            assert_eq!(found(&other), None, "{other}");
        }
        assert_eq!(link_in_the_way("fd89::/64", &route("eth0", "10.89.0.0", none, "255.255.255.0")), None);
    }

    pub(crate) fn attachment() -> Attachment {
        Attachment {
            network: Network::bridge(&["10.1.0.0/24".into()], Path::new("/x")),
            container: "c".into(),
            namespace: "/run/netns/c".into(),
            ports: vec!["8080:80".parse().unwrap()],
            plugin_folders: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            result: None,
        }
    }

    #[test]
    fn each_plugin_gets_what_it_asks_for() {
        let attachment = attachment();
        let bridge = call(&attachment, Command::Add, 0, None).unwrap();
        assert_eq!((bridge.plugin.as_str(), &bridge.input["name"]), ("bridge", &json!("coracle")));
        assert!(bridge.input.get("runtimeConfig").is_none() && bridge.input.get("prevResult").is_none());
        assert!(bridge.environment.contains(&("CNI_PATH", "/opt/cni/bin:/usr/lib/cni".into())));
        let portmap = call(&attachment, Command::Del, 1, Some(&json!({ "ips": [] }))).unwrap();
        assert_eq!(portmap.input["runtimeConfig"]["portMappings"][0]["hostPort"], 8080);
        assert_eq!((portmap.environment[0].1.as_str(), &portmap.input["prevResult"]), ("DEL", &json!({ "ips": [] })));
        assert_eq!(call(&attachment, Command::Add, 3, None), None);
        assert!(takes_ports(&attachment.network));
    }

    #[test]
    fn answers_are_read() {
        let result = json!({ "ips": [{ "address": "10.1.0.5/24" }, { "address": "fd00::5/64" }, { "address": "rubbish" }],
            "dns": { "nameservers": ["10.1.0.1"], "search": ["x.example"] } });
        let found = outcome(&result);
        assert_eq!(found.addresses, ["10.1.0.5".parse::<IpAddr>().unwrap(), "fd00::5".parse().unwrap()]);
        assert!(hosts("me", &found).ends_with("10.1.0.5\tme\nfd00::5\tme\n"));
        assert_eq!(resolv_conf("nameserver 9.9.9.9\n", &found), "nameserver 10.1.0.1\nsearch x.example\n");
        assert_eq!(outcome(&json!("rubbish")), Outcome::default());
    }

    #[test]
    fn the_hosts_own_name_servers_are_left_out() {
        let host = "# comment\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nsearch a\noptions edns0\n";
        let expected = "nameserver 192.0.2.1\nsearch a\noptions edns0\n";
        assert_eq!(resolv_conf(host, &Outcome::default()), expected);
        let both = Outcome { addresses: vec!["fd00::5".parse().unwrap()], ..Default::default() };
        assert!(resolv_conf(host, &both).contains("nameserver fe80::1%eth0\n"));
    }
}

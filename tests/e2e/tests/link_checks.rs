//! What a guest has of each kind of link in each model, by many small checks: `check NAME of KIND`.
//!
//! Lane: open: containerd's overlay snapshotter hands over folders.

use std::process::Command;

use coracle_e2e::{Containerd, Host, Netns, Outcome, TapWire, ip, monitor, try_ip};

/// For which models a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum For {
    /// All.
    All,
    /// Those in which the guest's link is on the network of the host's.
    Bridged,
    /// That of a router.
    Routed,
}
use For::{All, Bridged, Routed};

/// Name, for which models, what runs in the guest, and what it prints. `SUBNET` is the network's number, `MAC` the link's address.
const CHECKS: [(&str, For, &str, &str); 27] = [
    ("it_reaches_its_neighbour", All, "ping -c 2 -W 10 10.77.SUBNET.1", " 0% packet loss"),
    ("it_reaches_its_neighbour_by_version_6", All, "ping -6 -c 2 -W 10 fd77:SUBNET::1", " 0% packet loss"),
    ("a_large_packet_passes", All, "ping -c 1 -s 8900 -W 10 10.77.SUBNET.1", " 0% packet loss"),
    ("a_large_packet_of_version_6_passes", All, "ping -6 -c 1 -s 8900 -W 10 fd77:SUBNET::1", " 0% packet loss"),
    ("it_reaches_what_is_behind_the_gateway", All, "ping -c 1 -W 10 10.88.SUBNET.1", " 0% packet loss"),
    ("it_reaches_that_by_version_6", All, "ping -6 -c 1 -W 10 fd88:SUBNET::1", " 0% packet loss"),
    ("the_link_has_its_name_and_is_up", All, "ip -o link show eth0", "UP,LOWER_UP"),
    ("its_largest_packet_is_the_links", All, "cat /sys/class/net/eth0/mtu", "9000"),
    ("its_hardware_address_is_the_links", Bridged, "cat /sys/class/net/eth0/address", "MAC"),
    ("its_hardware_address_is_its_own", Routed, "cat /sys/class/net/eth0/address", "02:c0:ac:00:"),
    ("its_address", Bridged, "ip -4 -o addr show eth0", " 10.77.SUBNET.2/24 "),
    ("its_address_is_alone", Routed, "ip -4 -o addr show eth0", " 10.77.SUBNET.2/32 "),
    ("its_address_of_version_6", Bridged, "ip -6 -o addr show eth0", " fd77:SUBNET::2/64 "),
    ("its_address_of_version_6_is_alone", Routed, "ip -6 -o addr show eth0", " fd77:SUBNET::2/128 "),
    ("the_default_route", Bridged, "ip route", "default via 10.77.SUBNET.1 dev eth0"),
    ("the_default_route_is_by_the_router", Routed, "ip route", "default via 169.254.1.1 dev eth0 onlink"),
    ("the_default_route_of_version_6", Bridged, "ip -6 route", "default via fd77:SUBNET::1 dev eth0"),
    (
        "a_route_with_source_and_metric",
        Bridged,
        "ip route",
        "10.99.0.0/16 via 10.77.SUBNET.1 dev eth0  src 10.77.SUBNET.2  metric 7",
    ),
    ("a_second_way_to_the_same_place", Bridged, "ip route", "10.99.0.0/16 via 10.77.SUBNET.3 dev eth0  metric 9"),
    ("a_route_on_the_link", Bridged, "ip route", "10.98.0.0/16 via 192.0.2.1 dev eth0 onlink"),
    ("a_route_without_a_gateway", Bridged, "ip route", "10.97.0.0/16 dev eth0 scope link"),
    ("a_blackhole", All, "ip route", "blackhole 10.66.0.0/16"),
    ("a_blackhole_of_version_6", All, "ping -6 -c 1 -W 5 fd66::1 2>&1", "Invalid argument"),
    ("what_is_unreachable_is_so", All, "ping -c 1 -W 5 10.67.0.1 2>&1", "No route to host"),
    ("what_is_prohibited_is_so", All, "ping -c 1 -W 5 10.68.0.1 2>&1", "Permission denied"),
    ("a_neighbour_that_was_set", Bridged, "ip neigh", "10.77.SUBNET.77 dev eth0 lladdr 02:00:00:00:00:77"),
    (
        "nothing_was_lost_or_broken",
        All,
        "echo all $(cat /sys/class/net/eth0/statistics/*_errors | sort -u) of them",
        "all 0 of them",
    ),
];

/// Each kind of link: its name, `ip`'s words for it, the network that it is on, and the model.
const KINDS: [(&str, &str, u8, &str); 11] = [
    ("veth", "", 1, "tcfilter"),
    ("macvlan", "macvlan mode bridge", 1, "tcfilter"),
    ("ipvlan", "ipvlan mode l2", 1, "tcfilter"),
    ("vlan", "vlan id 7", 2, "tcfilter"),
    ("tap", TAP, 1, "tcfilter"),
    ("tap, routed", TAP, 1, "routed"),
    ("veth, macvtap", "", 1, "macvtap"),
    ("vlan, macvtap", "vlan id 7", 2, "macvtap"),
    ("veth, routed", "", 1, "routed"),
    ("macvlan, routed", "macvlan mode bridge", 1, "routed"),
    ("vlan, routed", "vlan id 7", 2, "routed"),
];

/// A link whose other end is a program.
const TAP: &str = "tap";

/// The other end of a wire, in a namespace of its own: it answers on the wire itself and on a VLAN of it.
fn far_end(host: &Host, number: usize, pod: &Netns, words: &str) -> (Netns, Option<TapWire>) {
    let far = Netns::new(host, &format!("f{number}"));
    let mut wire = None;
    if words == TAP {
        wire = Some(TapWire::between((pod, "eth0"), (&far, "end")));
        pod.ip("link set eth0 mtu 9000");
        far.ip("link set end mtu 9000");
    } else {
        // A veth is the wire itself; all others stand on one, whose end is in the test's own namespace.
        let is_veth = words.is_empty();
        let near = if is_veth { format!("name eth0 netns {}", pod.name()) } else { format!("name wire{number}") };
        ip(&format!("link add {near} mtu 9000 type veth peer name end mtu 9000 netns {}", far.name()));
        if !is_veth {
            ip(&format!("link set wire{number} up"));
        }
    }
    for (link, subnet) in [("end", 1), ("end.7", 2)] {
        // A kernel without VLANs has only the first.
        if link == "end"
            || try_ip(&format!("-netns {} link add link end name end.7 type vlan id 7", far.name())).code == 0
        {
            far.ip(&format!("address add 10.77.{subnet}.1/24 dev {link}"));
            far.ip(&format!("address add fd77:{subnet}::1/64 dev {link} nodad"));
            far.ip(&format!("address add 10.88.{subnet}.1/32 dev lo"));
            far.ip(&format!("address add fd88:{subnet}::1/128 dev lo"));
            far.ip(&format!("link set {link} up"));
        }
    }
    far.ip("link set lo up");
    (far, wire)
}

/// Sets the pod's link up, with routes and neighbours of every kind.
fn set_up(pod: &Netns, subnet: u8, model: &str) {
    pod.ip(&format!("address add 10.77.{subnet}.2/24 dev eth0"));
    pod.ip(&format!("address add fd77:{subnet}::2/64 dev eth0 nodad"));
    pod.ip("link set eth0 up");
    pod.ip(&format!("route add default via 10.77.{subnet}.1"));
    pod.ip(&format!("-6 route add default via fd77:{subnet}::1"));
    for (barred, place) in [("blackhole", "10.66"), ("unreachable", "10.67"), ("prohibit", "10.68")] {
        pod.ip(&format!("route add {barred} {place}.0.0/16"));
    }
    pod.ip("route add blackhole fd66::/64");
    if model != "routed" {
        pod.ip(&format!("route add 10.99.0.0/16 via 10.77.{subnet}.1 src 10.77.{subnet}.2 metric 7"));
        pod.ip(&format!("route add 10.99.0.0/16 via 10.77.{subnet}.3 metric 9"));
        pod.ip("route add 10.98.0.0/16 via 192.0.2.1 dev eth0 onlink");
        pod.ip("route add 10.97.0.0/16 dev eth0 scope link");
        pod.ip(&format!("neigh add 10.77.{subnet}.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent"));
    }
}

/// What there is of the pod's link, as far as nobody but a pod changes it.
fn state(pod: &Netns) -> String {
    let mut command = Command::new("tc");
    command.args(["-netns", pod.name(), "qdisc", "show"]);
    let lines =
        |text: &str| text.lines().filter(|line| !line.contains("valid_lft")).map(str::to_owned).collect::<Vec<_>>();
    [pod.ip("-d link show eth0"), pod.ip("-4 addr show eth0"), pod.ip("-4 route"), Outcome::of(command, b"").stdout]
        .iter()
        .flat_map(|text| lines(text))
        .collect::<Vec<_>>()
        .join("\n")
}

fn checks_of(
    kind: &str,
    model: &str,
    subnet: u8,
    pod: &Netns,
    containerd: &Containerd,
    id: &str,
) -> (usize, Vec<String>) {
    let mac = pod.ip("-o link show eth0");
    let mac = mac.split("link/ether ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap().to_owned();
    let filled = |text: &str| text.replace("SUBNET", &subnet.to_string()).replace("MAC", &mac);
    let wanted = |for_: For| match for_ {
        All => true,
        Bridged => model != "routed",
        Routed => model == "routed",
    };
    let chosen: Vec<_> = CHECKS.iter().filter(|(_, for_, ..)| wanted(*for_)).collect();
    let script: String =
        chosen.iter().map(|(name, _, command, _)| format!("echo '=== {name}'; {}\n", filled(command))).collect();
    let before = state(pod);
    let namespace = format!("network:{}", pod.path());
    let run = ["run", "--rm", "--runtime", "io.containerd.coracle.v2", "--with-ns", &namespace, "test:latest", id];
    let outcome = containerd.ctr(&[&run, ["sh", "-c", &script].as_slice()].concat());
    assert_eq!(outcome.code, 0, "{kind}: {outcome:?}");
    let mut failed = Vec::new();
    let mut check = |name: &str, passed: bool, why: &dyn Fn() -> String| {
        println!("check {name} of {kind} ... {}", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(format!("{name} of {kind}: {}", why()));
        }
    };
    for (name, _, _, expected) in &chosen {
        let said = outcome.stdout.split(&format!("=== {name}\n")).nth(1).unwrap_or_default();
        let said = said.split("=== ").next().unwrap_or_default();
        // busybox writes a route's words with one blank or two.
        let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let expected = filled(expected);
        check(name, plain(said).contains(&plain(&expected)), &|| format!("{expected:?} is not in {said:?}"));
    }
    let after = state(pod);
    check("the_link_is_as_it_was", after == before, &|| format!("{before}\nand now\n{after}"));
    let links = pod.ip("-o link");
    check("nobody_else_is_in_the_namespace", links.lines().count() == 2, &|| links.clone());
    (chosen.len() + 2, failed)
}

#[test]
fn the_checks_of_links_pass() {
    let mut host = Host::with_own_network();
    let containerd = Containerd::start(&host);
    let (mut count, mut failed) = (0, Vec::new());
    for (number, (kind, words, subnet, model)) in KINDS.into_iter().enumerate() {
        host = host.set("network.model", &format!("{model:?}"));
        let pod = Netns::new(&host, &format!("p{number}"));
        let (far, wire) = far_end(&host, number, &pod, words);
        let stands_on_one = !words.is_empty() && words != TAP;
        if stands_on_one {
            let made = try_ip(&format!("link add link wire{number} name eth0 netns {} type {words}", pod.name()));
            if made.code != 0 {
                // The lab's kernel has them all.
                let is_missing = made.stderr.contains("Unknown device type") && monitor() == "qemu-system";
                assert!(is_missing, "{kind}: {made:?}");
                println!("left out: this kernel makes no {words}: {}", made.stderr.trim());
                ip(&format!("link delete wire{number}"));
                continue;
            }
        }
        set_up(&pod, subnet, model);
        let (checked, wrong) = checks_of(kind, model, subnet, &pod, &containerd, &format!("k{number}"));
        count += checked;
        failed.extend(wrong);
        if stands_on_one {
            ip(&format!("link delete wire{number}"));
        }
        drop((wire, pod, far));
    }
    drop(containerd);
    host.audit();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    println!("{count} checks of links");
}

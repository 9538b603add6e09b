//! Networks: what a container reaches, by what it is reached, and that nothing of it stays.
//!
//! Lane: open: containerd's overlay snapshotter hands over folders.

use std::process::Command;
use std::time::{Duration, Instant};

use coracle_e2e::{Containerd, Host, Netns, Outcome, Running, ip, monitor, try_ip};

fn host_says(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments);
    let outcome = Outcome::of(command, b"");
    assert_eq!(outcome.code, 0, "{program} {arguments:?}: {outcome:?}");
    outcome.stdout
}

/// Runs a container in the background whose script says "serves" when it does.
fn serves(host: &Host, name: &str, options: &[&str], script: &str) {
    let image = host.image();
    let mut words = vec!["run", "--detach", "--name", name];
    words.extend(options);
    words.extend([image.as_str(), "sh", "-c", script]);
    let outcome = host.coracle_outcome(&words);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !host.coracle_outcome(&["logs", name]).stdout.contains("serves") {
        assert!(Instant::now() < deadline, "{name} does not serve: {:?}", host.coracle_outcome(&["logs", name]));
    }
}

/// Nothing of any container is left in this network namespace, nor in the host's files.
fn is_clean(host: &Host) {
    let links = ip("-o link");
    assert!(links.lines().all(|line| line.contains(": lo:") || line.contains(": coracle0:")), "{links}");
    let rules = host_says("iptables-save", &[]) + &host_says("ip6tables-save", &[]);
    assert!(!["10.89.0.", "fd89::", "8088"].iter().any(|word| rules.contains(word)), "{rules}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&host.root().display().to_string()), "{mounts}");
    assert_eq!(leases(host), Vec::<String>::new());
}

/// The addresses that are taken.
fn leases(host: &Host) -> Vec<String> {
    let files = std::fs::read_dir(host.run.join("networks/coracle")).unwrap().flatten();
    let names = files.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("10.") || name.starts_with("fd89")).collect()
}

#[test]
fn a_container_on_the_bridge_reaches_others_and_is_reached_by_its_port() {
    let host = Host::with_own_network().set("network.subnets", "[\"10.89.0.0/24\", \"fd89::/64\"]");
    let checked = host.coracle_outcome(&["check"]);
    assert!(checked.stdout.contains("ok       network: bridge, by the plugins in /"), "{checked:?}");
    serves(&host, "web", &["--publish", "8088:80"], "httpd -p 80 -h /etc; echo serves; sleep 100000");
    let inside = |script: &str| {
        let outcome = host.coracle_outcome(&["exec", "web", "sh", "-c", script]);
        assert_eq!(outcome.code, 0, "{script}: {outcome:?}");
        outcome.stdout
    };
    let id = host.coracle_outcome(&["exec", "web", "hostname"]).line().to_owned();
    let hosts = inside("cat /etc/hosts");
    assert!(hosts.contains("127.0.0.1\tlocalhost") && hosts.contains(&format!("10.89.0.2\t{id}")), "{hosts}");
    let mut taken = leases(&host);
    taken.sort();
    assert_eq!(taken, ["10.89.0.2", "fd89::2"]);
    assert!(inside("ip -4 -o addr show eth0").contains("10.89.0.2/24"));
    assert!(inside("ip route").contains("default via 10.89.0.1"));
    inside("ping -c 1 -W 5 10.89.0.1 >/dev/null && ping -6 -c 1 -W 5 fd89::1 >/dev/null && test -f /etc/resolv.conf");
    // From the host, by the host's port.
    let mut stream =
        std::net::TcpStream::connect_timeout(&([10, 89, 0, 1], 8088).into(), Duration::from_secs(20)).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /group HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut stream, &mut answer).unwrap();
    assert!(answer.contains("root:x:0"), "{answer}");
    // From another container, by its own.
    let other = host.run(&[], &["guest-probe", "get", "10.89.0.2:80", "/group"]);
    assert!(other.code == 0 && other.stdout.contains("root:x:0"), "{other:?}");
    let image = host.image();
    // Its port is its own.
    let second = host.run(&["--publish", "8088:80"], &["true"]);
    assert!(second.code == 125 && second.stderr.contains("the container web has that port"), "{second:?}");
    let removed = host.coracle_outcome(&["rm", "--force", "web"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    is_clean(&host);
    let again = host.coracle_outcome(&["run", "--rm", "--publish", "8088:80", &image, "ip", "-4", "-o", "addr"]);
    assert!(again.code == 0 && again.stdout.contains("eth0"), "{again:?}");
    is_clean(&host);
    // Two at one instant.
    let start = || Running::start(host.coracle(&["run", "--rm", "--publish", "8088:80", &image, "true"]));
    let both = [start(), start()].map(Running::finish);
    assert!(both.iter().any(|one| one.code == 0), "{both:?}");
    let taken = |one: &Outcome| one.code == 125 && one.stderr.contains("has that port");
    assert!(both.iter().any(taken), "{both:?}");
    is_clean(&host);
    // Whoever started it is killed: the next one cleans up.
    let start = ["run", "--name", "orphan", "--publish", "8088:80", &image, "sh", "-c", "echo up; sleep 100000"];
    let mut running = Running::start(host.coracle(&start));
    running.read_until("up");
    running.signal(rustix::process::Signal::KILL);
    assert_eq!(running.finish().code, 128 + 9);
    let removed = host.coracle_outcome(&["rm", "--force", "orphan"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    is_clean(&host);
    // The bridge and the list of addresses stay for the next container.
    let without = host.run(&["--network", "none"], &["ls", "/sys/class/net"]);
    assert_eq!(without.line(), "lo", "{without:?}");
    ip("link delete coracle0");
    std::fs::remove_dir_all(host.run.join("networks")).unwrap();
    host.audit();
}

#[test]
fn a_network_that_can_not_be_made_says_why_and_leaves_nothing() {
    let host = Host::with_own_network().set("network.plugin_folders", "[\"/nowhere\"]");
    let folder = host.folder.join("nets");
    std::fs::create_dir(&folder).unwrap();
    let list = r#"{"cniVersion":"0.4.0","name":"alone","plugins":[{"type":"bridge","bridge":"b"}]}"#;
    std::fs::write(folder.join("1.conflist"), list).unwrap();
    let host = host.set("network.configuration_folder", &format!("{:?}", folder.display().to_string()));
    for (options, reason) in [
        (vec!["--network", "bridge"], "containernetworking-plugins"),
        (vec![], "with --network none it runs without"),
        (vec!["--network", "nosuch"], "there is no network nosuch"),
        (vec!["--network", "alone", "--publish", "80:80"], "the network alone publishes no ports"),
        (vec!["--network", "host"], "can't share the host's own network"),
        (vec!["--network", "none", "--publish", "80:80"], "has no ports to publish"),
        (vec!["--publish", "80"], "give [ADDRESS:]HOST:CONTAINER"),
    ] {
        let outcome = host.run(&options, &["true"]);
        assert!(outcome.code != 0 && outcome.stderr.contains(reason), "{options:?}: {outcome:?}");
        assert_eq!(host.coracle_outcome(&["ps", "--all", "--quiet"]).stdout, "", "{options:?}");
    }
    let checked = host.coracle_outcome(&["check"]);
    assert!(checked.code == 1 && checked.stdout.contains("failing  network: the network plugin bridge"), "{checked:?}");
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&host.root().display().to_string()), "{mounts}");
    host.audit();
}

/// Runs a script in a pod whose network namespace is at `path`.
fn in_pod(containerd: &Containerd, path: &str, id: &str, script: &str) -> Outcome {
    let namespace = format!("network:{path}");
    let run = ["run", "--rm", "--runtime", "io.containerd.coracle.v2", "--with-ns", &namespace, "test:latest", id];
    containerd.ctr(&[&run, ["sh", "-c", script].as_slice()].concat())
}

#[test]
fn links_of_every_kind_reach_their_peers() {
    let host = Host::with_own_network();
    let containerd = Containerd::start(&host);
    let far = Netns::new(&host, "far");
    // What the links stand on: a wire whose far end answers.
    ip("link add wire mtu 9000 type veth peer name end mtu 9000");
    ip("link set wire up");
    ip(&format!("link set end netns {}", far.name()));
    for (link, subnet) in [("end", 1), ("end.7", 2)] {
        // A kernel without VLANs has only the first.
        if link == "end"
            || try_ip(&format!("-netns {} link add link end name end.7 type vlan id 7", far.name())).code == 0
        {
            far.ip(&format!("address add 10.77.{subnet}.1/24 dev {link}"));
            far.ip(&format!("address add fd77:{subnet}::1/64 dev {link} nodad"));
            far.ip(&format!("link set {link} up"));
        }
    }
    let mut kinds = 0;
    for (number, (kind, subnet)) in
        [("macvlan mode bridge", 1), ("ipvlan mode l2", 1), ("vlan id 7", 2)].into_iter().enumerate()
    {
        let pod = Netns::new(&host, &format!("pod{number}"));
        let made = try_ip(&format!("link add link wire name eth0 netns {} type {kind}", pod.name()));
        if made.code != 0 {
            // The lab's kernel has them all.
            let is_missing = made.stderr.contains("Unknown device type") && monitor() == "qemu-system";
            assert!(is_missing, "{kind}: {made:?}");
            println!("left out: this kernel makes no {kind}: {}", made.stderr.trim());
            continue;
        }
        kinds += 1;
        pod.ip(&format!("address add 10.77.{subnet}.2/24 dev eth0"));
        pod.ip(&format!("address add fd77:{subnet}::2/64 dev eth0 nodad"));
        pod.ip("link set eth0 up");
        pod.ip(&format!("route add default via 10.77.{subnet}.1"));
        pod.ip(&format!("route add 10.99.0.0/16 via 10.77.{subnet}.1 src 10.77.{subnet}.2 metric 7 mtu 1300"));
        pod.ip(&format!("route add 10.99.0.0/16 via 10.77.{subnet}.3 metric 9"));
        pod.ip("route add 10.98.0.0/16 via 192.0.2.1 dev eth0 onlink");
        pod.ip("route add 10.97.0.0/16 dev eth0 scope link");
        for (barred, place) in [("blackhole", "10.66"), ("unreachable", "10.67"), ("prohibit", "10.68")] {
            pod.ip(&format!("route add {barred} {place}.0.0/16"));
        }
        pod.ip("route add blackhole fd66::/64");
        let routes: Vec<String> =
            [pod.ip("-4 route"), pod.ip("-6 route")].iter().flat_map(|text| words(text)).collect();
        let before = pod.ip("-d link show eth0");
        let script = format!(
            "ping -c 2 -W 10 10.77.{subnet}.1 && ping -6 -c 2 -W 10 fd77:{subnet}::1 && \
             ping -c 1 -s 8900 -W 10 10.77.{subnet}.1 && cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu && \
             ping -c 1 -s 1400 -W 1 10.99.0.1; echo FRAGMENTS; grep Ip: /proc/net/snmp; \
             echo ROUTES; ip route; ip -6 route"
        );
        let outcome = in_pod(&containerd, &pod.path(), &format!("c{number}"), &script);
        assert_eq!(outcome.code, 0, "{kind}: {outcome:?}");
        let mac = before.split("link/ether ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap();
        assert!(outcome.stdout.contains(mac) && outcome.stdout.contains("9000"), "{kind}, {mac}: {outcome:?}");
        let fragments = outcome.stdout.split("FRAGMENTS").nth(1).unwrap();
        assert_eq!(figure(fragments, "FragCreates"), 2, "a route's MTU: {outcome:?}");
        let in_guest = words(outcome.stdout.split("ROUTES").nth(1).unwrap());
        assert!(routes.len() > 9 && routes.iter().all(|route| in_guest.contains(route)), "{routes:#?}\n{in_guest:#?}");
        // The link is as it was, and nobody else is in its namespace.
        assert_eq!(pod.ip("-d link show eth0"), before, "{kind}");
        assert_eq!(pod.ip("-o link").lines().count(), 2, "{kind}");
        let filters = pod.ip("-o link show eth0") + &qdiscs(&pod);
        assert!(!filters.contains("ingress"), "{kind}: {filters}");
    }
    assert!(kinds > 0, "this kernel makes no link of any kind");
    drop(containerd);
    ip("link delete wire");
    drop(far);
    host.audit();
}

/// A figure of `/proc/net/snmp`: of two lines the first has the names.
fn figure(text: &str, name: &str) -> u32 {
    let mut lines = text.lines().filter(|line| line.starts_with("Ip:")).map(str::split_whitespace);
    let names = lines.next().unwrap();
    names.zip(lines.next().unwrap()).find(|(found, _)| *found == name).unwrap().1.parse().unwrap()
}

/// The routes of `ip route`, each with what two versions of `ip` have in common.
fn words(routes: &str) -> Vec<String> {
    let line = |line: &str| {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        // How it came there, what the kernel thinks of it, and what busybox does not show.
        for (word, with) in [("proto", 2), ("linkdown", 1), ("mtu", 2), ("pref", 2), ("error", 2), ("hoplimit", 2)] {
            while let Some(at) = words.iter().position(|found| *found == word) {
                words.drain(at..(at + with).min(words.len()));
            }
        }
        words.join(" ")
    };
    routes.lines().map(line).filter(|line| !line.is_empty()).collect()
}

/// What looks at packets in a namespace.
fn qdiscs(netns: &Netns) -> String {
    host_says("tc", &["-netns", netns.name(), "qdisc", "show"])
}

#[test]
fn a_machine_has_sixteen_links_and_refuses_what_it_can_not_have_by_name() {
    let host = Host::with_own_network();
    let containerd = Containerd::start(&host);
    let pod = Netns::new(&host, "pod");
    pod.ip("tuntap add odd0 mode tap");
    pod.ip("address add 10.77.1.2/24 dev odd0");
    let refused = in_pod(&containerd, &pod.path(), "odd", "true");
    assert!(
        refused.code != 0 && refused.stderr.contains("the network link odd0 is of the kind tap that no program holds"),
        "{refused:?}"
    );
    pod.ip("link delete odd0");
    let before = ip("-o link");
    let shared = in_pod(&containerd, "/proc/self/ns/net", "shared", "true");
    assert!(shared.code != 0 && shared.stderr.contains("is the host's own"), "{shared:?}");
    assert_eq!(ip("-o link"), before);
    let mut command = Command::new("ip");
    command.args(["netns", "exec", pod.name(), "sh", "-c", "echo inside; read line"]);
    let mut inside = Running::start(command);
    inside.read_until("inside");
    // What whoever lives there has at its links stays.
    pod.ip("link add own0 type veth peer name own1");
    pod.ip("address add 10.77.2.2/24 dev own0");
    host_says("tc", &["-netns", pod.name(), "qdisc", "add", "dev", "own0", "ingress"]);
    let refused = in_pod(&containerd, &pod.path(), "lodger", "true");
    assert!(refused.code != 0 && refused.stderr.contains("is in use by the process"), "{refused:?}");
    inside.write(b"\n");
    assert_eq!(inside.finish().code, 0);
    let refused = in_pod(&containerd, &pod.path(), "second", "true");
    assert!(refused.code != 0 && refused.stderr.contains("add an ingress qdisc"), "{refused:?}");
    assert!(qdiscs(&pod).contains("ingress"));
    pod.ip("link delete own0");
    for number in 0..300 {
        if number == 16 {
            let outcome = in_pod(&containerd, &pod.path(), "all", "ls /sys/class/net | wc -l");
            assert_eq!(outcome.line(), "17", "{outcome:?}");
        }
        pod.ip(&format!("link add v{number} type veth peer name w{number}"));
        pod.ip(&format!("address add 10.{}.{}.2/24 dev v{number}", 77 + number / 256, number % 256));
    }
    let refused = in_pod(&containerd, &pod.path(), "many", "true");
    assert!(refused.code != 0 && refused.stderr.contains("300 links with addresses"), "{refused:?}");
    assert!(!qdiscs(&pod).contains("ingress"));
    drop(containerd);
    drop(pod);
    host.audit();
}

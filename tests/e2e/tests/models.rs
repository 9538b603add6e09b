//! The ways in which a link of a pod's network namespace and the guest's are one another's wire: what passes, what is refused, and
//! that the link is as it was afterwards.
//!
//! Lane: open: containerd's overlay snapshotter hands over folders, and links come later.

use std::process::Command;
use std::time::{Duration, Instant};

use coracle_e2e::{Containerd, Host, Netns, Outcome, Running, Shim, Wire, busybox_root, ip, monitor, run_in, try_ip};

fn command_in_pod(containerd: &Containerd, netns: &Netns, id: &str, script: &str) -> Command {
    let namespace = format!("network:{}", netns.path());
    let run = ["run", "--rm", "--runtime", "io.containerd.coracle.v2", "--with-ns", &namespace, "test:latest", id];
    containerd.command(&[&run, ["sh", "-c", script].as_slice()].concat())
}

/// The models that this monitor's machines and this kernel have.
fn models() -> Vec<&'static str> {
    vec!["tcfilter", "macvtap", "routed"]
}

fn quoted(word: &str) -> String {
    format!("{word:?}")
}

/// Whether this kernel makes a link of that kind.
fn has_kind(netns: &Netns, words: &str) -> bool {
    let made = try_ip(&format!("-netns {} link add {words}", netns.name()));
    if made.code != 0 {
        println!("left out: this kernel makes no {words}: {}", made.stderr.trim());
    }
    made.code == 0
}

#[test]
fn every_model_carries_both_versions_of_ip_in_both_directions() {
    let mut host = Host::with_own_network();
    let containerd = Containerd::start(&host);
    let folder = host.folder.join("served");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("big"), (0..4_000_000_u32).map(|n| n.to_le_bytes()[0]).collect::<Vec<_>>()).unwrap();
    for model in models() {
        host = host.set("network.model", &quoted(model));
        let wire = Wire::new(&host, model);
        let before = wire.state();
        let server = wire.serve(&folder);
        let script = "echo READY; until [ -e /tmp/go ]; do sleep 0.1; done; ping -c 2 -W 10 10.77.1.1 && ping -6 -c 2 -W 10 fd77:1::1 && ping -c 1 -W 10 10.88.0.1 && \
            ping -6 -c 1 -W 10 fd88::1 && ping -c 1 -s 8900 -W 10 10.77.1.1 && echo PASSED; \
            busybox wget -q -O - http://10.88.0.1:8000/big | md5sum; \
            ip -o address show eth0; ip route; ip -6 route; ping -c 1 -W 1 10.66.0.1; \
            httpd -p 80 -h /etc; echo SERVES; until [ -e /tmp/done ]; do sleep 0.1; done";
        let id = format!("m-{model}");
        let mut inside = Running::start(command_in_pod(&containerd, &wire.pod, &id, script));
        inside.read_until("READY");
        // The other side speaks first: it has to find the guest, and nobody in its place.
        wire.far.ip("neighbour flush all");
        for address in ["10.77.1.2", "fd77:1::2"] {
            let answer = run_in(&wire.far, "busybox", &["ping", "-c", "2", "-W", "10", address]);
            assert_eq!(answer.code, 0, "{model}, {address}: {answer:?}");
            if model == "macvtap" {
                let mac = before.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
                assert!(wire.far.ip("neighbour").contains(mac), "{}", wire.far.ip("neighbour"));
            }
        }
        let go = containerd.ctr(&["task", "exec", "--exec-id", "go", &id, "touch", "/tmp/go"]);
        assert_eq!(go.code, 0, "{go:?}");
        let said = inside.read_until("SERVES");
        assert!(said.contains("PASSED"), "{model}: {said}");
        let sum = Outcome::of(
            {
                let mut sum = Command::new("md5sum");
                sum.arg(folder.join("big"));
                sum
            },
            b"",
        );
        assert!(said.contains(sum.stdout.split(' ').next().unwrap()), "{model}: {said}");
        let (mask4, mask6) = if model == "routed" { ("32", "128") } else { ("24", "64") };
        assert!(said.contains(&format!("10.77.1.2/{mask4}")) && said.contains(&format!("fd77:1::2/{mask6}")), "{said}");
        assert!(said.contains("blackhole 10.66.0.0/16") || said.contains("prohibit"), "{model}: {said}");
        // From the other side.
        for address in ["10.77.1.2", "fd77:1::2"] {
            let answer = run_in(&wire.far, "busybox", &["ping", "-c", "2", "-W", "10", address]);
            assert_eq!(answer.code, 0, "{model}, {address}: {answer:?}");
        }
        let page = run_in(&wire.far, "busybox", &["wget", "-q", "-O", "-", "http://10.77.1.2/group"]);
        assert!(page.stdout.contains("root:x:0"), "{model}: {page:?}");
        let done = containerd.ctr(&["task", "exec", "--exec-id", "done", &id, "touch", "/tmp/done"]);
        assert_eq!(done.code, 0, "{done:?}");
        assert_eq!(inside.finish().code, 0, "{model}");
        assert_eq!(wire.state(), before, "{model}: the link is as it was");
        server.signal(rustix::process::Signal::KILL);
        let _ = server.finish();
    }
    drop(containerd);
    host.audit();
}

/// The mean size of what the machine's end of a wire has sent and received, in bytes a packet.
fn packet_bytes(wire: &Wire) -> (u64, u64) {
    let links = wire.pod.ip("-s -o link show");
    let line = links.lines().find(|line| line.contains(": coracle")).unwrap_or_else(|| panic!("no tap in {links}"));
    let mean = |word: &str| {
        let counted = line.split_once(word).and_then(|(_, rest)| rest.split_once('\\')).expect(line).1;
        let mut numbers = counted.split_whitespace().map(|number| number.parse::<u64>().expect(line));
        let (bytes, packets) = (numbers.next().expect(line), numbers.next().expect(line));
        bytes / packets.max(1)
    };
    (mean("RX:"), mean("TX:"))
}

#[test]
fn a_link_has_queues_for_the_processors_and_carries_segments_whole() {
    let mut host = Host::with_own_network().set("machine.vcpus", "2");
    let containerd = Containerd::start(&host);
    let folder = host.folder.join("served");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("big"), vec![7; 12_000_000]).unwrap();
    for model in models() {
        host = host.set("network.model", &quoted(model)).set("network.queues", "0");
        let wire = Wire::new(&host, model);
        let server = wire.serve(&folder);
        // Four at once, whole each.
        let script = "echo QUEUES $(ls /sys/class/net/eth0/queues | wc -l); for n in 1 2 3 4; do \
            (busybox wget -q -O - http://10.77.1.1:8000/big | md5sum >/tmp/$n) & done; wait; busybox wget -q -O /big http://10.77.1.1:8000/big; \
            echo SUMS $(cat /tmp/* | sort -u | wc -l) $(md5sum </big | cut -c1-8) $(cut -c1-8 /tmp/1); httpd -p 80 -h /; echo SERVES; \
            until [ -e /tmp/done ]; do sleep 0.1; done";
        let id = format!("q-{model}");
        let mut inside = Running::start(command_in_pod(&containerd, &wire.pod, &id, script));
        let told = inside.read_until("SERVES");
        assert!(told.contains("QUEUES 4"), "{model}: {told}");
        let sums: Vec<&str> =
            told.lines().find_map(|line| line.strip_prefix("SUMS ")).expect(&told).split(' ').collect();
        assert!(sums.len() == 3 && sums[0] == "1" && sums[1] == sums[2], "{model}: {told}");
        let out = run_in(&wire.far, "busybox", &["wget", "-q", "-O", "/dev/null", "http://10.77.1.2/big"]);
        assert_eq!(out.code, 0, "{model}: {out:?}");
        // Nobody has cut them to the link's largest packet, of 9000 bytes, in either direction.
        let (from_guest, to_guest) = packet_bytes(&wire);
        assert!(from_guest > 9000 && to_guest > 9000, "{model}: {from_guest} and {to_guest} bytes a packet");
        assert_eq!(containerd.ctr(&["task", "exec", "--exec-id", "done", &id, "touch", "/tmp/done"]).code, 0);
        assert_eq!(inside.finish().code, 0, "{model}");
        server.signal(rustix::process::Signal::KILL);
        let _ = server.finish();
        host = host.set("network.queues", "1");
        let script = "ls /sys/class/net/eth0/queues | wc -l";
        let one = Outcome::of(command_in_pod(&containerd, &wire.pod, &format!("one-{model}"), script), b"");
        assert_eq!((one.code, one.stdout.trim()), (0, "2"), "{model}: {one:?}");
    }
    drop(containerd);
    host.audit();
}

#[test]
fn a_link_is_as_it_was_where_the_shim_was_killed() {
    let mut host = Host::with_own_network().set("network.limit_from_guest_mbit", "100");
    let containerd = Containerd::start(&host);
    for model in models() {
        host = host.set("network.model", &quoted(model));
        if model == "macvtap" {
            host = host.set("network.limit_from_guest_mbit", "0");
        }
        let wire = Wire::new(&host, model);
        let before = wire.state();
        let script = "echo UP; sleep 100000";
        let mut inside = Running::start(command_in_pod(&containerd, &wire.pod, &format!("k-{model}"), script));
        inside.read_until("UP");
        assert_ne!(wire.state(), before, "{model}");
        host.kill("containerd-shim-coracle");
        let _ = inside.finish();
        let deadline = Instant::now() + Duration::from_secs(60);
        while wire.state() != before {
            if Instant::now() > deadline {
                let log = containerd.stop();
                let last: Vec<_> = log.lines().rev().take(20).collect();
                panic!("{model}: {}\nwas\n{before}\ncontainerd, backwards: {last:#?}", wire.state());
            }
            // containerd hears of the end, and cleans up, by itself.
            std::thread::sleep(Duration::from_millis(50));
        }
        host = if model == "macvtap" { host.set("network.limit_from_guest_mbit", "100") } else { host };
    }
    drop(containerd);
    host.audit();
}

#[test]
fn limits_hold_in_each_direction_and_go_with_the_pod() {
    let mut host = Host::with_own_network();
    let containerd = Containerd::start(&host);
    host = host.set("network.limit_to_guest_mbit", "40").set("network.limit_from_guest_mbit", "20");
    let folder = host.folder.join("served");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("big"), vec![7; 3_000_000]).unwrap();
    for model in ["tcfilter", "routed"] {
        host = host.set("network.model", &quoted(model));
        let wire = Wire::new(&host, model);
        let before = wire.state();
        let server = wire.serve(&folder);
        let script = "busybox wget -q -O /big http://10.77.1.1:8000/big; httpd -p 80 -h /; echo SERVES; \
            until [ -e /tmp/done ]; do sleep 0.1; done";
        let id = format!("l-{model}");
        let mut inside = Running::start(command_in_pod(&containerd, &wire.pod, &id, script));
        inside.read_until("SERVES");
        let out = run_in(&wire.far, "busybox", &["wget", "-q", "-O", "/dev/null", "http://10.77.1.2/big"]);
        assert_eq!(out.code, 0, "{model}: {out:?}");
        let told = wire.says("tc", &["-s", "qdisc", "show"]);
        let mut limited = 0;
        for part in told.split("qdisc ").filter(|part| part.starts_with("tbf")) {
            let rate = if part.contains(" dev eth0 ") { "rate 20Mbit" } else { "rate 40Mbit" };
            assert!(part.contains(rate), "{model}: {told}");
            // It has held something back.
            assert!(!part.contains("overlimits 0 "), "{model}: {told}");
            limited += 1;
        }
        assert_eq!(limited, 2, "{model}: {told}");
        let done = containerd.ctr(&["task", "exec", "--exec-id", "done", &id, "touch", "/tmp/done"]);
        assert_eq!(done.code, 0, "{done:?}");
        assert_eq!(inside.finish().code, 0, "{model}");
        assert_eq!(wire.state(), before, "{model}");
        server.signal(rustix::process::Signal::KILL);
        let _ = server.finish();
        // A link that somebody limits already is not taken.
        let _ = wire.says("tc", &["qdisc", "add", "dev", "eth0", "root", "handle", "1:", "pfifo"]);
        let before = wire.state();
        let refused = Outcome::of(command_in_pod(&containerd, &wire.pod, &format!("o-{model}"), "true"), b"");
        assert!(refused.code != 0 && refused.stderr.contains("limit link"), "{model}: {refused:?}");
        assert_eq!(wire.state(), before, "{model}");
    }
    host = host.set("network.model", &quoted("macvtap"));
    let wire = Wire::new(&host, "macvtap");
    let refused = Outcome::of(command_in_pod(&containerd, &wire.pod, "l-macvtap", "true"), b"");
    assert!(refused.code != 0 && refused.stderr.contains("can't be limited"), "{refused:?}");
    drop((wire, containerd));
    host.audit();
}

#[test]
fn no_model_leaves_the_links_alone_and_routed_takes_what_others_refuse() {
    let mut host = Host::with_own_network().set("network.model", "\"none\"");
    let containerd = Containerd::start(&host);
    let wire = Wire::new(&host, "none");
    let before = wire.state();
    let alone = Outcome::of(command_in_pod(&containerd, &wire.pod, "none", "ls /sys/class/net"), b"");
    assert_eq!(alone.line(), "lo", "{alone:?}");
    assert_eq!(wire.state(), before);
    // On macvlan and the like a macvtap would stand on what those stand on.
    host = host.set("network.model", "\"macvtap\"");
    let pod = Netns::new(&host, "upper");
    if has_kind(&pod, "odd0 type dummy") {
        pod.ip("link set odd0 up");
        if has_kind(&pod, "link odd0 name mv0 type macvlan mode bridge") {
            pod.ip("address add 10.78.0.2/24 dev mv0");
            let refused = Outcome::of(command_in_pod(&containerd, &pod, "mv", "true"), b"");
            assert!(refused.code != 0 && refused.stderr.contains("the kind macvlan, which"), "{refused:?}");
            pod.ip("link delete mv0");
        }
        pod.ip("address add 10.79.0.2/24 dev odd0");
    }
    host = host.set("network.model", "\"routed\"");
    if has_kind(&pod, "tun0 type veth peer name tun1") {
        pod.ip("link delete tun0");
    }
    pod.ip("tuntap add tun0 mode tun");
    pod.ip("address add 10.80.0.2/24 dev tun0");
    pod.ip("link set tun0 up");
    let script = "ip -o -4 address | grep -c 10.80.0.2/32; ip route";
    let taken = Outcome::of(command_in_pod(&containerd, &pod, "tun", script), b"");
    assert!(taken.stdout.starts_with("1\n") && taken.stdout.contains("10.80.0.0/24 via 169.254.1.1"), "{taken:?}");
    drop((wire, pod, containerd));
    host.audit();
}

/// A specification whose network namespace is that one.
fn config(netns: &Netns, script: &str) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": { "args": ["/bin/busybox", "sh", "-c", script], "cwd": "/", "user": { "uid": 0, "gid": 0 },
            "env": ["PATH=/bin"], "capabilities": { "bounding": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"],
            "permitted": ["CAP_NET_RAW"] } },
        "root": { "path": "rootfs" },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] }],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" },
            { "type": "network", "path": netns.path() }] }
    })
}

#[test]
fn links_that_come_between_create_and_start_are_the_guests_and_those_that_went_are_not() {
    let host = Host::with_own_network();
    let wire = Wire::new(&host, "late");
    // Each step has an end of its own.
    let script = "test $(busybox ls /sys/class/net | busybox grep -c late) = 2 || exit 11; \
        test -e /sys/class/net/eth0 && exit 12; busybox ip -o -4 address | grep -q 10.77.3.2/24 || exit 13; \
        busybox ping -c 1 -W 10 10.77.2.1 || exit 14; busybox ping -c 1 -W 10 10.77.3.1 || exit 15; exit 7";
    let mut config = config(&wire.pod, script);
    config["root"]["path"] = busybox_root(&host).into();
    let shim = Shim::start(&host, "late", config.to_string().as_bytes());
    shim.create().unwrap();
    // One goes, two come.
    wire.pod.ip("link delete eth0");
    for number in 2..4 {
        let (pod, far) = (wire.pod.name(), wire.far.name());
        ip(&format!("link add late{number} netns {pod} type veth peer name far{number} netns {far}"));
        for (netns, link, host) in [(&wire.far, format!("far{number}"), 1), (&wire.pod, format!("late{number}"), 2)] {
            netns.ip(&format!("address add 10.77.{number}.{host}/24 dev {link}"));
            netns.ip(&format!("link set {link} up"));
        }
    }
    let started = shim.start_process("");
    if monitor() == "qemu-system" {
        started.unwrap();
        assert_eq!(shim.wait("").unwrap(), 7);
    } else {
        let (_, text) = started.unwrap_err();
        assert!(text.contains("came after the pod's machine was started"), "{text}");
    }
    shim.delete().unwrap();
    shim.shutdown().unwrap();
    // A shim's end comes after its answer.
    let deadline = Instant::now() + Duration::from_secs(30);
    while wire.pod.ip("-o link").contains("coracle") || wire.qdiscs().contains("ingress") {
        assert!(Instant::now() < deadline, "{}{}", wire.pod.ip("-o link"), wire.qdiscs());
    }
    drop(wire);
    host.audit();
}

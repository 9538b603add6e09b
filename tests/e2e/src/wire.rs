//! A wire for tests of networks.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::{Host, Netns, Outcome, Running, ip};

/// A wire between a pod's namespace and another one, whose end there answers.
#[derive(Debug)]
pub struct Wire {
    /// The pod's, with `eth0`: 10.77.1.2 and fd77:1::2.
    pub pod: Netns,
    /// The other one, with `end`: 10.77.1.1 and fd77:1::1, and behind it 10.88.0.1 and fd88::1.
    pub far: Netns,
}

impl Wire {
    /// One whose namespaces are known by `word`.
    ///
    /// # Panics
    /// Where it can't be made.
    #[must_use]
    pub fn new(host: &Host, word: &str) -> Self {
        let wire = Self { pod: Netns::new(host, &format!("p{word}")), far: Netns::new(host, &format!("f{word}")) };
        let (pod, far) = (wire.pod.name(), wire.far.name());
        ip(&format!("link add eth0 mtu 9000 netns {pod} type veth peer name end mtu 9000 netns {far}"));
        for (netns, link, number) in [(&wire.far, "end", 1), (&wire.pod, "eth0", 2)] {
            netns.ip(&format!("address add 10.77.1.{number}/24 dev {link}"));
            netns.ip(&format!("address add fd77:1::{number}/64 dev {link} nodad"));
            netns.ip(&format!("link set {link} up"));
        }
        // Behind the other end.
        wire.far.ip("address add 10.88.0.1/32 dev lo");
        wire.far.ip("address add fd88::1/128 dev lo");
        wire.far.ip("link set lo up");
        wire.pod.ip("route add default via 10.77.1.1");
        wire.pod.ip("-6 route add default via fd77:1::1");
        wire.pod.ip("route add blackhole 10.66.0.0/16");
        let deadline = Instant::now() + Duration::from_secs(30);
        let is_settled = || {
            let link = wire.pod.ip("address show eth0");
            link.contains("state UP") && link.contains("fe80") && !link.contains("tentative")
        };
        // Until the kernel has found that nobody else has its address: it tells that in no way that a script could wait for.
        while !is_settled() {
            assert!(Instant::now() < deadline, "{}", wire.pod.ip("address show eth0"));
            std::thread::sleep(Duration::from_millis(50));
        }
        wire
    }

    /// What there is of the pod's side, but what counts and what the kernel does beside it.
    ///
    /// # Panics
    /// Where a program fails.
    #[must_use]
    pub fn state(&self) -> String {
        let links = self.pod.ip("-d link show");
        let addresses = self.pod.ip("address show eth0");
        let routes = self.pod.ip("route show table all") + &self.pod.ip("-6 route show table main");
        let proxies = self.pod.ip("neighbour show proxy");
        let own = self.pod.ip("-6 route show table local");
        // An address that was put back has another metric, which nobody compares.
        let own: Vec<_> = own.lines().filter_map(|line| line.split(" dev ").next()).collect();
        let forwards = self.says("cat", &["/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"]);
        let lines: Vec<String> = [links, addresses, routes, proxies, own.join("\n"), forwards, self.qdiscs()]
            .iter()
            .flat_map(|text| text.lines().map(|line| line.trim().to_owned()).collect::<Vec<_>>())
            .filter(|line| !line.contains("valid_lft"))
            // How the kernel was told of an address.
            .map(|line| line.replace(" nodad", "").replace(" proto kernel_ll", ""))
            .collect();
        lines.join("\n")
    }

    /// The queueing disciplines of the pod's links.
    #[must_use]
    pub fn qdiscs(&self) -> String {
        let mut command = Command::new("tc");
        command.args(["-netns", self.pod.name(), "-s", "qdisc", "show"]);
        let outcome = Outcome::of(command, b"");
        // Without what was counted.
        outcome.stdout.lines().filter(|line| line.starts_with("qdisc")).map(|line| format!("{line}\n")).collect()
    }

    /// Serves a folder by HTTP at the far end, until it is killed.
    #[must_use]
    pub fn serve(&self, folder: &std::path::Path) -> Running {
        let mut server = Command::new("ip");
        server.args(["netns", "exec", self.far.name(), "busybox", "httpd", "-f", "-p", "8000", "-h"]).arg(folder);
        Running::start(server)
    }

    /// What a program prints in the pod's namespace.
    ///
    /// # Panics
    /// Where it fails.
    #[must_use]
    pub fn says(&self, program: &str, words: &[&str]) -> String {
        let outcome = run_in(&self.pod, program, words);
        assert_eq!(outcome.code, 0, "{program} {words:?}: {outcome:?}");
        outcome.stdout
    }
}

/// Runs a program in a namespace.
#[must_use]
pub fn run_in(netns: &Netns, program: &str, words: &[&str]) -> Outcome {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", netns.name(), program]).args(words);
    Outcome::of(command, b"")
}

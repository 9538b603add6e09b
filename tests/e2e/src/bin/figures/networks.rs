//! TCP over a wire between two namespaces: from and to a pod, and between two; and what a link adds to a pod's start.

use std::process::Command;

use coracle_e2e::{Containerd, Host, Netns, Outcome, Running, Wire, ip};
use serde_json::{Value, json};

use crate::taken::{REFERENCE, Series};

/// How many bytes a stream has, and how often a byte goes there and back.
const BYTES: u64 = 256 << 20;
const PINGS: usize = 2000;

/// Ways in which a pod has its link, each with its settings; the reference has none.
const KINDS: [(&str, &[(&str, &str)]); 5] = [
    (REFERENCE, &[]),
    ("tcfilter", &[("network.model", "\"tcfilter\"")]),
    ("tcfilter_2_queues", &[("network.model", "\"tcfilter\""), ("machine.vcpus", "2")]),
    ("macvtap", &[("network.model", "\"macvtap\"")]),
    ("routed", &[("network.model", "\"routed\"")]),
];

/// How many links a pod has where their part in its start is measured.
const LINKS: [usize; 2] = [1, 8];

pub(crate) fn measure(rounds: usize) -> Value {
    let mut host = Host::with_own_network();
    let containerd = Containerd::start(&host);
    let (mut series, mut starts) = (Series::default(), Series::default());
    for round in 0..rounds {
        for (kind, settings) in KINDS {
            host = host.set("machine.vcpus", "1");
            for (key, value) in settings {
                host = host.set(key, value);
            }
            let runtime = if kind == REFERENCE { "runc" } else { "coracle" };
            let bench = Bench { containerd: &containerd, host: &host, name: format!("{kind}-{round}") };
            bench.streams(kind, runtime, &mut series);
        }
        for (kind, runtime) in [(REFERENCE, "runc"), ("tcfilter", "coracle")] {
            host = host.set("network.model", "\"tcfilter\"").set("machine.vcpus", "1");
            let bench = Bench { containerd: &containerd, host: &host, name: format!("s-{kind}-{round}") };
            bench.starts(kind, runtime, &mut starts);
        }
    }
    drop(containerd);
    host.audit();
    let bytes = |step: &str| step.ends_with("stream").then_some(BYTES);
    json!({
        "bytes": BYTES, "pings": PINGS,
        "kinds": series.report(bytes, |_| REFERENCE.into()),
        "start_with_links": starts.report(|_| None, |_| REFERENCE.into()),
    })
}

struct Bench<'a> {
    containerd: &'a Containerd,
    host: &'a Host,
    name: String,
}

impl Bench<'_> {
    /// A container in a namespace that runs a script.
    fn container(&self, runtime: &str, netns: &Netns, word: &str, script: &str) -> Command {
        let (runtime, namespace) = (format!("io.containerd.{runtime}.v2"), format!("network:{}", netns.path()));
        let id = format!("{}-{word}", self.name);
        let run =
            ["run", "--rm", "--runtime", &runtime, "--with-ns", &namespace, "test:latest", &id, "sh", "-c", script];
        self.containerd.command(&run)
    }

    /// Serves as many connections as there are steps.
    fn server(&self, runtime: &str, netns: &Netns, word: &str) -> Running {
        let mut server = Running::start(self.container(runtime, netns, word, "guest-probe serve 9000 2"));
        let _ = server.read_until("serves");
        server
    }

    fn streams(&self, kind: &str, runtime: &str, series: &mut Series) {
        let wire = Wire::new(self.host, &self.name);
        // The other end is a process of the host, then another one like this.
        for (server, client, place) in
            [(REFERENCE, runtime, "to_host"), (runtime, REFERENCE, "from_host"), (runtime, runtime, "between_pods")]
        {
            let is_pods = place == "from_host";
            let (served_in, called_from, address) =
                if is_pods { (&wire.pod, &wire.far, "10.77.1.2") } else { (&wire.far, &wire.pod, "10.77.1.1") };
            let running =
                self.server(if server == REFERENCE { "runc" } else { server }, served_in, &format!("{place}-s"));
            let script = format!(
                "echo 0; guest-probe stream {address}:9000 {BYTES} && guest-probe pings {address}:9000 {PINGS}"
            );
            let client = if client == REFERENCE { "runc" } else { client };
            let command = self.container(client, called_from, &format!("{place}-c"), &script);
            series.take(kind, &[&format!("{place}_stream"), &format!("{place}_pings")], command);
            let served = running.finish();
            assert_eq!(served.code, 0, "{served:?}");
        }
    }

    /// A pod of nothing but its start and end, with no link and with some.
    fn starts(&self, kind: &str, runtime: &str, series: &mut Series) {
        for count in [0].into_iter().chain(LINKS) {
            let pod = Netns::new(self.host, &format!("l{count}-{}", self.name));
            for number in 0..count {
                let name = pod.name();
                ip(&format!("link add eth{number} netns {name} type veth peer name end{number} netns {name}"));
                pod.ip(&format!("address add 10.78.{number}.2/24 dev eth{number}"));
                pod.ip(&format!("link set eth{number} up"));
            }
            let command = self.container(runtime, &pod, &format!("l{count}"), "true");
            series.time(kind, &format!("{count}_links"), || assert_eq!(Outcome::of(command, b"").code, 0));
        }
    }
}

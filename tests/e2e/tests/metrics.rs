//! Figures of pods: from a shim, from `coracle monitor`, and as Prometheus reads them.
//!
//! Lane: open: what is said of a pod does not depend on how its files come.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use coracle_e2e::cri::msg;
use coracle_e2e::{Host, Netns, POD_CONFIG, PodShim, becomes};
use protobuf::MessageField;

/// A program that is ended with this.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `coracle monitor`, and the address at which it listens.
fn monitor(host: &Host) -> (Ended, String) {
    let mut command = host.coracle(&["monitor", "--listen", "127.0.0.1:0"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.split("http://").nth(1).and_then(|rest| rest.split('/').next()).expect(&line).to_owned();
    (Ended(child), address)
}

/// What is answered to a GET: the status line and the body.
fn get(address: &str, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
    (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
}

/// Processor time of a process, in units of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// A pod of Kubernetes' name `tests/web`, and its shim's process.
fn pod(host: &Host) -> (Netns, PodShim, u32) {
    let netns = Netns::new(host, "web");
    let pod = PodShim::start(host, "web-id");
    let mut config = msg::PodSandboxConfig::new();
    let name = msg::PodSandboxMetadata {
        name: "web".into(),
        namespace: "tests".into(),
        uid: "7".into(),
        ..Default::default()
    };
    config.metadata = MessageField::some(name);
    pod.create(&netns.path(), POD_CONFIG, &config).unwrap();
    let pid = pod.boot().unwrap().pid;
    (netns, pod, pid)
}

#[test]
fn figures_of_pods_are_read_by_prometheus() {
    let host = Host::with_own_network();
    let (netns, pod, pid) = pod(&host);
    let (served, address) = monitor(&host);
    assert_eq!(get(&address, "/sandboxes").1, "web-id\n");
    let (status, text) = get(&address, "/metrics");
    assert!(status.ends_with("200 OK"), "{status}");
    let labels = "sandbox_id=\"web-id\",cri_uid=\"7\",cri_name=\"web\",cri_namespace=\"tests\"";
    for figure in [
        format!("kata_shim_threads{{{labels}}}"),
        format!("kata_hypervisor_proc_status{{{labels},item=\"vmrss\"}}"),
        format!("kata_agent_threads{{{labels}}}"),
        format!("kata_guest_meminfo{{{labels},item=\"mem_total\"}}"),
        format!("kata_guest_load{{{labels},item=\"load1\"}}"),
        format!("kata_shim_rpc_durations_histogram_milliseconds_count{{{labels},action=\"start_sandbox\"}} 1"),
        format!(
            "kata_shim_agent_rpc_durations_histogram_milliseconds_count{{{labels},action=\"grpc.CreateSandboxRequest\"}} 1"
        ),
        format!("coracle_start_phase_milliseconds_count{{{labels},phase=\"machine\"}} 1"),
        format!("coracle_start_phase_milliseconds_count{{{labels},phase=\"greeting\"}} 1"),
        format!("coracle_machine_up{{{labels}}} 1"),
        format!("coracle_agent_up{{{labels}}} 1"),
        format!("coracle_guest_figures_refused{{{labels}}} 0"),
        "kata_monitor_running_shim_count 1".to_owned(),
    ] {
        assert!(text.lines().any(|line| line.starts_with(&figure)), "{figure}: {text}");
    }
    dashboard(&text);
    // The command says the same without a server, and one pod's figures alone.
    let own = host.coracle_outcome(&["metrics", "tests/web"]);
    assert!(own.code == 0 && own.stdout.contains(&format!("coracle_agent_up{{{labels}}} 1\n")), "{own:?}");
    assert!(get(&address, "/metrics?sandbox=other").1.is_empty());
    let family = get(&address, "/metrics?filter_family=kata_guest_load").1;
    assert!(family.contains("kata_guest_load{") && !family.contains("kata_shim"), "{family}");
    assert!(get(&address, "/nowhere").0.contains("404"));
    cost(&served, &address, pid);
    prometheus(&host, &address);
    // A pod that ends is gone from there, and nothing else is.
    pod.stop().unwrap();
    pod.shutdown().unwrap();
    drop(netns);
    becomes("no pod", || get(&address, "/sandboxes").1, String::is_empty);
    assert!(get(&address, "/metrics").1.contains("kata_monitor_running_shim_count 0"));
    drop(served);
    host.audit();
}

/// What the dashboard shows is there; but what only a fault, a use of what is deprecated, or a shared folder brings.
fn dashboard(text: &str) {
    const SOMETIMES: [&str; 4] = [
        "coracle_request_failures_total",
        "coracle_deprecated_use_total",
        "kata_virtiofsd_proc_status",
        "kata_guest_diskstat",
    ];
    let board = include_str!("../../../deploy/grafana/coracle.json");
    let board: serde_json::Value = serde_json::from_str(board).unwrap();
    let panels = board["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let mut seen = 0;
    for expression in targets.map(|target| target["expr"].as_str().unwrap()) {
        let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for name in words.filter(|word| word.starts_with("kata_") || word.starts_with("coracle_")) {
            let family = name.trim_end_matches("_bucket");
            assert!(SOMETIMES.contains(&name) || text.contains(&format!("# TYPE {family} ")), "{name}");
            seen += 1;
        }
    }
    assert!(seen > 15, "{seen} names");
}

/// A hundred scrapes of one pod, as one of a hundred pods: what they cost the host beside the guest. A client that never reads costs nobody anything.
fn cost(served: &Ended, address: &str, shim: u32) {
    let idle: Vec<_> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut deaf = TcpStream::connect(address).unwrap();
    write!(deaf, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let processes = [served.0.id(), shim];
    let before = processes.map(ticks);
    for _ in 0..100 {
        assert!(get(address, "/metrics").0.ends_with("200 OK"));
    }
    let after = processes.map(ticks);
    println!(
        "100 scrapes of one pod: {} ms of the monitor, {} ms of the shim",
        (after[0] - before[0]) * 10,
        (after[1] - before[1]) * 10
    );
    drop((idle, deaf));
}

/// A real one scrapes the monitor.
fn prometheus(host: &Host, address: &str) {
    let Some(program) = std::env::var_os("CORACLE_TEST_PROMETHEUS") else {
        println!("left out: CORACLE_TEST_PROMETHEUS is not set: apt has brought no Prometheus");
        return;
    };
    let config = host.folder.join("prometheus.yml");
    std::fs::write(
        &config,
        format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs: [{{job_name: coracle, static_configs: [{{targets: ['{address}']}}]}}]\n"
        ),
    )
    .unwrap();
    let mut command = Command::new(program);
    command.arg(format!("--config.file={}", config.display()));
    command.arg(format!("--storage.tsdb.path={}", host.folder.join("series").display()));
    command.args(["--web.listen-address=127.0.0.1:9090", "--log.level=error"]);
    let _running = Ended(command.spawn().unwrap());
    let query = |query: &str| {
        let found = std::panic::catch_unwind(|| get("127.0.0.1:9090", &format!("/api/v1/query?query={query}")).1);
        found.unwrap_or_default()
    };
    let connects = || TcpStream::connect("127.0.0.1:9090").is_ok();
    becomes("Prometheus", connects, |is_up| *is_up);
    becomes("a series", || query("kata_guest_load"), |answer| answer.contains("\"cri_name\":\"web\""));
    becomes("all of it", || query("up"), |answer| answer.contains("\"1\"]"));
}

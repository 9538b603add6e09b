//! Traces: one for a pod's start, from containerd's context to the container's exec, as a collector gets it.
//!
//! Lane: open: what is traced does not depend on how files come.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coracle_e2e::bundles::{busybox_folder, end, ext4, script_config};
use coracle_e2e::{Host, Shim, becomes};

/// A span as the collector gets it, and the service that it is of.
#[derive(Debug, Clone)]
struct Span {
    service: String,
    trace: String,
    id: String,
    parent: String,
    name: String,
    begun: u64,
    ended: u64,
}

type Spans = Arc<Mutex<Vec<Span>>>;

/// A collector for traces over HTTP, whose spans come to what is given back.
fn collector() -> (SocketAddr, Spans) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let spans = Spans::default();
    let found = Arc::clone(&spans);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream);
            let (mut line, mut length) = (String::new(), 0);
            reader.read_line(&mut line).unwrap();
            assert_eq!(line, "POST /v1/traces HTTP/1.1\r\n");
            while line != "\r\n" {
                line.clear();
                reader.read_line(&mut line).unwrap();
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                    length = value.trim().parse().unwrap();
                }
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            found.lock().unwrap().extend(read(&body));
            reader.into_inner().write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").unwrap();
        }
    });
    (address, spans)
}

/// The spans of a request (OTLP: `ExportTraceServiceRequest`).
fn read(body: &[u8]) -> Vec<Span> {
    let request: serde_json::Value = serde_json::from_slice(body).unwrap();
    let mut spans = Vec::new();
    for resource in request["resourceSpans"].as_array().unwrap() {
        let attributes = resource["resource"]["attributes"].as_array().unwrap();
        let service = attributes.iter().find(|one| one["key"] == "service.name").unwrap();
        for span in resource["scopeSpans"][0]["spans"].as_array().unwrap() {
            let text = |key: &str| span[key].as_str().unwrap_or_default().to_owned();
            spans.push(Span {
                service: service["value"]["stringValue"].as_str().unwrap().to_owned(),
                trace: text("traceId"),
                id: text("spanId"),
                parent: text("parentSpanId"),
                name: text("name"),
                begun: text("startTimeUnixNano").parse().unwrap(),
                ended: text("endTimeUnixNano").parse().unwrap(),
            });
        }
    }
    spans
}

/// Runs a container to its end, with containerd's context where there is one; how long its create and start took.
fn run(host: &Host, id: &str, traceparent: Option<&str>) -> Duration {
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let mut shim = Shim::start(host, id, script_config("exit 3").to_string().as_bytes());
    if let Some(traceparent) = traceparent {
        shim.metadata.insert("traceparent".into(), vec![traceparent.into()]);
    }
    let begun = Instant::now();
    shim.create_with_root(id, &[("ext4", &whole, &[])]).unwrap();
    let took = begun.elapsed();
    assert_eq!(end(shim), 3);
    took
}

#[test]
fn a_start_is_one_trace_from_containerd_to_the_exec() {
    let host = Host::with_own_network();
    let (address, spans) = collector();
    let host = host.set("tracing.endpoint", &format!("\"http://{address}\""));
    let (trace, root) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    run(&host, "traced", Some(&format!("00-{trace}-{root}-01")));
    let names =
        || spans.lock().unwrap().iter().map(|span| format!("{} {}", span.service, span.name)).collect::<Vec<_>>();
    becomes("a span of the last request", names, |names| names.contains(&"coracle-shim request Delete".into()));
    let all = spans.lock().unwrap().clone();
    let by_id: HashMap<_, _> = all.iter().map(|span| (span.id.as_str(), span)).collect();
    let find = |service: &str, name: &str| {
        let found = all.iter().find(|span| span.service == service && span.name == name);
        found.unwrap_or_else(|| panic!("{service} {name}: {all:#?}"))
    };
    // From the innermost to containerd's own span.
    let path = |span: &Span| {
        let (mut names, mut at) = (vec![span.name.clone()], span);
        while let Some(above) = by_id.get(at.parent.as_str()) {
            assert!(above.begun <= at.begun || at.service == "coracle-agent", "{above:?} {at:?}");
            names.push(above.name.clone());
            at = above;
        }
        assert_eq!(at.parent, root, "{names:?}");
        names.join(" < ")
    };
    assert!(all.iter().all(|span| span.trace == trace && span.begun <= span.ended), "{all:#?}");
    let shims = |name: &str| path(find("coracle-shim", name));
    assert_eq!(
        path(find("coracle-agent", "StartContainer")),
        "StartContainer < agent_call StartContainer < start < request Start"
    );
    assert_eq!(
        path(find("coracle-agent", "CreateContainer")),
        "CreateContainer < agent_call CreateContainer < create < request Create"
    );
    assert_eq!(shims("spawn"), "spawn < machine < boot < create < request Create");
    assert_eq!(shims("greeting"), "greeting < boot < create < request Create");
    assert_eq!(shims("agent_call CreateSandbox"), "agent_call CreateSandbox < agent < boot < create < request Create");
    // Nobody who waits is in the way.
    assert!(!all.iter().any(|span| span.name.contains("Wait")), "{all:#?}");
    host.audit();
}

#[test]
fn a_pod_starts_whatever_its_collector_does() {
    let host = Host::with_own_network();
    // One that takes connections and answers nothing, and one that is away.
    let deaf = TcpListener::bind("127.0.0.1:0").unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let deaf_address = deaf.local_addr().unwrap();
    let alone = run(&host, "alone", None);
    for (id, endpoint) in [("deaf", format!("http://{deaf_address}")), ("gone", format!("http://{gone}"))] {
        let mut host = Host::new();
        host = host.set("tracing.endpoint", &format!("{endpoint:?}"));
        let took = run(&host, id, None);
        println!("{id}: created in {} ms, without a collector in {} ms", took.as_millis(), alone.as_millis());
        // A collector that held up each of the requests would take 5 s of each.
        assert!(took < alone + Duration::from_secs(4), "{took:?}");
        host.audit();
    }
    // What is no address is told before anything starts.
    let wrong = host.set("tracing.endpoint", "\"https://collector.example\"");
    let (_, outcome) = Shim::start_in(&wrong, "wrong", b"{}");
    assert!(outcome.code != 0 && outcome.stderr.contains("tracing.endpoint"), "{outcome:?}");
    wrong.audit();
}

//! Kata's own halves, as a recorded run has them (see transcripts/): its requests to our agent, and our requests beside its.

use std::path::Path;

use coracle_flow::{Bench, Scripted, in_own_mounts, make_rootfs};
use coracle_machine::AgentAddress;
use coracle_protocol::agent::CreateContainerRequest;
use coracle_protocol::protobuf::{Message, MessageFull};
use coracle_protocol::ttrpc::asynchronous::Client;
use coracle_protocol::ttrpc::asynchronous::transport::{Listener, Socket};
use coracle_protocol::ttrpc::{self, Request};
use serde_json::Value;

const TRANSCRIPT: &str = include_str!("../transcripts/kata-4.1-container.jsonl");

struct Frame {
    stream: u64,
    service: String,
    method: String,
    payload: Vec<u8>,
}

/// The requests in their order, and the status code that Kata's agent gave each.
fn requests() -> Vec<(Frame, Option<i64>)> {
    let lines: Vec<Value> = TRANSCRIPT.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let answer = |stream: u64| {
        let found = lines.iter().find(|line| line["type"] == "response" && line["stream"] == stream);
        found.and_then(|line| line["status_code"].as_i64())
    };
    lines
        .iter()
        .filter(|line| line["type"] == "request")
        .map(|line| {
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            let stream = line["stream"].as_u64().unwrap();
            let payload = hex::decode(text("payload_hex")).unwrap();
            (Frame { stream, service: text("service"), method: text("method"), payload }, answer(stream))
        })
        .collect()
}

fn kata_create() -> CreateContainerRequest {
    let requests = requests();
    let (frame, _) = requests.iter().find(|(frame, _)| frame.method == "CreateContainer").unwrap();
    CreateContainerRequest::parse_from_bytes(&frame.payload).unwrap()
}

#[test]
fn katas_requests_are_answered_as_katas_agent_did() {
    in_own_mounts(async {
        // What Kata's host had put there: a root with busybox, where its requests name it.
        let root = kata_create().OCI.Root.Path.clone();
        make_rootfs(Path::new(&root));
        std::os::unix::fs::symlink("busybox", Path::new(&root).join("bin/sleep2")).unwrap();
        let socket = tempfile::tempdir().unwrap();
        let address = AgentAddress::Sockets(socket.path().into());
        let listener = Listener::bind(format!("unix://{}", socket.path().join("1024").display())).unwrap();
        let config = coracle_agent::Config {
            program: std::env::var_os("CORACLE_TEST_AGENT").expect("run this by `cargo xtask test --lane flow`").into(),
            cgroups: format!("/run/cgroup/kata{}", std::process::id()).into(),
            resolv_conf: "/run/resolv.conf".into(),
            shared: coracle_agent::SharedSource::InPlace,
        };
        let cgroups = config.cgroups.clone();
        let _server = coracle_agent::serve(config, listener, Box::pin(futures::stream::empty())).await.unwrap();
        let client = Client::new(Socket::new(address.connect(1024).await.unwrap()));
        let mut polls = Vec::new();
        for (mut frame, expected) in requests() {
            if frame.method == "CreateContainer" {
                // Limits need controllers, which a host with cgroup version 1 keeps to itself; a guest has them.
                let mut create = CreateContainerRequest::parse_from_bytes(&frame.payload).unwrap();
                create.OCI.mut_or_insert_default().Linux.mut_or_insert_default().Resources.clear();
                frame.payload = create.write_to_bytes().unwrap();
            }
            let request = Request {
                service: frame.service,
                method: frame.method.clone(),
                payload: frame.payload,
                ..Default::default()
            };
            // Long polls of the container itself are answered at its end.
            let long = matches!(frame.stream, 5 | 11 | 13);
            if long {
                let client = client.clone();
                polls.push(tokio::spawn(async move { client.request(request).await }));
                continue;
            }
            let code = match client.request(request).await {
                Ok(_) => 0,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    println!("{}: {}", frame.method, status.message());
                    i64::from(status.code() as i32)
                }
                Err(error) => panic!("{} (stream {}): {error}", frame.method, frame.stream),
            };
            let expected = expected.unwrap_or(0);
            // On purpose: input for a process that has ended is NOT_FOUND (5) here, INTERNAL (13) there; a signal for a
            // container's first process that has ended is NOT_FOUND, OK there.
            let ours = match (frame.method.as_str(), frame.stream) {
                ("WriteStdin", _) if expected == 13 => 5,
                ("SignalProcess", 51) => 5,
                _ => expected,
            };
            assert_eq!(code, ours, "{} (stream {})", frame.method, frame.stream);
        }
        polls.into_iter().for_each(|poll| poll.abort());
        let _ = std::fs::remove_dir(cgroups);
    });
}

#[test]
fn our_create_has_the_fields_of_katas() {
    in_own_mounts(async {
        let kata = kata_create();
        // The same container, as a bundle would have it.
        let mut json = coracle_protocol::to_json(&*kata.OCI);
        json["linux"]["resources"] = Value::Null;
        json.as_object_mut().unwrap().get_mut("linux").unwrap().as_object_mut().unwrap().remove("resources");
        // Kata's host has taken it off, as ours does.
        json["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({ "type": "network" }));
        for mount in json["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/dev/shm" {
                mount["type"] = "tmpfs".into();
                mount["options"] = serde_json::json!([]);
            }
        }
        let agent = Scripted::hanging_in("");
        let bench = Bench::with(agent.program(), |_| {});
        let request = coracle_sandbox::CreateRequest {
            id: kata.container_id.clone(),
            spec: coracle_protocol::from_json(&json.to_string()).unwrap(),
            root: bench.rootfs(),
            rootfs: Vec::new(),
            stdio: coracle_sandbox::Stdio::default(),
        };
        bench.sandbox.create(request).await.unwrap();
        let ours = agent.created.lock().unwrap().pop().unwrap();
        bench.sandbox.stop().await.unwrap();
        assert_eq!(ours.container_id, kata.container_id);
        assert_eq!(ours.OCI.Process, kata.OCI.Process);
        assert_eq!(ours.OCI.Linux.MaskedPaths, kata.OCI.Linux.MaskedPaths);
        assert_eq!(ours.OCI.Linux.ReadonlyPaths, kata.OCI.Linux.ReadonlyPaths);
        assert_eq!(ours.OCI.Linux.Namespaces, kata.OCI.Linux.Namespaces);
        let places = |request: &CreateContainerRequest| -> Vec<String> {
            request.OCI.Mounts.iter().map(|mount| mount.destination.clone()).collect()
        };
        assert_eq!(places(&ours), places(&kata));
        // On purpose: the root is the container's folder below the shared one, without Kata's `passthrough`.
        assert_eq!(ours.OCI.Root.Path, "/run/kata-containers/shared/containers/k1/rootfs");
        assert!(!CreateContainerRequest::descriptor().full_name().is_empty());
    });
}

//! Kata's own halves, as a recorded run has them (see transcripts/): its requests to our agent, and our requests beside its.

use std::path::Path;

use coracle_flow::{Bench, Scripted, in_own_mounts, make_rootfs};
use coracle_machine::AgentAddress;
use coracle_protocol::agent::{self as msg, CreateContainerRequest};
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
        let (_serving, client, _socket, cgroups) = serve_agent("kata").await;
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

/// The real agent on a socket, and a client of it.
async fn serve_agent(name: &str) -> (coracle_agent::Serving, Client, tempfile::TempDir, std::path::PathBuf) {
    let socket = tempfile::tempdir().unwrap();
    let address = AgentAddress::Sockets(socket.path().into());
    let listener = Listener::bind(format!("unix://{}", socket.path().join("1024").display())).unwrap();
    let config = coracle_agent::Config {
        program: std::env::var_os("CORACLE_TEST_AGENT").expect("run this by `cargo xtask test --lane flow`").into(),
        cgroups: format!("/run/cgroup/{name}{}", std::process::id()).into(),
        resolv_conf: "/run/resolv.conf".into(),
        shared: coracle_agent::SharedSource::InPlace,
    };
    let cgroups = config.cgroups.clone();
    let serving = coracle_agent::serve(config, listener, Box::pin(futures::stream::empty())).await.unwrap();
    let client = Client::new(Socket::new(address.connect(1024).await.unwrap()));
    (serving, client, socket, cgroups)
}

async fn call(client: &Client, method: &str, message: &impl Message) -> Result<Vec<u8>, ttrpc::Code> {
    let request = Request {
        service: "grpc.AgentService".into(),
        method: method.into(),
        payload: message.write_to_bytes().unwrap(),
        ..Default::default()
    };
    match client.request(request).await {
        Ok(response) => Ok(response.payload),
        Err(ttrpc::Error::RpcStatus(status)) => Err(status.code()),
        Err(error) => panic!("{method}: {error}"),
    }
}

#[test]
fn files_are_copied_to_the_shared_folder_and_nowhere_else() {
    in_own_mounts(async {
        let (_serving, client, _socket, _) = serve_agent("copy").await;
        let shared = coracle_protocol::paths::SHARED;
        let copy = |path: String, mode: u32, data: Vec<u8>, size: usize, offset: usize| msg::CopyFileRequest {
            path,
            file_mode: mode,
            file_size: i64::try_from(size).unwrap(),
            offset: i64::try_from(offset).unwrap(),
            data,
            ..Default::default()
        };
        let whole = |path: &str, mode: u32, data: &[u8]| copy(path.into(), mode, data.to_vec(), data.len(), 0);
        let send = async |request: msg::CopyFileRequest| call(&client, "CopyFile", &request).await.map(drop);
        send(whole(&format!("{shared}/d"), 0o040_755, b"")).await.unwrap();
        send(whole(&format!("{shared}/d/f"), 0o100_644, b"text")).await.unwrap();
        send(whole(&format!("{shared}/l"), 0o120_777, b"d/f")).await.unwrap();
        let big = vec![7; 2 << 20];
        for (number, piece) in big.chunks(1 << 20).enumerate() {
            send(copy(format!("{shared}/big"), 0o100_600, piece.to_vec(), big.len(), number << 20)).await.unwrap();
        }
        assert_eq!(std::fs::read_to_string(Path::new(shared).join("l")).unwrap(), "text");
        assert_eq!(std::fs::read(Path::new(shared).join("big")).unwrap(), big);
        for path in ["/tmp/evil", "/run/kata-containers/shared/foo"] {
            assert_eq!(send(whole(path, 0o100_644, b"x")).await, Err(ttrpc::Code::INVALID_ARGUMENT), "{path}");
            assert!(!Path::new(path).exists());
        }
        let stats = msg::VolumeStatsRequest { volume_guest_path: shared.into(), ..Default::default() };
        let usage = call(&client, "GetVolumeStats", &stats).await.unwrap();
        let usage = coracle_protocol::csi::VolumeStatsResponse::parse_from_bytes(&usage).unwrap().usage;
        assert!(usage.len() == 2 && usage[0].total > 0 && usage[0].used <= usage[0].total, "{usage:?}");
        let elsewhere = msg::VolumeStatsRequest { volume_guest_path: "/etc".into(), ..Default::default() };
        assert_eq!(call(&client, "GetVolumeStats", &elsewhere).await, Err(ttrpc::Code::INVALID_ARGUMENT));
        let resize =
            |path: &str| msg::ResizeVolumeRequest { volume_guest_path: path.into(), size: 1, ..Default::default() };
        assert_eq!(call(&client, "ResizeVolume", &resize("/etc")).await, Err(ttrpc::Code::INVALID_ARGUMENT));
        // What is shared here is a folder of memory.
        assert_eq!(call(&client, "ResizeVolume", &resize(shared)).await, Err(ttrpc::Code::UNIMPLEMENTED));
    });
}

#[test]
fn what_the_agent_does_not_do_it_says_by_its_code() {
    in_own_mounts(async {
        let (_serving, client, _socket, _) = serve_agent("codes").await;
        let nothing = coracle_protocol::protobuf::well_known_types::empty::Empty::new();
        for method in
            ["MemAgentMemcgSet", "MemAgentCompactSet", "MemHotplugByProbe", "UpdateEphemeralMounts", "SetPolicy"]
        {
            assert_eq!(call(&client, method, &nothing).await, Err(ttrpc::Code::UNIMPLEMENTED), "{method}");
        }
        // ttrpc's own word for a method that nobody has.
        assert_eq!(call(&client, "NoSuchMethod", &nothing).await, Err(ttrpc::Code::UNIMPLEMENTED));
        let swap = msg::AddSwapPathRequest { path: "/tmp/../etc/passwd".into(), ..Default::default() };
        assert_eq!(call(&client, "AddSwapPath", &swap).await, Err(ttrpc::Code::INVALID_ARGUMENT));
        let swap = msg::AddSwapRequest { PCIPath: vec![31, 31], ..Default::default() };
        assert_eq!(call(&client, "AddSwap", &swap).await, Err(ttrpc::Code::NOT_FOUND));
        let data = msg::GetDiagnosticDataRequest {
            log_type: "everything".into(),
            container_id: "c".into(),
            ..Default::default()
        };
        assert_eq!(call(&client, "GetDiagnosticData", &data).await, Err(ttrpc::Code::INVALID_ARGUMENT));
        let one = msg::OnlineCPUMemRequest { nb_cpus: 1, cpu_only: true, ..Default::default() };
        call(&client, "OnlineCPUMem", &one).await.unwrap();
        call(&client, "RemoveStaleVirtiofsShareMounts", &nothing).await.unwrap();
        // A field that nobody knows is passed over: number 999, a text.
        let mut payload = msg::StartContainerRequest { container_id: "none".into(), ..Default::default() };
        payload.special_fields.mut_unknown_fields().add_length_delimited(999, b"later".to_vec());
        assert_eq!(call(&client, "StartContainer", &payload).await, Err(ttrpc::Code::NOT_FOUND));
    });
}

#[test]
fn a_termination_message_is_read_from_its_mount() {
    in_own_mounts(async {
        let (_serving, client, _socket, cgroups) = serve_agent("message").await;
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("rootfs");
        make_rootfs(&root);
        let log = folder.path().join("termination");
        std::fs::write(&log, "").unwrap();
        let spec = serde_json::json!({
            "root": { "path": root },
            "process": { "args": ["/bin/sh", "-c", "echo the end >/dev/termination-log"], "env": ["PATH=/bin"], "cwd": "/", "user": {} },
            "annotations": { "io.kubernetes.container.terminationMessagePath": "/dev/termination-log" },
            "mounts": [{ "destination": "/dev/termination-log", "type": "bind", "source": log, "options": ["rbind"] }],
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] }
        });
        let create = CreateContainerRequest {
            container_id: "c".into(),
            OCI: Some(coracle_protocol::from_json(&spec.to_string()).unwrap()).into(),
            ..Default::default()
        };
        call(&client, "CreateContainer", &create).await.unwrap();
        let of = |id: &str| msg::StartContainerRequest { container_id: id.into(), ..Default::default() };
        call(&client, "StartContainer", &of("c")).await.unwrap();
        let wait = msg::WaitProcessRequest { container_id: "c".into(), ..Default::default() };
        call(&client, "WaitProcess", &wait).await.unwrap();
        let data = msg::GetDiagnosticDataRequest {
            log_type: "termination_log".into(),
            container_id: "c".into(),
            ..Default::default()
        };
        let answer = call(&client, "GetDiagnosticData", &data).await.unwrap();
        assert_eq!(msg::GetDiagnosticDataResponse::parse_from_bytes(&answer).unwrap().data, "the end\n");
        // What the container may put in its place is not followed.
        std::fs::remove_file(&log).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &log).unwrap();
        assert!(call(&client, "GetDiagnosticData", &data).await.is_err());
        let remove = msg::RemoveContainerRequest { container_id: "c".into(), ..Default::default() };
        call(&client, "RemoveContainer", &remove).await.unwrap();
        let _ = std::fs::remove_dir(cgroups);
    });
}

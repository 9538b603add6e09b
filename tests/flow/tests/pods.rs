//! Pods whose containers come after them, without a machine.

use std::sync::Arc;
use std::time::Duration;

use coracle_flow::{Bench, Scripted, first, in_own_mounts};
use coracle_protocol::oci;
use coracle_sandbox::{CreateRequest, Error, Event, Status, Stdio};

fn json<M: coracle_protocol::protobuf::MessageFull>(value: &serde_json::Value) -> M {
    coracle_protocol::from_json(&value.to_string()).unwrap()
}

/// A pod as CRI describes it.
fn pod() -> oci::Spec {
    json(&serde_json::json!({
        "hostname": "pod-1",
        "process": { "args": ["/pause"] },
        "linux": { "namespaces": [{ "type": "network" }], "sysctl": { "kernel.shm_rmid_forced": "1" } }
    }))
}

/// A container of it: its namespaces but the mounts are the pod's.
async fn create(bench: &Bench, id: &str, own_pids: bool) -> coracle_sandbox::Result<()> {
    let pid = if own_pids {
        serde_json::json!({ "type": "pid" })
    } else {
        serde_json::json!({ "type": "pid", "path": "/p" })
    };
    let spec: oci::Spec = json(&serde_json::json!({
        "root": { "path": "rootfs" },
        "process": { "args": ["/bin/sleep", "1000"], "env": ["PATH=/bin"], "cwd": "/", "user": {} },
        "mounts": [{ "destination": "/dev/shm", "type": "bind", "source": "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/pod/shm", "options": ["rbind"] }],
        "linux": { "namespaces": [pid, { "type": "ipc", "path": "/i" }, { "type": "mount" }, { "type": "network", "path": "/n" }] }
    }));
    let request = CreateRequest { id: id.into(), spec, root: bench.rootfs(), rootfs: vec![], stdio: Stdio::default() };
    bench.sandbox.create(request).await
}

#[test]
fn a_pod_is_a_machine_and_no_process() {
    in_own_mounts(async {
        let agent = Scripted::hanging_in("");
        let mut bench = Bench::with(agent.program(), |_| {});
        let process = first("pod");
        bench.sandbox.run_pod("pod", &pod()).await.unwrap();
        assert!(matches!(bench.sandbox.run_pod("pod", &pod()).await, Err(Error::Exists(_))));
        assert_eq!(bench.sandbox.state(&process).await.unwrap().status, Status::Created);
        bench.sandbox.start(&process).await.unwrap();
        assert!(matches!(bench.sandbox.start(&process).await, Err(Error::State(_))), "once");
        assert_eq!(bench.sandbox.state(&process).await.unwrap().status, Status::Running);
        let exec = bench.sandbox.exec(&coracle_flow::beside("pod", "e"), oci::Process::new(), Stdio::default()).await;
        assert!(matches!(exec, Err(Error::State(_))));
        assert!(bench.sandbox.stats("pod").await.unwrap().cgroup_stats.is_none());
        assert!(matches!(bench.sandbox.pause("pod").await, Err(Error::Unsupported(_))));
        let request = agent.sandboxes.lock().unwrap().pop().unwrap();
        assert_eq!((request.hostname.as_str(), request.sandbox_id.as_str()), ("pod-1", "pod"));
        assert!(request.storages.iter().any(|storage| storage.mount_point == coracle_protocol::paths::SHM));
        assert!(agent.created.lock().unwrap().is_empty(), "nothing is made in the guest");
        assert!(matches!(bench.sandbox.kill(&process, 1).await, Err(Error::Unsupported(_))));
        bench.sandbox.kill(&process, 15).await.unwrap();
        assert_eq!(bench.sandbox.wait(&process).await.unwrap().status, 143);
        assert!(matches!(bench.events.recv().await, Some(Event::Exited { .. })));
        assert!(matches!(bench.events.recv().await, Some(Event::MachineEnded { .. })), "the pod is gone with it");
        assert!(matches!(bench.sandbox.kill(&process, 9).await, Err(Error::NotFound(_))));
        assert_eq!(bench.sandbox.delete(&process).await.unwrap().status, 143);
        assert!(bench.sandbox.is_empty().await.unwrap());
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists());
    });
}

#[test]
fn containers_of_a_pod_share_what_is_the_pods() {
    in_own_mounts(async {
        let agent = Scripted::hanging_in("");
        let bench = Bench::with(agent.program(), |_| {});
        bench.sandbox.run_pod("pod", &pod()).await.unwrap();
        bench.sandbox.start(&first("pod")).await.unwrap();
        create(&bench, "c1", true).await.unwrap();
        create(&bench, "c2", false).await.unwrap();
        let requests = std::mem::take(&mut *agent.created.lock().unwrap());
        assert_eq!(agent.sandboxes.lock().unwrap().len(), 1, "one pod, set up once");
        let kinds = |request: &coracle_protocol::agent::CreateContainerRequest| -> Vec<String> {
            request.OCI.Linux.Namespaces.iter().map(|namespace| namespace.Type.clone()).collect()
        };
        assert_eq!((kinds(&requests[0]), requests[0].sandbox_pidns), (vec!["pid".into(), "mount".into()], false));
        assert_eq!((kinds(&requests[1]), requests[1].sandbox_pidns), (vec!["mount".to_owned()], true));
        for request in &requests {
            assert_eq!(request.OCI.Linux.Sysctl["kernel.shm_rmid_forced"], "1");
            assert_eq!(request.OCI.Mounts[0].source, coracle_protocol::paths::SHM);
        }
        // The pod's end is the end of all in it.
        bench.sandbox.start(&first("c1")).await.unwrap();
        bench.sandbox.kill(&first("pod"), 9).await.unwrap();
        assert_eq!(bench.sandbox.wait(&first("c1")).await.unwrap().status, 137);
        assert!(matches!(create(&bench, "c3", true).await, Err(Error::Ended(_))));
        for id in ["c1", "c2", "pod"] {
            bench.sandbox.delete(&first(id)).await.unwrap();
        }
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists());
    });
}

#[test]
fn a_pod_whose_machine_hangs_is_given_up_by_kill() {
    in_own_mounts(async {
        let silent = Arc::new(|_| Box::pin(std::future::pending()) as futures::future::BoxFuture<'static, String>);
        let bench = Bench::with(silent, |config| config.boot_timeout = Duration::from_secs(600));
        let kill = async {
            while bench.sandbox.state(&first("pod")).await.is_err() {
                tokio::task::yield_now().await;
            }
            bench.sandbox.kill(&first("pod"), 9).await.unwrap();
        };
        let spec = pod();
        let (run, ()) = tokio::join!(bench.sandbox.run_pod("pod", &spec), kill);
        assert!(run.unwrap_err().to_string().contains("killed"));
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists());
    });
}

#[test]
fn the_hosts_own_network_is_refused_before_anything_is_booted() {
    in_own_mounts(async {
        let agent = Scripted::hanging_in("");
        let bench = Bench::with(agent.program(), |_| {});
        let mut spec = pod();
        spec.Linux.mut_or_insert_default().Namespaces.clear();
        let error = bench.sandbox.run_pod("pod", &spec).await.unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("network")), "{error}");
        assert!(agent.sandboxes.lock().unwrap().is_empty());
        assert!(matches!(bench.sandbox.state(&first("pod")).await, Err(Error::NotFound(_))));
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn a_namespace_that_is_not_there_is_named() {
    in_own_mounts(async {
        let bench = Bench::with(Scripted::hanging_in("").program(), |_| {});
        let mut spec = pod();
        spec.Linux.mut_or_insert_default().Namespaces[0].Path = "/nowhere/netns".into();
        let error = bench.sandbox.run_pod("pod", &spec).await.unwrap_err().to_string();
        assert!(error.contains("/nowhere/netns"), "{error}");
        bench.sandbox.stop().await.unwrap();
        assert!(!bench.folder.path().join("m").exists(), "nothing is left");
    });
}

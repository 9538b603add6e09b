//! The Sandbox API, call by call. (That containerd 2 gets along with it is shown by `cargo xtask suite sid`.)
//!
//! Lane: open: containers come later.

use containerd_shim_protos::ttrpc::Code;
use coracle_e2e::cri::msg;
use coracle_e2e::{Host, Netns, POD_CONFIG, PodShim, busybox_root, monitor, read_metrics};
use protobuf::MessageField;

fn pod(host: &Host) -> msg::PodSandboxConfig {
    let dns = msg::DnsConfig { servers: vec!["10.9.8.7".into()], ..Default::default() };
    let mut linux = msg::LinuxPodSandboxConfig { cgroup_parent: format!("/{}", host.mark()), ..Default::default() };
    linux.sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
    msg::PodSandboxConfig {
        hostname: "by-the-api".into(),
        dns_config: MessageField::some(dns),
        linux: MessageField::some(linux),
        ..Default::default()
    }
}

/// A pod that runs.
fn booted(host: &Host, netns: &Netns) -> PodShim {
    let shim = PodShim::start(host, "p");
    shim.create(&netns.path(), POD_CONFIG, &pod(host)).unwrap();
    shim.boot().unwrap();
    shim
}

/// A container's specification as containerd's CRI writes it beside the Sandbox API.
fn container(root: &str, script: &str) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.1.0",
        "process": { "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": root },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm" },
        ],
        "linux": { "namespaces": [
            { "type": "pid" }, { "type": "mount" }, { "type": "ipc", "path": "/proc/1/ns/ipc" },
            { "type": "uts", "path": "/proc/1/ns/uts" }, { "type": "network", "path": "/proc/1/ns/net" },
        ] }
    })
}

#[test]
fn a_pod_lives_by_the_sandbox_api() {
    let host = Host::new();
    let netns = Netns::new(&host, "");
    let shim = PodShim::start(&host, "p");
    let config = pod(&host);
    assert_eq!(shim.status().unwrap().state, "SANDBOX_NOTREADY", "nothing was created");
    assert_eq!(shim.boot().unwrap_err().0, Code::FAILED_PRECONDITION);
    assert_eq!(shim.create(&netns.path(), "some.Thing", &config).unwrap_err().0, Code::UNIMPLEMENTED);
    let (code, text) = shim.create("", POD_CONFIG, &config).unwrap_err();
    assert!(code == Code::UNIMPLEMENTED && text.contains("network namespace"), "{text}");
    shim.create(&netns.path(), POD_CONFIG, &config).unwrap();
    assert_eq!(shim.create(&netns.path(), POD_CONFIG, &config).unwrap_err().0, Code::ALREADY_EXISTS);
    let started = shim.boot().unwrap();
    assert!(started.pid > 0 && started.created_at.seconds > 0);
    assert_eq!(shim.boot().unwrap_err().0, Code::FAILED_PRECONDITION, "once");
    assert_eq!(shim.platform().unwrap(), ("linux".into(), "amd64".into()));
    shim.ping().unwrap();
    let status = shim.status().unwrap();
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", started.pid));
    assert!(status.info["coracle"].contains("version"), "{:?}", status.info);
    assert_eq!(shim.status_of("other").unwrap_err().0, Code::NOT_FOUND);
    // Containers have what containerd gives them elsewhere, and the pod's shared memory.
    let root = busybox_root(&host);
    let script = "hostname; cat /etc/hostname; grep nameserver /etc/resolv.conf; echo shared >/dev/shm/x; \
        cat /proc/sys/kernel/shm_rmid_forced; exit 4";
    let output = shim.run("one", container(&root, script)).unwrap();
    assert_eq!(shim.end_of("one", true).unwrap(), 4);
    let text = std::fs::read_to_string(output).unwrap();
    assert_eq!(text, "by-the-api\nby-the-api\nnameserver 10.9.8.7\n1\n");
    let output = shim.run("two", container(&root, "cat /dev/shm/x; exec sleep 1000")).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    // A file that grows is no event.
    while std::fs::read_to_string(&output).unwrap() != "shared\n" {
        assert!(std::time::Instant::now() < deadline, "no output");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let (time, memory) = read_metrics(&shim.metrics().unwrap());
    assert!(time > 0 && memory > 0, "{time} ns, {memory} bytes");
    // The pod is no task, and no task's Shutdown ends it.
    assert_eq!(shim.as_a_task(), (Code::NOT_FOUND, true));
    assert_eq!(shim.status().unwrap().state, "SANDBOX_READY");
    shim.stop().unwrap();
    assert_eq!(shim.wait().unwrap(), 137);
    assert_eq!(shim.end_of("two", false).unwrap(), 137, "its containers end with it");
    let status = shim.status().unwrap();
    assert!(status.state == "SANDBOX_NOTREADY" && status.exited_at.seconds > 0, "{status:?}");
    shim.stop().unwrap();
    assert!(shim.bundle().join("config.json").exists(), "for the action delete");
    shim.shutdown().unwrap();
    drop(netns);
    host.audit();
}

#[test]
fn a_pod_whose_monitor_is_killed_has_ended() {
    let host = Host::new();
    let netns = Netns::new(&host, "");
    let shim = booted(&host, &netns);
    shim.run("one", container(&busybox_root(&host), "exec sleep 1000")).unwrap();
    host.kill(monitor());
    assert_eq!(shim.wait().unwrap(), 137);
    assert_eq!(shim.end_of("one", true).unwrap(), 137);
    let status = shim.status().unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    shim.stop().unwrap();
    shim.shutdown().unwrap();
    drop(netns);
    host.audit();
}

#[test]
fn a_pod_that_can_not_boot_says_why_and_leaves_nothing() {
    let host = Host::new().set("machine.monitor", "\"qemu\"").set("qemu.path", "\"/nowhere/qemu\"");
    let netns = Netns::new(&host, "");
    let shim = PodShim::start(&host, "p");
    shim.create(&netns.path(), POD_CONFIG, &pod(&host)).unwrap();
    let (code, text) = shim.boot().unwrap_err();
    assert!(code == Code::FAILED_PRECONDITION && text.contains("/nowhere/qemu"), "{code:?} {text}");
    assert_eq!(shim.status().unwrap().state, "SANDBOX_NOTREADY");
    shim.shutdown().unwrap();
    drop(netns);
    host.audit();
}

#[test]
fn a_clock_that_was_set_in_the_guest_follows_the_hosts_again() {
    let host = Host::new().set("guest.clock_seconds", "1");
    let netns = Netns::new(&host, "");
    let shim = booted(&host, &netns);
    let script =
        "date -s 2001-01-01 >/dev/null && date +%Y; until [ $(date +%Y) -gt 2020 ]; do sleep 0.2; done; echo followed";
    let mut config = container(&busybox_root(&host), script);
    let capabilities = serde_json::json!(["CAP_SYS_TIME"]);
    config["process"]["capabilities"] =
        serde_json::json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities });
    let output = shim.run("one", config).unwrap();
    assert_eq!(shim.end_of("one", true).unwrap(), 0);
    assert_eq!(std::fs::read_to_string(output).unwrap(), "2001\nfollowed\n");
    shim.stop().unwrap();
    shim.shutdown().unwrap();
    drop(netns);
    host.audit();
}

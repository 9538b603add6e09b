//! Pods as CRI-O makes them: its annotations, and no publisher of events.
//!
//! Lane: open: roots are folders of the host's.

use coracle_e2e::{Host, Shim, busybox_root, monitor};

fn config(root: &str, kind: &str, script: &str) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.1.0",
        "hostname": "by-cri-o",
        "annotations": { "io.kubernetes.cri-o.ContainerType": kind, "io.kubernetes.cri-o.SandboxID": "p" },
        "process": { "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": root },
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }] }
    })
}

#[test]
fn a_pod_of_cri_o_has_its_containers_in_one_machine() {
    let host = Host::new();
    let root = busybox_root(&host);
    let start = |id: &str, kind: &str, script: &str| {
        let shim = Shim::start(&host, id, config(&root, kind, script).to_string().as_bytes());
        shim.create().unwrap();
        shim.start_process("").unwrap();
        shim
    };
    let pod = start("p", "sandbox", "never run");
    let one = start("one", "container", "exec sleep 1000");
    let two = start("two", "container", "test $(hostname) = by-cri-o && exit 5");
    assert_eq!(host.processes(monitor()).len(), 1, "one machine");
    assert_eq!(host.processes(" serve").len(), 1, "one shim");
    assert_eq!(two.wait("").unwrap(), 5);
    assert_eq!(two.delete().unwrap(), 5);
    one.kill("", 15).unwrap();
    one.kill("", 9).unwrap();
    assert_eq!(one.wait("").unwrap(), 137);
    one.delete().unwrap();
    // The pod stays without a container, as its pause process would.
    let three = start("three", "container", "exit 6");
    assert_eq!(three.wait("").unwrap(), 6);
    three.delete().unwrap();
    pod.kill("", 15).unwrap();
    assert_eq!(pod.wait("").unwrap(), 143);
    pod.delete().unwrap();
    pod.shutdown().unwrap();
    host.audit();
}

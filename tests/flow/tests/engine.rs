//! What the container engine makes of a specification, without a machine.

use coracle_flow::{Bench, in_own_mounts};
use coracle_protocol::oci;
use coracle_sandbox::{CreateRequest, Error, Stdio};
use serde_json::{Value, json};

/// A specification of a shell script, with `more` put over it.
fn spec(script: &str, more: &Value) -> oci::Spec {
    let mut spec = coracle_protocol::to_json(&coracle_flow::spec(&json!(["/bin/sh", "-c", script])));
    merge(&mut spec, more);
    coracle_protocol::from_json(&spec.to_string()).unwrap()
}

/// Objects are merged, lists are added to, all else is replaced.
fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(into), Value::Array(from)) => into.extend(from.iter().cloned()),
        (into, from) => *into = from.clone(),
    }
}

async fn printed(bench: &Bench, script: &str, more: &Value) -> String {
    let (exit, output) = bench.run_spec("c", spec(script, more)).await;
    assert_eq!(exit.status, 0, "{output}");
    output
}

async fn refused(bench: &Bench, more: &Value) -> Error {
    let spec = spec("true", more);
    let request =
        CreateRequest { id: "c".into(), spec, root: bench.rootfs(), rootfs: Vec::new(), stdio: Stdio::default() };
    bench.sandbox.create(request).await.unwrap_err()
}

#[test]
fn a_time_namespace_has_clocks_of_its_own() {
    in_own_mounts(async {
        let bench = Bench::real();
        let more = json!({ "linux": {
            "namespaces": [{ "type": "time" }],
            "timeOffsets": { "boottime": { "secs": 1_000_000_000 }, "monotonic": { "secs": 5, "nanosecs": 7 } },
        } });
        let uptime = printed(&bench, "cat /proc/uptime", &more).await;
        let seconds: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        assert!(seconds > 1e9, "{uptime}");
        let error = refused(&bench, &json!({ "linux": { "timeOffsets": { "monotonic": { "secs": 5 } } } })).await;
        assert!(error.to_string().contains("namespace of type time"), "{error}");
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn personality_and_umask_are_the_specifications() {
    in_own_mounts(async {
        let bench = Bench::real();
        let more = json!({ "linux": { "personality": { "domain": "LINUX32" } } });
        assert_eq!(printed(&bench, "uname -m", &more).await, "i686\n");
        assert_eq!(printed(&bench, "umask", &json!({ "process": { "user": { "umask": 0o027 } } })).await, "0027\n");
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn the_root_has_the_propagation_that_was_asked_for() {
    in_own_mounts(async {
        let bench = Bench::real();
        // The fields behind the mount's options, up to a dash, tell (proc(5), mountinfo).
        let script = "grep ' / / ' /proc/self/mountinfo | head -1; grep ' / rw' /proc/self/mountinfo | head -1";
        let shared = printed(&bench, script, &json!({ "linux": { "rootfsPropagation": "rshared" } })).await;
        assert!(shared.contains("shared:"), "{shared}");
        let private = printed(&bench, script, &json!({ "linux": { "rootfsPropagation": "private" } })).await;
        assert!(!private.contains("shared:") && !private.contains("master:"), "{private}");
        let error = refused(&bench, &json!({ "linux": { "rootfsPropagation": "sideways" } })).await;
        assert!(error.to_string().contains("sideways"), "{error}");
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn devices_are_those_that_are_allowed() {
    in_own_mounts(async {
        let bench = Bench::real();
        let with = |rules: Value| {
            json!({
                "process": { "capabilities": {
                    "bounding": ["CAP_MKNOD"], "effective": ["CAP_MKNOD"], "permitted": ["CAP_MKNOD"],
                } },
                "mounts": [{ "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }],
                "linux": { "resources": { "devices": rules } },
            })
        };
        // The tun device is 10:200.
        let script = "mknod /dev/k c 10 200; (true </dev/k) 2>/dev/null && echo open || echo closed; \
            head -c 4 /dev/urandom | wc -c; echo x >/dev/null";
        let closed = with(json!([{ "allow": false, "access": "rwm" }]));
        assert_eq!(printed(&bench, script, &closed).await, "closed\n4\n");
        let none = with(json!([]));
        assert_eq!(printed(&bench, script, &none).await, "closed\n4\n", "without rules it is as with the usual ones");
        let one = with(json!([
            { "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 10, "minor": 200, "access": "r" }
        ]));
        let open = "exec 2>&-; mknod /dev/k c 10 200; true </dev/k && echo open; true >/dev/k || echo not to write";
        assert_eq!(printed(&bench, open, &one).await, "open\nnot to write\n");
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn a_bind_mount_is_read_only_to_its_depth() {
    in_own_mounts(async {
        let bench = Bench::real();
        let folder = bench.folder.path().join("volume");
        std::fs::create_dir_all(folder.join("below")).unwrap();
        let mount = |options: &[&str]| json!({ "mounts": [{ "destination": "/v", "type": "bind", "source": folder, "options": options }] });
        let script = "exec 2>&-; echo x >/v/a && echo wrote || echo refused";
        assert_eq!(printed(&bench, script, &mount(&["rbind", "rro"])).await, "refused\n");
        assert_eq!(printed(&bench, script, &mount(&["rbind", "rw"])).await, "wrote\n");
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn hooks_of_the_guest_run_and_those_of_the_host_are_refused() {
    in_own_mounts(async {
        let hooks = tempfile::tempdir().unwrap();
        let log = hooks.path().join("log");
        for point in ["prestart", "poststart", "poststop"] {
            let path = hooks.path().join(point);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("note"), format!("#!/bin/sh\necho {point} >>{}\n", log.display())).unwrap();
            std::fs::set_permissions(path.join("note"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        }
        let folder = hooks.path().display().to_string();
        let bench = Bench::real_with(|config| config.hook_folder = folder);
        assert_eq!(bench.run("c", "exit 3").await.0.status, 3);
        // The last one runs beside the answer to the removal.
        let all = "prestart\npoststart\npoststop\n";
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while std::fs::read_to_string(&log).unwrap() != all && std::time::Instant::now() < deadline {
            tokio::task::yield_now().await;
        }
        assert_eq!(std::fs::read_to_string(&log).unwrap(), all);
        std::fs::write(hooks.path().join("prestart/note"), "#!/bin/sh\nexit 9\n").unwrap();
        let error = refused(&bench, &json!({})).await;
        assert!(
            matches!(&error, Error::State(text) if text.contains("prestart/note") && text.contains('9')),
            "{error}"
        );
        let error = refused(&bench, &json!({ "hooks": { "createRuntime": [{ "path": "/usr/bin/hook" }] } })).await;
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("/usr/bin/hook")), "{error}");
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn a_label_goes_to_the_guest_only_where_that_is_set() {
    in_own_mounts(async {
        let labelled = json!({ "process": { "apparmorProfile": "no-such-profile" } });
        let bench = Bench::real();
        assert_eq!(printed(&bench, "echo ran", &labelled).await, "ran\n");
        bench.sandbox.stop().await.unwrap();
    });
    in_own_mounts(async {
        let labelled = json!({ "process": { "apparmorProfile": "no-such-profile" } });
        let bench = Bench::real_with(|config| config.labels = true);
        let error = refused(&bench, &labelled).await;
        assert!(error.to_string().contains("no-such-profile"), "{error}");
        bench.sandbox.stop().await.unwrap();
    });
}

#[test]
fn a_volume_shows_other_owners_where_that_is_asked_for() {
    in_own_mounts(async {
        let bench = Bench::real();
        let folder = bench.folder.path().join("volume");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("f"), "").unwrap();
        std::os::unix::fs::chown(folder.join("f"), Some(5), Some(6)).unwrap();
        let mapping = |shown: u32| json!([{ "containerID": 0, "hostID": shown, "size": 1000 }]);
        let mount = |more: Value| {
            let mut mount =
                json!({ "destination": "/v", "type": "bind", "source": folder, "options": ["rbind", "idmap"] });
            merge(&mut mount, &more);
            json!({ "mounts": [mount] })
        };
        let mapped = mount(json!({ "uidMappings": mapping(10_000), "gidMappings": mapping(20_000) }));
        assert_eq!(printed(&bench, "stat -c '%u %g' /v/f", &mapped).await, "10005 20006\n");
        let half = refused(&bench, &mount(json!({ "uidMappings": mapping(10_000) }))).await;
        assert!(half.to_string().contains("and not both"), "{half}");
        let unsaid = refused(&bench, &mount(json!({}))).await;
        assert!(unsaid.to_string().contains("does not say how"), "{unsaid}");
        bench.sandbox.stop().await.unwrap();
    });
}

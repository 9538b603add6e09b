//! What is missing, broken or killed: a true text, and nothing left.
//!
//! Lane: open: it kills the file server, and has volumes.

use std::time::{Duration, Instant};

use containerd_shim_protos::ttrpc::Code;
use coracle_e2e::{Containerd, Host, Outcome, Running, Shim, busybox_root, monitor, path};

/// What people wait for; the design's figure is 2 s, and emulation on a busy machine is slow.
const WIDE: Duration = Duration::from_secs(20);

fn refused(host: Host, words: &[&str]) {
    let outcome = host.run(&[], &["true"]);
    assert_eq!(outcome.code, 125, "{outcome:?}");
    for word in words {
        assert!(outcome.stderr.contains(word), "{word}: {}", outcome.stderr);
    }
    assert!(host.processes(monitor()).is_empty());
    host.audit();
}

/// A copy of the guest image without one of its files.
fn guest_without(host: &Host, file: &str) -> String {
    let folder = host.folder.join("guest");
    std::fs::create_dir(&folder).unwrap();
    for name in ["vmlinux", "initrd.img", "manifest.json"] {
        if name != file {
            std::os::unix::fs::symlink(path("CORACLE_TEST_GUEST").join(name), folder.join(name)).unwrap();
        }
    }
    format!("{:?}", folder.display().to_string())
}

#[test]
fn a_missing_kernel_is_named_with_its_mend() {
    let host = Host::new();
    let guest = guest_without(&host, "vmlinux");
    refused(host.set("guest.folder", &guest), &["vmlinux", "guest.folder", "coracle image build"]);
}

#[test]
fn a_missing_initrd_is_named_with_its_mend() {
    let host = Host::new();
    let guest = guest_without(&host, "initrd.img");
    refused(host.set("guest.folder", &guest), &["initrd.img", "guest.folder", "coracle image build"]);
}

#[test]
fn a_missing_guest_image_is_named_with_its_mend() {
    refused(Host::new().set("guest.folder", "\"/nowhere\""), &["/nowhere", "coracle image build"]);
}

#[test]
fn a_missing_qemu_is_named_with_its_mend() {
    refused(
        Host::new().set("machine.monitor", "\"qemu\"").set("qemu.path", "\"/nowhere/qemu\""),
        &["/nowhere/qemu", "qemu.path", "install"],
    );
}

#[test]
fn a_missing_virtiofsd_is_named_with_its_mend() {
    refused(
        Host::new().set("run.rootfs", "\"virtiofs\"").set("virtiofsd.paths", "[\"/nowhere/virtiofsd\"]"),
        &["/nowhere/virtiofsd", "virtiofsd.paths", "install"],
    );
}

#[test]
fn a_guest_image_of_another_version_is_refused_with_both() {
    let host = Host::new();
    let guest = guest_without(&host, "manifest.json");
    let text = std::fs::read_to_string(path("CORACLE_TEST_GUEST").join("manifest.json")).unwrap();
    let mut manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ours = manifest["version"].as_str().unwrap().to_owned();
    manifest["version"] = "9.9.9".into();
    std::fs::write(host.folder.join("guest/manifest.json"), manifest.to_string()).unwrap();
    refused(host.set("guest.folder", &guest), &["9.9.9", &ours, "coracle image build"]);
}

#[test]
fn a_guest_that_does_not_come_up_fails_in_time_with_its_console() {
    // Its kernel has no /init to run, and so panics.
    let host = Host::new();
    let guest = guest_without(&host, "initrd.img");
    std::fs::write(host.folder.join("guest/initrd.img"), b"").unwrap();
    let host = host.set("guest.folder", &guest);
    let start = Instant::now();
    let outcome = host.run(&[], &["true"]);
    assert!(start.elapsed() < Duration::from_secs(55), "before the time-out of 60 s: a panic is an event");
    assert_eq!(outcome.code, 125);
    for word in ["did not come up", "panic", "console ends with"] {
        assert!(outcome.stderr.contains(word), "{word}: {}", outcome.stderr);
    }
    host.audit();
}

#[test]
fn the_time_to_come_up_is_bounded_and_configurable() {
    let host = Host::new().set("guest.boot_timeout_seconds", "1");
    let outcome = host.run(&[], &["true"]);
    assert!(outcome.code == 125 && outcome.stderr.contains("guest.boot_timeout_seconds"), "{outcome:?}");
    host.audit();
}

#[test]
fn wrong_settings_are_refused_by_name() {
    refused(Host::new().set("machine.memory_mb", "128"), &["machine.memory_mb", "did you mean machine.memory_mib"]);
}

#[test]
fn a_missing_command_is_127_and_a_useless_one_126() {
    let host = Host::new();
    let code = |command: &str| {
        let outcome = host.run(&[], &[command]);
        (outcome.code, outcome.stderr)
    };
    let (missing, text) = code("nosuch");
    assert!(missing == 127 && text.contains("executable file not found in $PATH"), "{text}");
    let (missing, text) = code("/no/such");
    assert!(missing == 127 && text.contains("no such file or directory"), "{text}");
    let (useless, text) = code("/etc/not-a-program");
    assert!(useless == 126 && text.contains("permission denied"), "{text}");
    let (useless, text) = code("/etc");
    assert!(useless == 126 && text.contains("is a directory"), "{text}");
    host.audit();
}

/// Runs a container, kills one of its processes, and gives the outcome.
fn killed(host: &Host, word: &str) -> Outcome {
    let mut running = Running::start(host.run_command(&[], &["sh", "-c", "echo up; sleep 1000"]));
    running.read_until("up\n");
    let start = Instant::now();
    host.kill(word);
    let outcome = running.finish();
    assert!(start.elapsed() < WIDE, "{:?}", start.elapsed());
    outcome
}

#[test]
fn the_monitor_killed_is_an_exit_and_nothing_stays() {
    let host = Host::new();
    assert_eq!(killed(&host, monitor()).code, 137);
    host.audit();
}

#[test]
fn virtiofsd_killed_is_an_exit_and_nothing_stays() {
    let host = Host::new().set("run.rootfs", "\"virtiofs\"");
    assert_eq!(killed(&host, "virtiofsd").code, 137);
    host.audit();
}

#[test]
fn the_vsock_server_killed_is_an_exit_and_nothing_stays() {
    if monitor() != "qemu-system" || std::path::Path::new("/dev/vhost-vsock").exists() {
        println!("left out: the monitor or the kernel has a vsock of its own, so there is no such server");
        return;
    }
    let host = Host::new();
    assert_eq!(killed(&host, " vsock ").code, 137);
    host.audit();
}

#[test]
fn the_shim_killed_takes_all_with_it_and_rm_clears() {
    let host = Host::new();
    host.detached("lost", "sleep 1000");
    host.kill(" serve");
    // The container's own process sees the end, notes it and goes.
    let list = || host.coracle_outcome(&["ps", "--all"]).stdout;
    let deadline = Instant::now() + WIDE;
    while list().contains("running") && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(list().contains("dead") || list().contains("exited (137)"), "{}", list());
    let removed = host.coracle_outcome(&["rm", "--force", "lost"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    host.audit();
}

/// Runs a privileged container that presses one of the guest's magic keys (kernel: Documentation/admin-guide/sysrq.rst),
/// and gives what becomes of it, and containerd's log of it.
fn magic_key(key: &str) -> (Outcome, String) {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    let script = format!("echo up; echo {key} >/proc/sysrq-trigger; sleep 1000");
    let arguments =
        ["run", "--privileged", "--runtime", "io.containerd.coracle.v2", "test:latest", "c", "sh", "-c", &script];
    let outcome = containerd.ctr(&arguments);
    containerd.remove("c");
    let log = containerd.stop();
    host.audit();
    (outcome, log)
}

#[test]
fn the_guests_kernel_panicking_is_an_exit_with_its_reason() {
    let (outcome, log) = magic_key("c");
    assert_eq!(outcome.code, 137, "{outcome:?}");
    assert!(log.contains("the guest's kernel panicked"), "{log}");
}

#[test]
fn the_agent_crashing_is_an_exit_with_its_reason() {
    // Kills every process of the guest but its pid 1.
    let (outcome, log) = magic_key("i");
    assert_eq!(outcome.code, 137, "{outcome:?}");
    assert!(log.contains("the agent ended"), "{log}");
}

#[test]
fn a_broken_bundle_is_refused_and_starts_nothing() {
    let host = Host::new();
    for config in [&b""[..], b"{", b"\xff\xfe", b"{\"process\":[]}", b"{}"] {
        let (_, outcome) = Shim::start_in(&host, "b", config);
        assert!(outcome.code != 0 && outcome.stderr.contains("config.json"), "{outcome:?}");
    }
    assert!(host.processes("serve").is_empty());
    host.audit();
}

/// A bundle's configuration that runs a shell script in `root`.
fn config(root: &str, script: &str) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.1.0",
        "process": { "args": ["/bin/sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": root },
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }] }
    })
}

#[test]
fn a_bundle_without_a_root_is_refused_by_name_and_starts_no_machine() {
    let host = Host::new();
    let shim = Shim::start(&host, "b", config("rootfs", "true").to_string().as_bytes());
    let (code, text) = shim.create().unwrap_err();
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    assert!(text.contains(&shim.bundle().join("rootfs").display().to_string()), "{text}");
    assert_eq!(shim.state().unwrap_err().0, Code::NOT_FOUND);
    shim.shutdown().unwrap();
    host.audit();
}

#[test]
fn unknown_fields_are_accepted_and_a_huge_configuration_is_answered() {
    let host = Host::new();
    let mut known = config(&busybox_root(&host), "exit 3");
    known["future"] = serde_json::json!({ "a": [1, { "b": null }] });
    known["process"]["future"] = "x".into();
    known["linux"]["future"] = 1.into();
    // Five megabytes, of which the guest needs none.
    known["annotations"] = serde_json::json!({ "padding": "x".repeat(5 << 20) });
    let shim = Shim::start(&host, "b", known.to_string().as_bytes());
    shim.create().unwrap();
    shim.start_process("").unwrap();
    assert_eq!(shim.wait("").unwrap(), 3);
    assert_eq!(shim.delete().unwrap(), 3);
    shim.shutdown().unwrap();
    // Five megabytes that it does need are more than one message of the agent's protocol.
    let mut huge = config(&busybox_root(&host), "true");
    huge["process"]["env"] = serde_json::json!(["x".repeat(5 << 20)]);
    let shim = Shim::start(&host, "c", huge.to_string().as_bytes());
    let (code, text) = shim.create().unwrap_err();
    assert!(code == Code::INVALID_ARGUMENT && text.contains("bytes"), "{code:?} {text}");
    shim.shutdown().unwrap();
    host.audit();
}

#[test]
fn task_errors_carry_their_codes() {
    let host = Host::new();
    let shim = Shim::start(&host, "b", config(&busybox_root(&host), "exec sleep 1000").to_string().as_bytes());
    let command = |args: &[&str]| serde_json::json!({ "args": args, "cwd": "/", "user": {}, "env": ["PATH=/bin"] });
    assert_eq!(shim.state().unwrap_err().0, Code::NOT_FOUND, "nothing was created");
    shim.create().unwrap();
    assert_eq!(shim.create().unwrap_err().0, Code::ALREADY_EXISTS);
    assert_eq!(shim.exec("e", &command(&["sh"])).unwrap_err().0, Code::FAILED_PRECONDITION, "it does not run");
    shim.start_process("").unwrap();
    assert_eq!(shim.start_process("").unwrap_err().0, Code::FAILED_PRECONDITION, "started already");
    assert_eq!(shim.start_process("none").unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(shim.kill("none", 9).unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(shim.kill("", 65).unwrap_err().0, Code::INVALID_ARGUMENT);
    assert_eq!(shim.delete().unwrap_err().0, Code::FAILED_PRECONDITION, "it runs");
    assert_eq!(shim.checkpoint().unwrap_err().0, Code::UNIMPLEMENTED);
    shim.exec("e", &command(&["nosuch"])).unwrap();
    assert_eq!(shim.exec("e", &command(&["sh"])).unwrap_err().0, Code::ALREADY_EXISTS);
    let (code, text) = shim.start_process("e").unwrap_err();
    assert!(code == Code::INVALID_ARGUMENT && text.contains("executable file not found in $PATH"), "{code:?} {text}");
    assert_eq!(shim.exec("f", &serde_json::json!({ "args": 1 })).unwrap_err().0, Code::INVALID_ARGUMENT);
    // The machine's end is an end like any other; what needs the machine is then unavailable.
    shim.exec("g", &command(&["sh"])).unwrap();
    host.kill(monitor());
    assert_eq!(shim.wait("").unwrap(), 137);
    assert_eq!(shim.start_process("g").unwrap_err().0, Code::UNAVAILABLE);
    assert_eq!(shim.kill("", 9).unwrap_err().0, Code::NOT_FOUND, "already ended");
    assert_eq!(shim.delete().unwrap(), 137);
    assert_eq!(shim.delete().unwrap_err().0, Code::NOT_FOUND);
    shim.shutdown().unwrap();
    host.audit();
}

#[test]
fn a_create_that_means_harm_is_refused_at_once_and_the_pod_goes_on() {
    let host = Host::new();
    let root = busybox_root(&host);
    let good = config(&root, "exec sleep 1000");
    let shim = Shim::start(&host, "b", good.to_string().as_bytes());
    shim.create().unwrap();
    shim.start_process("").unwrap();
    let refused = |what: &str, expected: Code, outcome: Result<(), coracle_e2e::Refused>| {
        let (code, text) = outcome.expect_err(what);
        assert_eq!(code, expected, "{what}: {text}");
    };
    let long = "x".repeat(129);
    for id in ["", "..", "../../evil", "a/b", "/etc", "a\0b", "-x", long.as_str()] {
        refused(id, Code::INVALID_ARGUMENT, shim.create_as(id));
        refused(
            id,
            Code::INVALID_ARGUMENT,
            shim.exec(id, &serde_json::json!({ "args": ["true"], "cwd": "/", "user": {} })),
        );
    }
    refused("a name that is taken", Code::ALREADY_EXISTS, shim.create());
    let bind = |source: &str, destination: &str| serde_json::json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind"] });
    let with_mounts = |mounts: Vec<serde_json::Value>| {
        let mut config = good.clone();
        config["mounts"] = mounts.into();
        config
    };
    for (what, mounts) in [
        ("a source that is not there", vec![bind("/nowhere/at/all", "/data")]),
        ("a source that is relative", vec![bind("../../etc", "/data")]),
        ("a target that climbs out", vec![bind(&root, "/data/../../../evil")]),
        ("ten thousand mounts", vec![bind(&root, "/data"); 10_000]),
    ] {
        shim.configure(&with_mounts(mounts));
        refused(what, Code::INVALID_ARGUMENT, shim.create_as("evil"));
    }
    // Links of the image lead nowhere but into the image: an absolute one, and one through /proc.
    let inner = host.folder.join("links");
    std::fs::create_dir_all(inner.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", inner.join("bin/sh")).unwrap();
    std::os::unix::fs::symlink("/", inner.join("out")).unwrap();
    std::os::unix::fs::symlink("/proc/1/root", inner.join("magic")).unwrap();
    for target in ["/out/evil", "/magic/evil"] {
        let mut config = with_mounts(vec![bind(&root, target)]);
        config["root"]["path"] = inner.display().to_string().into();
        config["process"]["args"] = serde_json::json!(["/bin/sh", "-c", "exit 0"]);
        shim.configure(&config);
        // Inside the image it may well be made; the host and the guest have nothing of it.
        if shim.create_as("links").is_ok() {
            shim.kill_of("links", 9);
        }
        assert!(!std::path::Path::new("/evil").exists());
    }
    assert_eq!(shim.state().unwrap(), containerd_shim_protos::api::Status::RUNNING, "the pod goes on");
    shim.kill("", 9).unwrap();
    assert_eq!(shim.wait("").unwrap(), 137);
    shim.delete().unwrap();
    shim.shutdown().unwrap();
    host.audit();
}

#[test]
fn under_containerd_emulation_is_refused_unless_it_is_allowed() {
    let host = Host::new();
    if Outcome::of(host.coracle(&["check"]), b"").stdout.contains("ok       kvm") {
        println!("left out: KVM works here, so nothing is emulated");
        host.audit();
        return;
    }
    let host = host.set("machine.accelerator", "\"kvm\"");
    let containerd = Containerd::start(&host);
    let outcome = containerd.run("c", &["true"]);
    assert_ne!(outcome.code, 0);
    for word in ["KVM can't be used", "no security boundary", "accelerator = "] {
        assert!(outcome.stderr.contains(word), "{word}: {outcome:?}");
    }
    drop(containerd);
    host.audit();
}

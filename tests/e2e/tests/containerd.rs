//! Through a real containerd.
//!
//! Lane: open: containerd's overlay snapshotter hands over folders.

use coracle_e2e::{Containerd, Host, Outcome, Running, monitor, path};

#[test]
fn ctr_run_prints_the_guests_kernel() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    let outcome = containerd.run("c1", &["uname", "-r"]);
    let manifest = std::fs::read_to_string(path("CORACLE_TEST_GUEST").join("manifest.json")).unwrap();
    assert!(outcome.code == 0 && manifest.contains(outcome.line()), "{outcome:?}");
    drop(containerd);
    host.audit();
}

#[test]
fn exit_codes_and_errors_are_runcs() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    assert_eq!(containerd.run("c1", &["sh", "-c", "exit 3"]).code, 3);
    let missing = containerd.run("c2", &["nosuch"]);
    assert!(missing.code != 0 && missing.stderr.contains("executable file not found in $PATH"), "{missing:?}");
    let missing = containerd.run("c3", &["/no/such"]);
    assert!(missing.stderr.contains("no such file or directory"), "{missing:?}");
    let directory = containerd.run("c4", &["/etc"]);
    assert!(directory.stderr.contains("permission denied"), "{directory:?}");
    drop(containerd);
    host.audit();
}

#[test]
fn exec_kill_pause_stats_and_update() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    containerd.detached("c", &["sleep", "1000"]);
    let exec =
        |id: &str, command: &[&str]| containerd.ctr(&[&["tasks", "exec", "--exec-id", id, "c"], command].concat());
    assert_eq!(exec("e1", &["echo", "beside"]).line(), "beside");
    assert_eq!(exec("e2", &["sh", "-c", "exit 42"]).code, 42);
    assert!(exec("e3", &["nosuch"]).stderr.contains("executable file not found in $PATH"));
    assert_eq!(containerd.ctr(&["tasks", "pause", "c"]).code, 0);
    assert!(containerd.ctr(&["tasks", "list"]).stdout.contains("PAUSED"));
    assert_eq!(containerd.ctr(&["tasks", "resume", "c"]).code, 0);
    assert!(containerd.ctr(&["tasks", "list"]).stdout.contains("RUNNING"));
    let metrics = containerd.ctr(&["tasks", "metrics", "c"]);
    assert!(metrics.code == 0 && metrics.stdout.contains("memory"), "{metrics:?}");
    assert_eq!(containerd.ctr(&["tasks", "ps", "c"]).code, 0);
    let checkpoint = containerd.ctr(&["tasks", "checkpoint", "c"]);
    assert!(checkpoint.code != 0, "{checkpoint:?}");
    assert_eq!(containerd.ctr(&["tasks", "kill", "--signal", "SIGKILL", "c"]).code, 0);
    containerd.remove("c");
    assert!(!containerd.ctr(&["tasks", "list"]).stdout.contains("RUNNING"));
    drop(containerd);
    host.audit();
}

#[test]
fn a_client_may_go_and_another_one_attach() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    let script = "trap 'echo still here; exit 0' TERM; echo up; while :; do sleep 1 & wait; done";
    let arguments = ["run", "--runtime", "io.containerd.coracle.v2", "test:latest", "c", "sh", "-c", script];
    let mut first = Running::start(containerd.command(&arguments));
    first.read_until("up\n");
    first.signal(rustix::process::Signal::KILL);
    let _ = first.finish();
    let second = Running::start(containerd.command(&["tasks", "attach", "c"]));
    // The attached client is there when it holds the container's pipe open.
    assert_eq!(containerd.ctr(&["tasks", "kill", "--signal", "SIGTERM", "c"]).code, 0);
    let outcome = second.finish();
    assert!(outcome.stdout.contains("still here"), "{outcome:?}");
    containerd.remove("c");
    drop(containerd);
    host.audit();
}

#[test]
fn output_to_a_file_and_to_a_logger() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    let log = host.folder.join("log/out.txt");
    let uri = format!("file://{}", log.display());
    let arguments = [
        "run",
        "--detach",
        "--log-uri",
        &uri,
        "--runtime",
        "io.containerd.coracle.v2",
        "test:latest",
        "f",
        "echo",
        "filed",
    ];
    assert_eq!(containerd.ctr(&arguments).code, 0);
    while !containerd.ctr(&["tasks", "list"]).stdout.contains("STOPPED") {
        std::thread::yield_now();
    }
    containerd.remove("f");
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "filed\n");
    drop(containerd);
    host.audit();
}

#[test]
fn containers_outlive_containerd() {
    let host = Host::new();
    let mut containerd = Containerd::start(&host);
    containerd.detached("c", &["sleep", "1000"]);
    containerd.kill();
    let again = Containerd::without_image(&host);
    let list = again.ctr(&["tasks", "list"]);
    assert!(list.stdout.contains("RUNNING"), "{list:?}");
    let exec = again.ctr(&["tasks", "exec", "--exec-id", "e", "c", "echo", "alive"]);
    assert_eq!(exec.line(), "alive", "{exec:?}");
    again.remove("c");
    drop(again);
    drop(containerd);
    host.audit();
}

#[test]
fn the_monitor_killed_is_an_exit_event_and_delete_works() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    let arguments =
        ["run", "--runtime", "io.containerd.coracle.v2", "test:latest", "c", "sh", "-c", "echo up; sleep 1000"];
    let mut running = Running::start(containerd.command(&arguments));
    running.read_until("up\n");
    host.kill(monitor());
    let outcome = running.finish();
    assert_eq!(outcome.code, 137, "{outcome:?}");
    let delete = containerd.ctr(&["tasks", "delete", "c"]);
    assert!(delete.code == 0 || delete.stderr.contains("137") || delete.stderr.contains("not found"), "{delete:?}");
    containerd.remove("c");
    drop(containerd);
    host.audit();
}

#[test]
fn the_shim_killed_is_cleaned_up_by_containerd() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    containerd.detached("c", &["sleep", "1000"]);
    host.kill(" serve");
    // containerd sees the end and calls the shim's `delete`, which takes the pod's folder away.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while std::fs::read_dir(&host.run).unwrap().next().is_some() {
        assert!(std::time::Instant::now() < deadline, "containerd has not cleaned up");
        std::thread::yield_now();
    }
    containerd.remove("c");
    assert!(!containerd.ctr(&["tasks", "list"]).stdout.contains("RUNNING"));
    drop(containerd);
    host.audit();
}

#[test]
fn two_containers_at_once() {
    let host = Host::new();
    let containerd = Containerd::start(&host);
    let run = |id: &str| {
        let arguments = ["run", "--rm", "--runtime", "io.containerd.coracle.v2", "test:latest", id, "echo", id];
        Running::start(containerd.command(&arguments))
    };
    let (one, two) = (run("one"), run("two"));
    let outcomes: [Outcome; 2] = [one.finish(), two.finish()];
    assert_eq!(outcomes.each_ref().map(Outcome::line), ["one", "two"], "{outcomes:?}");
    drop(containerd);
    host.audit();
}

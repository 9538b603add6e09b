//! `coracle run`: what a container's process sees and gives back.
//!
//! Lanes: open and sealed; a test that needs what a sealed machine has not says so (`open_only`).

use std::io::{Read, Write};

use coracle_e2e::{Host, Outcome, Running, monitor, open_only, path};
use rustix::process::Signal;

fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    hex::encode(sha2::Sha256::digest(bytes))
}

#[test]
fn prints_and_exits_with_zero() {
    let host = Host::new();
    let outcome = host.run(&[], &["echo", "hello"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "hello\n"), "{outcome:?}");
    host.audit();
}

#[test]
fn runs_behind_another_kernel_and_warns_of_emulation() {
    let host = Host::new();
    let outcome = host.run(&[], &["uname", "-r"]);
    let manifest = std::fs::read_to_string(path("CORACLE_TEST_GUEST").join("manifest.json")).unwrap();
    assert!(manifest.contains(outcome.line()), "{outcome:?} {manifest}");
    let own = Outcome::of(std::process::Command::new("uname"), b"");
    assert_eq!(own.code, 0);
    let kvm = Outcome::of(host.coracle(&["check"]), b"").stdout.contains("ok       kvm");
    assert_eq!(outcome.stderr.contains("no security boundary"), !kvm, "{}", outcome.stderr);
    host.audit();
}

#[test]
fn passes_exit_codes_on() {
    let host = Host::new();
    assert_eq!(host.sh("exit 42").code, 42);
    host.audit();
}

#[test]
fn a_process_killed_by_a_signal_exits_with_128_and_it() {
    let host = Host::new();
    assert_eq!(host.sh("sh -c 'kill -9 $$'; exit $?").code, 137);
    host.audit();
}

#[test]
fn keeps_stdout_and_stderr_apart() {
    let host = Host::new();
    let outcome = host.sh("echo out; echo err >&2");
    assert_eq!(outcome.stdout, "out\n");
    assert!(outcome.stderr.ends_with("err\n") && !outcome.stderr.contains("out\n"), "{outcome:?}");
    host.audit();
}

#[test]
fn a_hundred_megabytes_come_out_whole() {
    let host = Host::new();
    let script = "seq 200000 | head -c 1000000 >/tmp/part; all() { for i in $(seq 100); do cat /tmp/part; done; }; \
        all | sha256sum >&2; all";
    let outcome = host.sh(script);
    assert_eq!((outcome.code, outcome.stdout.len()), (0, 100_000_000), "{}", outcome.stderr);
    assert!(outcome.stderr.contains(&sha256(outcome.stdout.as_bytes())), "{}", outcome.stderr);
    host.audit();
}

#[test]
fn a_hundred_megabytes_go_in_whole() {
    let host = Host::new();
    let mut running = Running::start(host.run_command(&["-i"], &["sha256sum"]));
    let mut stdin = running.child.stdin.take().unwrap();
    let data: Vec<u8> =
        (0..100_000_000_u32).map(|number| u8::try_from(number.wrapping_mul(2_654_435_761) >> 24).unwrap()).collect();
    let expected = sha256(&data);
    let writer = std::thread::spawn(move || stdin.write_all(&data).unwrap());
    let outcome = running.finish();
    writer.join().unwrap();
    assert!(outcome.stdout.starts_with(&expected), "{outcome:?}");
    host.audit();
}

#[test]
fn without_interactive_the_input_is_empty() {
    let host = Host::new();
    let outcome = Outcome::of(host.run_command(&[], &["wc", "-c"]), b"ignored");
    assert_eq!(outcome.line(), "0");
    host.audit();
}

#[test]
fn the_environment_is_the_images_and_the_users() {
    let host = Host::new();
    let outcome = host.run(&["-e", "A=1", "--env", "B=two words"], &["env"]);
    for line in ["A=1", "B=two words", "PATH=/bin", "HOME=/root"] {
        assert!(outcome.stdout.lines().any(|found| found == line), "{line}: {outcome:?}");
    }
    host.audit();
}

#[test]
fn the_working_directory_is_made_and_entered() {
    let host = Host::new();
    let outcome = host.run(&["--workdir", "/made/here"], &["pwd"]);
    assert_eq!(outcome.line(), "/made/here", "{outcome:?}");
    host.audit();
}

#[test]
fn a_user_by_name_has_its_groups_and_home() {
    let host = Host::new();
    let outcome = host.run(&["--user", "app"], &["sh", "-c", "id; echo $HOME"]);
    let expected = "uid=1000(app) gid=1000(app) groups=29(audio),50(staff)\n/home/app";
    assert_eq!(outcome.line(), expected, "{outcome:?}");
    host.audit();
}

#[test]
fn a_user_by_number_and_group() {
    let host = Host::new();
    let outcome = host.run(&["--user", "1234:staff"], &["sh", "-c", "id -u; id -g"]);
    assert_eq!(outcome.line(), "1234\n50", "{outcome:?}");
    let unknown = host.run(&["--user", "ghost"], &["true"]);
    assert!(unknown.code == 125 && unknown.stderr.contains("unable to find user ghost"), "{unknown:?}");
    host.audit();
}

#[test]
fn the_host_name_is_the_containers() {
    let host = Host::new();
    let outcome = host.sh("hostname; test $(hostname) = $HOSTNAME");
    assert_eq!((outcome.code, outcome.line().len()), (0, 12), "{outcome:?}");
    host.audit();
}

#[test]
fn the_process_is_alone_and_holds_no_privileges_it_should_not() {
    let host = Host::new();
    let script = "echo $$; ls /proc | grep -c '^[0-9]*$'; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status; \
        echo x >/proc/sys/kernel/hostname; mount -t tmpfs x /tmp; cat /proc/kcore | head -c1 | wc -c";
    let outcome = host.sh(script);
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines[0], "1", "{outcome:?}");
    assert_eq!(lines[2], "CapEff:\t00000000a80425fb");
    assert_eq!(lines[3], "NoNewPrivs:\t1");
    assert_eq!(lines[4], "0", "a masked file is empty");
    assert!(
        outcome.stderr.contains("Read-only file system") && outcome.stderr.contains("ermission denied"),
        "{outcome:?}"
    );
    host.audit();
}

#[test]
fn sigterm_reaches_the_process() {
    let host = Host::new();
    let script = "trap 'echo got term; exit 7' TERM; echo ready; while :; do sleep 1 & wait; done";
    let mut running = Running::start(host.run_command(&[], &["sh", "-c", script]));
    running.read_until("ready\n");
    running.signal(Signal::TERM);
    let outcome = running.finish();
    assert_eq!((outcome.code, outcome.stdout.as_str()), (7, "got term\n"), "{outcome:?}");
    host.audit();
}

#[test]
fn ctrl_c_reaches_the_process() {
    let host = Host::new();
    let script = "trap 'echo got int; exit 8' INT; echo ready; while :; do sleep 1 & wait; done";
    let mut running = Running::start(host.run_command(&[], &["sh", "-c", script]));
    running.read_until("ready\n");
    running.signal(Signal::INT);
    assert_eq!(running.finish().code, 8);
    host.audit();
}

#[test]
fn interrupted_while_it_boots_nothing_stays() {
    let host = Host::new();
    let running = Running::start(host.run_command(&[], &["true"]));
    // The machine has begun when its process is there.
    while host.processes(monitor()).is_empty() {
        std::thread::yield_now();
    }
    running.signal(Signal::TERM);
    let outcome = running.finish();
    assert_ne!(outcome.code, 0, "{outcome:?}");
    host.audit();
}

#[test]
fn a_volume_shows_files_both_ways_and_ro_is_read_only() {
    if open_only("a folder that host and guest both see") {
        return;
    }
    let host = Host::new();
    let shared = host.folder.join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("in"), "from the host").unwrap();
    let volume = format!("{}:/data", shared.display());
    let readonly = format!("{}:/ro:ro", shared.display());
    let outcome = host
        .run(&["-v", &volume, "-v", &readonly], &["sh", "-c", "cat /data/in; echo back >/data/out; echo x >/ro/no"]);
    assert!(outcome.stdout.starts_with("from the host"), "{outcome:?}");
    assert_eq!(std::fs::read_to_string(shared.join("out")).unwrap(), "back\n");
    assert!(!shared.join("no").exists() && outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    host.audit();
}

#[test]
fn limits_size_the_machine_and_the_cgroup() {
    let host = Host::new();
    let script = "nproc; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
    let outcome = host.run(&["--cpus", "1.5", "--memory", "64m"], &["sh", "-c", script]);
    assert_eq!(outcome.line(), "2\n67108864\n150000 100000", "{outcome:?}");
    host.audit();
}

#[test]
fn more_memory_than_allowed_is_killed() {
    let host = Host::new();
    let outcome =
        host.run(&["--memory", "32m"], &["sh", "-c", "head -c 100000000 /dev/zero | tail | wc -c; echo done"]);
    assert!(outcome.stderr.contains("Killed") || !outcome.stdout.contains("100000000"), "{outcome:?}");
    host.audit();
}

#[test]
fn changes_to_the_root_are_the_containers_own() {
    let host = Host::new();
    assert_eq!(host.sh("echo changed >/etc/passwd; touch /new").code, 0);
    let outcome = host.sh("grep -c root /etc/passwd; ls /new");
    assert!(outcome.stdout.starts_with("1\n") && outcome.code != 0, "{outcome:?}");
    host.audit();
}

#[test]
fn a_microvm_runs_the_same() {
    let host = Host::new();
    let outcome = host.run(&["--hypervisor", "qemu-microvm"], &["echo", "small"]);
    assert_eq!((outcome.code, outcome.line()), (0, "small"), "{outcome:?}");
    let unknown = host.run(&["--hypervisor", "xen"], &["true"]);
    assert!(unknown.code == 125 && unknown.stderr.contains("qemu-microvm"), "{unknown:?}");
    host.audit();
}

#[test]
fn two_containers_run_at_once() {
    let host = Host::new();
    let start = |word: &str| Running::start(host.run_command(&["-i"], &["sh", "-c", &format!("echo {word}; cat")]));
    let (mut one, mut two) = (start("one"), start("two"));
    one.read_until("one\n");
    two.read_until("two\n");
    one.write(b"first");
    two.write(b"second");
    assert_eq!((one.finish().stdout.as_str(), two.finish().stdout.as_str()), ("first", "second"));
    host.audit();
}

#[test]
fn detached_it_is_listed_logged_stopped_and_removed() {
    let host = Host::new();
    host.detached("web", "echo out; echo err >&2; trap 'exit 5' TERM; while :; do sleep 1 & wait; done");
    let list = host.coracle_outcome(&["ps"]).stdout;
    assert!(list.contains("web") && list.contains("running"), "{list}");
    let refused = host.coracle_outcome(&["rm", "web"]);
    assert!(refused.code == 125 && refused.stderr.contains("--force"), "{refused:?}");
    let taken = host.run(&["--name", "web"], &["true"]);
    assert!(taken.code == 125 && taken.stderr.contains("there is a container web already"), "{taken:?}");
    assert_eq!(host.coracle_outcome(&["exec", "web", "echo", "beside"]).line(), "beside");
    assert_eq!(host.coracle_outcome(&["stop", "web"]).code, 0);
    let list = host.coracle_outcome(&["ps", "--all"]).stdout;
    assert!(list.contains("exited (5)"), "{list}");
    let logs = host.coracle_outcome(&["logs", "web"]);
    assert_eq!((logs.stdout.as_str(), logs.stderr.as_str()), ("out\n", "err\n"));
    assert_eq!(host.coracle_outcome(&["rm", "web"]).code, 0);
    assert_eq!(host.coracle_outcome(&["rm", "web"]).code, 125);
    host.audit();
}

#[test]
fn detached_with_rm_it_cleans_up_after_itself() {
    if open_only("a folder that host and guest both see") {
        return;
    }
    let host = Host::new();
    let image = host.image();
    let gate = host.folder.join("gate");
    std::fs::create_dir(&gate).unwrap();
    let volume = format!("{}:/gate", gate.display());
    let script = "while ! test -e /gate/go; do sleep 0.1; done";
    let started =
        host.coracle_outcome(&["run", "--detach", "--rm", "--name", "once", "-v", &volume, &image, "sh", "-c", script]);
    assert_eq!((started.code, started.line().len()), (0, 12), "{started:?}");
    std::fs::write(gate.join("go"), "").unwrap();
    host.audit();
}

#[test]
fn a_detached_command_that_is_missing_is_said() {
    let host = Host::new();
    let image = host.image();
    let outcome = host.coracle_outcome(&["run", "--detach", &image, "nosuch"]);
    assert!(outcome.code == 127 && outcome.stderr.contains("executable file not found in $PATH"), "{outcome:?}");
    host.audit();
}

#[test]
fn kill_sends_the_signal_that_is_named() {
    let host = Host::new();
    host.detached("k", "trap 'exit 9' USR1; echo ready; while :; do sleep 1 & wait; done");
    // A first process without a handler gets no signal: so not before the handler is there.
    while host.coracle_outcome(&["logs", "k"]).stdout != "ready\n" {
        std::thread::yield_now();
    }
    assert_eq!(host.coracle_outcome(&["kill", "--signal", "SIGUSR1", "k"]).code, 0);
    // The container's own process notes the end.
    let noted = || host.coracle_outcome(&["ps", "--all"]).stdout.contains("exited (9)");
    while !noted() {
        std::thread::yield_now();
    }
    assert_eq!(host.coracle_outcome(&["rm", "k"]).code, 0);
    host.audit();
}

#[test]
fn execs_have_codes_users_and_streams_of_their_own() {
    let host = Host::new();
    host.detached("x", "sleep 1000");
    let exec = |arguments: &[&str]| host.coracle_outcome(&[&["exec"], arguments].concat());
    assert_eq!(exec(&["x", "sh", "-c", "exit 42"]).code, 42);
    let outcome = exec(&[
        "--user",
        "app",
        "--workdir",
        "/tmp",
        "--env",
        "V=1",
        "x",
        "sh",
        "-c",
        "id -un; pwd; echo $V; echo e >&2",
    ]);
    assert_eq!((outcome.line(), outcome.stderr.as_str()), ("app\n/tmp\n1", "e\n"), "{outcome:?}");
    let input = Outcome::of(host.coracle(&["exec", "-i", "x", "cat"]), b"through");
    assert_eq!(input.stdout, "through");
    let missing = exec(&["x", "nosuch"]);
    assert!(missing.code == 127 && missing.stderr.contains("executable file not found in $PATH"), "{missing:?}");
    let directory = exec(&["x", "/bin"]);
    assert!(directory.code == 126, "{directory:?}");
    assert_eq!(host.coracle_outcome(&["rm", "--force", "x"]).code, 0);
    host.audit();
}

#[test]
fn many_execs_at_once() {
    let host = Host::new();
    host.detached("m", "sleep 1000");
    let running: Vec<_> = (0..20)
        .map(|number: i32| {
            let script = format!("echo {number}; exit {number}");
            (number, Running::start(host.coracle(&["exec", "m", "sh", "-c", &script])))
        })
        .collect();
    for (number, running) in running {
        let outcome = running.finish();
        assert_eq!((outcome.code, outcome.line()), (number, number.to_string().as_str()), "{outcome:?}");
    }
    assert_eq!(host.coracle_outcome(&["rm", "--force", "m"]).code, 0);
    host.audit();
}

#[test]
fn killed_with_minus_nine_it_leaves_a_pod_that_ps_shows_and_rm_clears() {
    let host = Host::new();
    let image = host.image();
    let mut running =
        Running::start(host.coracle(&["run", "--name", "orphan", &image, "sh", "-c", "echo up; sleep 1000"]));
    running.read_until("up\n");
    running.signal(Signal::KILL);
    assert_eq!(running.finish().code, 137);
    let list = host.coracle_outcome(&["ps"]).stdout;
    assert!(list.contains("orphan") && list.contains("running"), "{list}");
    assert_eq!(host.coracle_outcome(&["rm", "--force", "orphan"]).code, 0);
    host.audit();
}

#[test]
fn one_call_writes_four_megabytes_to_the_host_over_vsock() {
    vsock_writes(Host::new());
}

#[test]
fn one_call_writes_four_megabytes_on_the_other_kernel() {
    let Some(guest) = std::env::var_os("CORACLE_TEST_OTHER_GUEST") else {
        println!("left out: CORACLE_TEST_OTHER_GUEST is not set, there is no second kernel");
        return;
    };
    vsock_writes(Host::new().set("guest.folder", &format!("{guest:?}")));
}

/// 64 KiB, 1 MiB and 4 MiB, each in one call of the guest's.
fn vsock_writes(host: Host) {
    host.detached("v", "sleep 1000");
    for (port, bytes) in [(5001, 64 << 10), (5002, 1 << 20), (5003, 4 << 20)] {
        let socket = host.guest_socket(port);
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        // The built-in monitor has a user of its own.
        std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let reader = std::thread::spawn(move || {
            let mut data = Vec::new();
            listener.accept().unwrap().0.read_to_end(&mut data).unwrap();
            data
        });
        let outcome =
            host.coracle_outcome(&["exec", "v", "guest-probe", "vsock", &port.to_string(), &bytes.to_string()]);
        assert_eq!(outcome.line(), bytes.to_string(), "{outcome:?}");
        let data = reader.join().unwrap();
        assert_eq!(data.len(), bytes);
        assert!(
            data.iter().enumerate().all(|(index, byte)| usize::from(*byte) == index % 251),
            "the bytes are in order"
        );
        std::fs::remove_file(socket).unwrap();
    }
    let removed = host.coracle_outcome(&["rm", "--force", "v"]);
    assert_eq!(removed.code, 0, "{removed:?}");
    host.audit();
}

#[test]
fn a_terminal_has_a_size_a_name_and_one_stream() {
    let host = Host::new();
    let (controller, user) = terminal(132, 43);
    let mut command = host.run_command(
        &["-i", "-t"],
        &["sh", "-c", "stty size; tty; test -t 0 && echo yes; echo err >&2; read x; echo got $x"],
    );
    command.stdin(user.try_clone().unwrap()).stdout(user.try_clone().unwrap()).stderr(user);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut screen = std::fs::File::from(controller);
    let mut seen = read_screen(&mut screen, "err\r\n");
    screen.write_all(b"word\r").unwrap();
    seen += &read_screen(&mut screen, "got word");
    assert_eq!(child.wait().unwrap().code(), Some(0), "{seen}");
    for expected in ["43 132", "/dev/pts/0", "yes"] {
        assert!(seen.contains(expected), "{expected}: {seen}");
    }
    host.audit();
}

#[test]
fn a_resize_reaches_the_terminal() {
    let host = Host::new();
    let (controller, user) = terminal(80, 24);
    let script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 1 & wait; done";
    let mut command = host.run_command(&["-i", "-t"], &["sh", "-c", script]);
    command.stdin(user.try_clone().unwrap()).stdout(user.try_clone().unwrap()).stderr(user);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut screen = std::fs::File::from(controller);
    read_screen(&mut screen, "ready");
    let size = rustix::termios::Winsize { ws_row: 50, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&screen, size).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::WINCH).unwrap();
    read_screen(&mut screen, "50 100");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    host.audit();
}

/// A terminal: its controlling side and its user side.
fn terminal(columns: u16, rows: u16) -> (std::os::fd::OwnedFd, std::fs::File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let controller = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&controller).unwrap();
    unlockpt(&controller).unwrap();
    let name = ptsname(&controller, Vec::new()).unwrap().into_string().unwrap();
    let size = rustix::termios::Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&controller, size).unwrap();
    (controller, std::fs::OpenOptions::new().read(true).write(true).open(name).unwrap())
}

fn read_screen(screen: &mut std::fs::File, until: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(until) {
        match screen.read(&mut byte) {
            Ok(1) => seen.extend(byte),
            other => panic!("the terminal ended ({other:?}) before {until:?}: {}", String::from_utf8_lossy(&seen)),
        }
    }
    String::from_utf8_lossy(&seen).into_owned()
}

//! `coracle run` by an ordinary user: no root, no link of the host's, no mount of the host's.
//!
//! Lane: open: it has volumes.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use coracle_e2e::{Host, Outcome, Running, monitor, path};

/// A user that nobody has given a name.
const USER: u32 = 54_321;

/// An ordinary user of a host: programs, guest image and image where such a user can read them.
struct User<'a> {
    host: &'a Host,
    home: PathBuf,
}

/// Copies files, or folders with all that is in them.
fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-rL").arg(from).arg(to).status().unwrap();
    assert!(copied.success(), "{}", from.display());
}

fn give(path: &Path) {
    std::os::unix::fs::chown(path, Some(USER), Some(USER)).unwrap();
}

impl<'a> User<'a> {
    fn of(host: &'a Host) -> Self {
        let home = host.folder.join("home");
        std::fs::create_dir_all(home.join("bin")).unwrap();
        copy(&path("CORACLE_TEST_BINARY"), &home.join("bin/coracle"));
        copy(&path("CORACLE_TEST_SHIM"), &home.join("bin/containerd-shim-coracle-v2"));
        copy(&path("CORACLE_TEST_IMAGE"), &home.join("image"));
        copy(&path("CORACLE_TEST_GUEST"), &home.join("guest"));
        give(&home);
        give(&host.run);
        Self { host, home }
    }

    fn coracle(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.home.join("bin/coracle"));
        command.args(arguments).current_dir(&self.home).uid(USER).gid(USER);
        command.env("HOME", &self.home).env("CORACLE_CONFIG", self.host.settings_file());
        command.env_remove("CORACLE_ROOT").env_remove("XDG_DATA_HOME").env_remove("XDG_RUNTIME_DIR");
        command
    }

    fn outcome(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(self.coracle(arguments), b"")
    }

    /// `coracle run` with options, and a script.
    fn run(&self, options: &[&str], script: &str) -> Outcome {
        self.outcome(&self.arguments(options, script))
    }

    fn arguments<'b>(&self, options: &[&'b str], script: &'b str) -> Vec<&'b str> {
        let mut arguments = vec!["run"];
        arguments.extend(options);
        arguments.extend(["oci:image", "sh", "-c", script]);
        arguments
    }
}

/// A host with an ordinary user's guest image in its settings; `None` with the reason where that can't be.
fn host() -> Option<Host> {
    if monitor() != "qemu-system" {
        println!("left out: an ordinary user's network is QEMU's");
        return None;
    }
    let host = Host::new();
    let guest = format!("{:?}", host.folder.join("home/guest"));
    Some(host.set("guest.folder", &guest).set("network.default", "\"bridge\""))
}

/// A port that nobody has.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What an HTTP server answers.
fn fetch(port: u16) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.write_all(b"GET /word HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_container_of_an_ordinary_user_has_a_network_and_ports() {
    let Some(host) = host() else { return };
    let user = User::of(&host);
    let script = "id -u; cat /etc/resolv.conf; ip -4 -o addr show eth0; ip route; echo x >/written && cat /written";
    let outcome = user.run(&["--rm"], script);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    for word in ["0\n", "nameserver 10.0.2.3", "10.0.2.15/24", "default via 10.0.2.2", "x\n"] {
        assert!(outcome.stdout.contains(word), "{word}: {outcome:?}");
    }
    let port = free_port();
    let publish = format!("127.0.0.1:{port}:80");
    let serve = "echo from the guest >/tmp/word; httpd -p 80 -h /tmp && echo up; exec sleep 1000";
    let outcome = user.run(&["-d", "--name", "web", "--publish", &publish], serve);
    assert_eq!(outcome.code, 0, "{outcome:?}");
    let mut logs = Running::start(user.coracle(&["logs", "--follow", "web"]));
    logs.read_until("up\n");
    assert!(fetch(port).ends_with("from the guest\n"));
    let outcome = user.outcome(&["exec", "web", "cat", "/tmp/word"]);
    assert_eq!(outcome.stdout, "from the guest\n", "{outcome:?}");
    let outcome = user.run(&["--rm", "--publish", &publish], "true");
    assert!(outcome.code == 125 && outcome.stderr.contains("web has that port"), "{outcome:?}");
    // All that runs is the user's, and may do nothing that the user may not.
    for pid in host.processes("") {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        assert!(status.contains(&format!("Uid:\t{USER}\t{USER}\t{USER}\t{USER}")) || status.is_empty(), "{status}");
    }
    // A container that has ended has no ports.
    assert_eq!(user.outcome(&["stop", "--time", "0", "web"]).code, 0);
    let outcome = user.run(&["--rm", "--publish", &publish], "true");
    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert_eq!(user.outcome(&["rm", "--force", "web"]).code, 0);
    drop(logs.finish());
    let free = TcpListener::bind(("127.0.0.1", port));
    assert!(free.is_ok(), "the port is the host's again");
    drop(free);
    host.audit();
}

#[test]
fn what_an_ordinary_user_can_not_have_is_said() {
    let Some(host) = host() else { return };
    let user = User::of(&host);
    for (options, words) in [
        (&["--network", "bridge"][..], &["only root", "--network user"][..]),
        (&["--network", "none", "--publish", "1234:80"], &["no ports"]),
        (&["--hypervisor", "builtin"], &["--network none", "--hypervisor qemu"]),
        (&["--publish", "[::1]:1234:80"], &["::1", "IPv4"]),
        (&["--publish", "1234:80", "--publish", "1234:81"], &["1234", "twice"]),
    ] {
        let outcome = user.run(options, "true");
        let named = words.iter().all(|word| outcome.stderr.contains(word));
        assert!(outcome.code == 125 && named, "{options:?}: {outcome:?}");
    }
    // A volume needs a server of files that an ordinary user can start: the older one in C is not.
    std::fs::create_dir(user.home.join("volume")).unwrap();
    give(&user.home.join("volume"));
    let outcome = user.run(&["--rm", "-v", "./volume:/v"], "echo x >/v/f");
    if outcome.code == 0 {
        use std::os::unix::fs::MetadataExt;
        let made = std::fs::metadata(user.home.join("volume/f")).unwrap();
        assert_eq!(made.uid(), USER, "the container's root is the user to the host");
    } else {
        println!("left out: volumes of an ordinary user, for this host's virtiofsd needs root");
        assert!(outcome.code == 125 && outcome.stderr.contains("virtiofsd"), "{outcome:?}");
    }
    let outcome = user.outcome(&["check"]);
    for word in ["network: the user's own", "roots: disks"] {
        assert!(outcome.stdout.contains(word), "{word}: {outcome:?}");
    }
    host.audit();
}

#[test]
fn the_hosts_loopback_is_out_of_reach_by_passt_and_a_warning_without_it() {
    let Some(host) = host() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!("guest-probe get 10.0.2.2:{port} / 2>&1; echo done");
    let user = User::of(&host);
    let outcome = user.run(&["--rm"], &script);
    assert!(outcome.stdout.ends_with("done\n"), "{outcome:?}");
    assert!(listener.accept().is_err(), "the guest has reached the host's loopback");
    assert!(!outcome.stderr.contains("loopback"), "{outcome:?}");
    let host = host.set("network.passt_paths", "[]");
    let user = User { host: &host, home: host.folder.join("home") };
    listener.set_nonblocking(false).unwrap();
    let served = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.read(&mut [0; 512]).unwrap();
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nreached").unwrap();
    });
    let outcome = user.run(&["--rm"], &script);
    assert!(outcome.stdout.contains("reached"), "{outcome:?}");
    assert!(outcome.stderr.contains("loopback") && outcome.stderr.contains("passt"), "{outcome:?}");
    served.join().unwrap();
    host.audit();
}

#[test]
fn passt_killed_is_an_exit_and_nothing_stays() {
    let Some(host) = host() else { return };
    let user = User::of(&host);
    let mut running = Running::start(user.coracle(&user.arguments(&["--rm"], "echo up; exec sleep 1000")));
    running.read_until("up\n");
    host.kill("/passt");
    let outcome = running.finish();
    assert_eq!(outcome.code, 137, "{outcome:?}");
    host.audit();
}

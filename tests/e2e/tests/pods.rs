//! Pods through containerd's CRI, as kubelet makes them.
//!
//! Lane: open: containers come later, and their roots are folders of the host's.

use std::io::{Read, Write};
use std::net::TcpStream;

use coracle_e2e::cri::msg;
use coracle_e2e::{Containerd, Cri, Host, Pod, Shim, monitor};
use protobuf::MessageField;

/// What a server of the pod's answers to this host.
fn get(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /passwd HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_pod_runs_containers_beside_one_another() {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod =
        Pod::run(&cri, "coracle", "p", |config| config.log_directory = host.folder.display().to_string()).unwrap();
    assert_eq!(pod.status().unwrap().state, 0, "ready");
    let one = pod.start("one", &["sh", "-c", "echo out; echo $HOSTNAME; sleep 1000"], |_| {}).unwrap();
    let two = pod.start("two", &["sh", "-c", "exit 3"], |_| {}).unwrap();
    assert_eq!(cri.ended(&two).exit_code, 3);
    let (code, out, err) = cri.exec(&one, &["sh", "-c", "hostname; echo err >&2; exit 7"]).unwrap();
    assert_eq!((code, out.as_str(), err.as_str()), (7, "p\n", "err\n"));
    assert_eq!(pod.await_log("one", "p\n"), "out\np\n");
    cri.stop(&one, 1).unwrap();
    cri.remove(&one).unwrap();
    cri.remove(&two).unwrap();
    // A pod whose last container has ended takes another one.
    let status = "grep -E '^(Name|Uid|CapPrm|CapBnd|NoNewPrivs):' /proc/1/status | tr '\\t' ' '; exit 4";
    let share = |config: &mut msg::ContainerConfig| {
        let security = config.linux.mut_or_insert_default().security_context.mut_or_insert_default();
        // 0 is the pod's.
        security.namespace_options = MessageField::some(msg::NamespaceOption::new());
    };
    let three = pod.start("three", &["sh", "-c", status], share).unwrap();
    assert_eq!(cri.ended(&three).exit_code, 4);
    // Whoever gets hold of the first process of a shared namespace has got nothing.
    let none = "0000000000000000";
    let expected = format!("Uid: 65534 65534 65534 65534\nCapPrm: {none}\nCapBnd: {none}\nNoNewPrivs: 1\n");
    let log = pod.await_log("three", "NoNewPrivs: ");
    assert!(log.ends_with(&expected), "{log}");
    pod.remove().unwrap();
    drop(containerd);
    host.audit();
}

#[test]
fn a_pod_has_the_network_that_cni_has_made() {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let run =
        |name: &str| Pod::run(&cri, "coracle", name, |config| config.log_directory = host.folder.display().to_string());
    let (one, two) = (run("one").unwrap(), run("two").unwrap());
    let ips = |pod: &Pod<'_>| {
        let network = pod.status().unwrap().network.unwrap_or_default();
        (network.ip, network.additional_ips.first().map(|more| more.ip.clone()).unwrap_or_default())
    };
    let (v4, v6) = ips(&two);
    let server = two.start("server", &["sh", "-c", "httpd -p 8080 -h /etc; echo serves; sleep 1000"], |_| {}).unwrap();
    two.await_log("server", "serves");
    let client = one.start("client", &["sleep", "1000"], |_| {}).unwrap();
    let exec = |script: &str| cri.exec(&client, &["sh", "-c", script]).unwrap();
    let (_, links, _) = exec("ip -o addr; ip -o link; ip route; ip -6 route");
    for text in [ips(&one).0.as_str(), ips(&one).1.as_str(), "mtu 1400", "default via 10.88.", "default via fd00:88:"] {
        assert!(links.contains(text), "{text}: {links}");
    }
    // Between pods, by both versions; and from the host, where the bridge is.
    for server in [format!("{v4}:8080"), format!("[{v6}]:8080")] {
        let (code, out, err) = exec(&format!("guest-probe get {server} /passwd"));
        assert!(code == 0 && out.contains("root:x:0"), "{server}: {out} {err}");
    }
    let answer = get(&format!("{v4}:8080"));
    assert!(answer.contains("root:"), "{answer}");
    // containerd's port-forward dials the loopback of the pod's namespace.
    let forward = |port| cri.port_forward(&two.id, port).unwrap();
    let answer = forward(8080).request("GET /passwd HTTP/1.0\r\n\r\n").unwrap();
    assert!(answer.contains("root:x:0"), "{answer}");
    assert!(forward(8081).request("x").is_err_and(|error| !error.is_empty()), "nobody listens there");
    // Loopback is the pod's own, and shared by its containers.
    let beside = two.start("beside", &["guest-probe", "get", "127.0.0.1:8080", "/passwd"], |_| {}).unwrap();
    assert_eq!(cri.ended(&beside).exit_code, 0, "{}", two.log("beside"));
    assert_eq!(cri.status(&server).unwrap().state, 1, "running");
    one.remove().unwrap();
    two.remove().unwrap();
    drop(containerd);
    host.audit();
}

#[test]
fn all_of_a_pod_is_in_its_control_group() {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let parent = format!("/{}", host.mark());
    let pod = Pod::run(&cri, "coracle", "p", |config| {
        config.linux.mut_or_insert_default().cgroup_parent.clone_from(&parent);
    })
    .unwrap();
    let expected = format!("{parent}/{}", pod.id);
    pod.start("one", &["sleep", "1000"], |_| {}).unwrap();
    for word in [" serve", monitor(), "virtiofsd"] {
        let pids = host.processes(word);
        assert!(!pids.is_empty(), "{word}");
        for pid in pids {
            let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
            // Each line is one hierarchy: number, controllers, path.
            let elsewhere: Vec<&str> =
                groups.lines().filter(|line| line.splitn(3, ':').nth(2) != Some(expected.as_str())).collect();
            assert!(elsewhere.is_empty(), "{word}: {elsewhere:?} is not {expected}");
        }
    }
    // The shim killed with -9 leaves no group either: containerd has `delete` take it away.
    host.kill(" serve");
    pod.remove_as_kubelet_does().unwrap();
    drop(containerd);
    host.audit();
}

#[test]
fn pods_outlive_containerd() {
    let host = Host::with_own_network();
    let mut containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let folder = host.folder.display().to_string();
    let pod = Pod::run(&cri, "coracle", "p", |config| config.log_directory.clone_from(&folder)).unwrap();
    let lives = pod.start("lives", &["sh", "-c", "echo up; exec sleep 1000"], |_| {}).unwrap();
    let ended = pod.start("ended", &["sh", "-c", "exit 5"], |_| {}).unwrap();
    assert_eq!(cri.ended(&ended).exit_code, 5);
    let script = "until [ -e /dev/shm/go ]; do sleep 0.1; done; exit 6";
    let ends = pod.start("ends", &["sh", "-c", script], |_| {}).unwrap();
    let exec = |cri: &Cri, script: &str| cri.exec(&lives, &["sh", "-c", script]).unwrap();
    // It ends while nobody listens.
    assert_eq!(exec(&cri, "(sleep 3; touch /dev/shm/go) >/dev/null 2>&1 & true").0, 0);
    containerd.kill();
    assert_eq!(Shim::of_pod(&host, &ends).wait("").unwrap(), 6);
    let id = pod.id.clone();
    let again = Containerd::with_cri_again(&host);
    let cri = Cri::connect(&again);
    let pod = Pod::found(&cri, &id, "p", |config| config.log_directory.clone_from(&folder));
    assert_eq!(pod.status().unwrap().state, 0, "ready");
    assert_eq!(cri.status(&lives).unwrap().state, 1, "running");
    assert_eq!(exec(&cri, "echo alive").1, "alive\n");
    let status = cri.status(&ended).unwrap();
    assert_eq!((status.state, status.exit_code), (2, 5));
    assert_eq!(cri.ended(&ends).exit_code, 6);
    assert!(cri.stats(&lives).unwrap().memory.working_set_bytes.value > 0);
    let new = pod.start("new", &["sh", "-c", "exit 7"], |_| {}).unwrap();
    assert_eq!(cri.ended(&new).exit_code, 7);
    cri.stop(&lives, 0).unwrap();
    assert_eq!(cri.status(&lives).unwrap().exit_code, 137);
    pod.remove().unwrap();
    drop(again);
    drop(containerd);
    host.audit();
}

#[test]
fn a_pod_whose_monitor_is_killed_can_be_stopped_and_removed() {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod = Pod::run(&cri, "coracle", "p", |_| {}).unwrap();
    let one = pod.start("one", &["sleep", "1000"], |_| {}).unwrap();
    host.kill(monitor());
    assert_eq!(cri.ended(&one).exit_code, 137);
    assert!(cri.exec(&one, &["true"]).is_err());
    pod.remove_as_kubelet_does().unwrap();
    drop(containerd);
    host.audit();
}

/// A program of two GiB that reads all of itself, over and over: an ELF file of one segment, the rest of which is a hole.
fn program_that_reads_itself(path: &std::path::Path) {
    const BASE: u64 = 0x40_0000;
    const BYTES: u64 = 2 << 30;
    let start = 64 + 56;
    let mut code = vec![0x48, 0xbb];
    code.extend(BASE.to_le_bytes());
    // mov al, [rbx]; add rbx, 4096; mov rcx, the end; cmp rbx, rcx; jb to the first; jmp to the start.
    code.extend([0x8a, 0x03, 0x48, 0x81, 0xc3, 0, 0x10, 0, 0, 0x48, 0xb9]);
    code.extend((BASE + BYTES).to_le_bytes());
    code.extend([0x48, 0x39, 0xcb, 0x72, 0xe8, 0xeb, 0xdc]);
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2_u16, 62, 1, 0] {
        file.extend(half.to_le_bytes());
    }
    for number in [BASE + start, 64, 0] {
        file.extend(number.to_le_bytes());
    }
    for half in [0_u16, 0, 64, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // Loaded, to be read and run.
    file.extend(1_u32.to_le_bytes());
    file.extend(5_u32.to_le_bytes());
    for number in [0, BASE, BASE, BYTES, BYTES, 4096] {
        file.extend(number.to_le_bytes());
    }
    file.extend(code);
    std::fs::write(path, file).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(BYTES).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
}

/// The guest's kernel must not find a file in use when the last process of a container's mounts has gone.
#[test]
fn a_container_killed_while_its_program_is_read_has_ended() {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod = Pod::run(&cri, "coracle", "p", |_| {}).unwrap();
    let other = pod.start("other", &["sleep", "1000"], |_| {}).unwrap();
    let folder = host.folder.join("program");
    std::fs::create_dir(&folder).unwrap();
    program_that_reads_itself(&folder.join("reads"));
    let mount = msg::Mount {
        host_path: folder.display().to_string(),
        container_path: "/v".into(),
        readonly: true,
        ..Default::default()
    };
    let reads = pod.start("reads", &["/v/reads"], |config| config.mounts.push(mount)).unwrap();
    let signal = |signal| {
        for pid in host.processes("virtiofsd") {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, signal).unwrap();
        }
    };
    assert_eq!(cri.status(&reads).unwrap().state, 1, "it runs");
    signal(rustix::process::Signal::STOP);
    std::thread::scope(|scope| {
        let (told, stopped) = std::sync::mpsc::channel();
        let (cri, reads) = (&cri, &reads);
        scope.spawn(move || {
            cri.stop(reads, 0).unwrap();
            // Nobody listens any more where it took its time.
            let _ = told.send(());
        });
        // Mostly it ends while the server stands still. A read that its kernel does not give up ends with its answer.
        let _ = stopped.recv_timeout(std::time::Duration::from_secs(3));
        signal(rustix::process::Signal::CONT);
    });
    assert_eq!(cri.status(&reads).unwrap().exit_code, 137);
    assert_eq!(cri.exec(&other, &["echo", "on"]).unwrap().1, "on\n", "the pod goes on");
    cri.remove(&reads).unwrap();
    pod.remove().unwrap();
    drop(containerd);
    host.audit();
}

#[test]
fn a_port_of_the_host_leads_to_the_pod() {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod = Pod::run(&cri, "coracle", "p", |config| {
        config.log_directory = host.folder.display().to_string();
        let port = msg::PortMapping { container_port: 8080, host_port: 18080, ..Default::default() };
        config.port_mappings.push(port);
    })
    .unwrap();
    pod.start("server", &["sh", "-c", "httpd -p 8080 -h /etc; echo serves; sleep 1000"], |_| {}).unwrap();
    pod.await_log("server", "serves");
    for address in ["127.0.0.1:18080", "10.88.0.1:18080"] {
        let answer = get(address);
        assert!(answer.contains("root:x:0"), "{address}: {answer}");
    }
    pod.remove().unwrap();
    assert!(TcpStream::connect("127.0.0.1:18080").is_err(), "the port is closed with its pod");
    drop(containerd);
    host.audit();
}

#[test]
fn a_client_that_never_reads_holds_nobody_up() {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod =
        Pod::run(&cri, "coracle", "p", |config| config.log_directory = host.folder.display().to_string()).unwrap();
    let one = pod.start("one", &["sleep", "1000"], |_| {}).unwrap();
    // Several of them, each with more output than all buffers on the way hold.
    let silent: Vec<_> = (0..4).map(|_| cri.exec_streams(&one, &["yes"], false).unwrap()).collect();
    for number in 0..5 {
        let (code, out, _) = cri.exec(&one, &["sh", "-c", &format!("echo {number}; exit {number}")]).unwrap();
        assert_eq!((code, out), (number, format!("{number}\n")));
    }
    let two = pod.start("two", &["sh", "-c", "echo two; exit 3"], |_| {}).unwrap();
    assert_eq!((cri.ended(&two).exit_code, pod.await_log("two", "two\n").as_str()), (3, "two\n"));
    assert!(cri.stats(&one).unwrap().cpu.usage_core_nano_seconds.value > 0);
    drop(silent);
    pod.remove().unwrap();
    drop(containerd);
    host.audit();
}

//! The size of a pod's machine, read in the guest and on the host.
//!
//! Lane: open: machines grow and shrink.

use coracle_e2e::bundles::{busybox_folder, end, ext4, script_config};
use coracle_e2e::cri::{CriError, msg};
use coracle_e2e::{Containerd, Cri, Host, Pod, Shim, becomes, monitor};
use protobuf::MessageField;

/// A container's command that only waits.
const IDLE: [&str; 2] = ["sleep", "1000"];

fn limits(memory_mib: i64, cpu_quota: i64) -> msg::LinuxContainerResources {
    msg::LinuxContainerResources {
        memory_limit_in_bytes: memory_mib << 20,
        cpu_quota,
        cpu_period: 100_000,
        ..Default::default()
    }
}

fn start(pod: &Pod<'_>, name: &str, command: &[&str], limits: msg::LinuxContainerResources) -> String {
    let change = |config: &mut msg::ContainerConfig| {
        config.linux.mut_or_insert_default().resources = MessageField::some(limits);
    };
    pod.start(name, command, change).unwrap()
}

fn update(cri: &Cri, id: &str, limits: msg::LinuxContainerResources) -> Result<(), CriError> {
    let request = msg::UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: MessageField::some(limits),
        ..Default::default()
    };
    cri.call::<msg::Empty>("UpdateContainerResources", &request).map(drop)
}

/// Memory in MiB and processors, as a container sees them.
fn seen(cri: &Cri, id: &str) -> (u64, u32) {
    let script = "while read name number _; do [ $name != MemTotal: ] || echo $number; done </proc/meminfo; nproc";
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).unwrap();
    assert_eq!(code, 0, "{out} {err}");
    let numbers: Vec<u64> = out.split_whitespace().map(|word| word.parse().unwrap()).collect();
    (numbers[0] / 1024, u32::try_from(numbers[1]).unwrap())
}

/// Memory that the host has given to the machine, in MiB.
fn given(host: &Host) -> u64 {
    let of = |pid: &i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let figure = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        (figure("RssShmem:") + figure("RssAnon:")) / 1024
    };
    host.processes(monitor()).iter().map(of).max().unwrap()
}

/// Runs a test with a pod of its own, and sees that nothing stays of it.
fn with_pod(test: impl FnOnce(&Host, &Cri, &Pod<'_>)) {
    let host = Host::with_own_network();
    let containerd = Containerd::with_cri(&host);
    let cri = Cri::connect(&containerd);
    let pod =
        Pod::run(&cri, "coracle", "p", |config| config.log_directory = host.folder.display().to_string()).unwrap();
    test(&host, &cri, &pod);
    pod.remove().unwrap();
    drop(containerd);
    host.audit();
}

#[test]
fn a_machine_follows_the_limits_of_its_containers() {
    with_pod(|_, cri, pod| {
        let one = start(pod, "one", &IDLE, limits(128, 0));
        let (least, cpus) = seen(cri, &one);
        assert_eq!(cpus, 1);
        assert!((320..=384).contains(&least), "256 MiB of the machine and 128 of the container: {least}");
        // Another container adds to it, and one that grows adds more.
        let most = u32::try_from(std::thread::available_parallelism().unwrap().get()).unwrap().min(2);
        let two = start(pod, "two", &IDLE, limits(256, 150_000));
        let (more, cpus) = seen(cri, &one);
        assert!((least + 240..=least + 256).contains(&more), "{least} and then {more}");
        assert_eq!(cpus, most);
        update(cri, &two, limits(512, 150_000)).unwrap();
        let (most_memory, _) = seen(cri, &one);
        assert!((more + 240..=more + 256).contains(&most_memory), "{more} and then {most_memory}");
        let allowed = |id: &str| cri.exec(id, &["cat", "/sys/fs/cgroup/memory.max"]).unwrap().1;
        assert_eq!(allowed(&two), format!("{}\n", 512 << 20));
        // More than there can be is refused, and changes nothing.
        let (_, text) = update(cri, &two, limits(1 << 40, 150_000)).unwrap_err();
        assert!(text.contains("machine.max_memory_mib"), "{text}");
        assert_eq!(allowed(&two), format!("{}\n", 512 << 20));
        assert_eq!(seen(cri, &one).0, most_memory);
        // Less is less, and what goes takes its share with it.
        update(cri, &two, limits(64, 50_000)).unwrap();
        becomes("a smaller machine", || seen(cri, &one), |(memory, cpus)| *memory <= least + 128 && *cpus == 1);
        cri.stop(&two, 0).unwrap();
        cri.remove(&two).unwrap();
        becomes("the first size", || seen(cri, &one).0, |memory| *memory <= least + 16);
    });
}

#[test]
fn memory_that_was_freed_is_the_hosts_again() {
    with_pod(|host, cri, pod| {
        // The container stays, and with it the machine's size: what comes back comes by the guest's own word.
        let script = "until [ -e /tmp/go ]; do sleep 0.1; done; \
            (head -c 200000000 /dev/zero; until [ -e /tmp/end ]; do sleep 0.1; done) | tail -c 200000000 >/dev/null; sleep 1000";
        let hog = start(pod, "hog", &["sh", "-c", script], limits(300, 0));
        let (before, (size, _)) = (given(host), seen(cri, &hog));
        cri.exec(&hog, &["touch", "/tmp/go"]).unwrap();
        becomes("held memory", || given(host), |now| *now >= before + 180);
        let held = given(host);
        cri.exec(&hog, &["touch", "/tmp/end"]).unwrap();
        becomes("memory given back", || given(host), |now| *now + 150 <= held);
        assert_eq!(seen(cri, &hog).0, size);
        println!("{before} MiB before, {held} while 190 MiB were held, {} after", given(host));
    });
}

/// Runs a container of a pod of its own with these resources and annotations to its end: its exit code.
fn end_of(host: &Host, id: &str, script: &str, resources: serde_json::Value, annotations: &serde_json::Value) -> u32 {
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let mut config = script_config(script);
    config["linux"]["resources"] = resources;
    config["annotations"] = annotations.clone();
    config["mounts"].as_array_mut().unwrap().push(
        serde_json::json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] }),
    );
    let shim = Shim::start(host, id, config.to_string().as_bytes());
    shim.create_with_root(id, &[("ext4", &whole, &[])]).unwrap();
    end(shim)
}

#[test]
fn a_machine_has_the_processors_for_its_first_container() {
    let host = Host::with_own_network();
    let script = "exit $(busybox nproc)";
    for (quota, expected) in [(0, 1), (50_000, 1), (150_000, 2)] {
        let resources = serde_json::json!({ "cpu": { "quota": quota, "period": 100_000 } });
        let found = end_of(&host, &format!("cpus-{quota}"), script, resources, &serde_json::json!({}));
        assert_eq!(found, expected, "a quota of {quota}");
    }
    host.audit();
}

#[test]
fn a_guest_has_the_swap_that_its_containers_ask_for() {
    let host = Host::with_own_network();
    let folder = host.folder.join("swap-files");
    let host = host.set("machine.swap_folder", &format!("{:?}", folder.display().to_string()));
    let (swappiness, bytes) =
        ("io.katacontainers.container.resource.swappiness", "io.katacontainers.container.resource.swap_in_bytes");
    let limit = 64_u64 << 20;
    let memory = || serde_json::json!({ "memory": { "limit": limit, "swap": limit } });
    // In MiB, and what the container may use of it.
    let script = "test $(busybox cat /sys/fs/cgroup/memory.swap.max) = 134217728 || exit 99; \
        exit $(( $(busybox grep SwapTotal /proc/meminfo | busybox tr -dc 0-9) / 1024 ))";
    let both = serde_json::json!({ swappiness: "60", bytes: (3 * limit).to_string() });
    let host = host.set("machine.guest_swap", "true");
    assert_eq!(end_of(&host, "swap", script, memory(), &both), 128);
    let script = "exit $(( $(busybox grep SwapTotal /proc/meminfo | busybox tr -dc 0-9) / 1024 ))";
    assert_eq!(end_of(&host, "like-memory", script, memory(), &serde_json::json!({ swappiness: "1" })), 64);
    assert_eq!(end_of(&host, "no-swap", script, memory(), &serde_json::json!({ bytes: "100000000" })), 0);
    let left: Vec<_> = std::fs::read_dir(&folder)
        .unwrap()
        .flatten()
        .map(|entry| (entry.path(), entry.metadata().unwrap().len()))
        .collect();
    assert!(left.is_empty(), "the files have a name: {left:?}");
    let host = host.set("machine.guest_swap", "false");
    assert_eq!(end_of(&host, "off", script, memory(), &both), 0);
    host.audit();
}

/// The processors of the host that the monitor's threads may use, each once.
fn runs_on(host: &Host) -> Vec<String> {
    let [monitor] = host.processes(monitor()).try_into().expect("one monitor");
    let threads = std::fs::read_dir(format!("/proc/{monitor}/task")).unwrap().flatten();
    let of = |thread: std::fs::DirEntry| {
        let status = std::fs::read_to_string(thread.path().join("status")).ok()?;
        Some(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?.trim().to_owned())
    };
    let mut found: Vec<String> = threads.filter_map(of).collect();
    found.sort();
    found.dedup();
    found
}

#[test]
fn a_machine_runs_where_its_containers_may() {
    with_pod(|host, cri, pod| {
        let cpuset = |cpus: &str| msg::LinuxContainerResources { cpuset_cpus: cpus.into(), ..limits(64, 0) };
        let before = runs_on(host);
        let one = start(pod, "one", &IDLE, cpuset("0"));
        becomes("the container's processor", || runs_on(host), |found| *found == ["0"]);
        // The guest has no such numbers, and its containers all of its processors.
        assert!(cri.exec(&one, &["true"]).is_ok());
        if before != ["0"] {
            update(cri, &one, cpuset("1")).unwrap();
            becomes("another one", || runs_on(host), |found| *found == ["1"]);
            // Another container may run anywhere.
            let two = start(pod, "two", &IDLE, limits(64, 0));
            becomes("all processors", || runs_on(host), |found| *found == before);
            cri.stop(&two, 0).unwrap();
            cri.remove(&two).unwrap();
            becomes("its own again", || runs_on(host), |found| *found == ["1"]);
        }
        cri.stop(&one, 0).unwrap();
        cri.remove(&one).unwrap();
        becomes("all processors", || runs_on(host), |found| *found == before);
    });
}

#[test]
fn a_machine_runs_where_the_settings_say() {
    let host = Host::new().set("machine.host_cpus", "\"0\"").set("machine.host_nodes", "\"0\"");
    let is_qemu = monitor() == "qemu-system";
    host.detached("placed", "exec sleep 1000");
    let [monitor] = host.processes(monitor()).try_into().expect("one monitor");
    let threads = std::fs::read_dir(format!("/proc/{monitor}/task")).unwrap().flatten();
    let mut count = 0;
    for thread in threads {
        let status = std::fs::read_to_string(thread.path().join("status")).unwrap_or_default();
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        // A thread that has ended runs nowhere.
        assert!(allowed.is_none_or(|list| list.trim() == "0"), "{status}");
        count += 1;
    }
    assert!(count > 1, "{count} threads");
    assert_eq!(host.coracle_outcome(&["rm", "--force", "placed"]).code, 0);
    let host = host.set("machine.host_cpus", "\"1000\"");
    let refused = host.run(&[], &["true"]);
    assert!(refused.code == 125 && refused.stderr.contains("machine.host_cpus"), "{refused:?}");
    let host = host.set("machine.host_cpus", "\"\"").set("machine.host_nodes", "\"100\"");
    let refused = host.run(&[], &["true"]);
    let words = if is_qemu { "QEMU did not start" } else { "machine.host_nodes" };
    assert!(refused.code == 125 && refused.stderr.contains(words), "{refused:?}");
    host.audit();
}

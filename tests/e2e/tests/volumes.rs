//! Volumes that are more than folders of the host: disks, memory, and copies that follow.
//!
//! Lane: open: disks come later. What a machine that shares nothing has is tested here by its setting alone.

use std::path::Path;

use containerd_shim_protos::ttrpc::Code;
use coracle_e2e::bundles::{HostMount, busybox_folder, config_with, end, ext4, let_go, pod, tool};
use coracle_e2e::{Host, Shim, monitor};

#[test]
fn a_direct_volume_is_mounted_by_the_guest_and_is_its_groups() {
    use base64::Engine;
    let host = Host::with_own_network();
    let direct = host.folder.join("direct");
    let host = host.set("storage.direct_volumes", &format!("{:?}", direct.display().to_string()));
    let source = host.folder.join("kubelet/volumes/kubernetes.io~csi/pvc/mount");
    std::fs::create_dir_all(&source).unwrap();
    let disk = ext4(&host.folder.join("volume.ext4"), None);
    let describe = |text: serde_json::Value| {
        let name = base64::engine::general_purpose::URL_SAFE.encode(source.to_str().unwrap());
        std::fs::create_dir_all(direct.join(&name)).unwrap();
        std::fs::write(direct.join(name).join("mountInfo.json"), text.to_string()).unwrap();
    };
    let info = |fstype: &str| {
        serde_json::json!({ "volume-type": "block", "device": disk, "fstype": fstype, "options": ["noatime"],
            "metadata": { "fsGroup": "3000", "fsGroupChangePolicy": "OnRootMismatch" } })
    };
    describe(info("ext4"));
    let with_volume = |script: &str| config_with(script, &[("/data", &source)]);
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    // From the machine's start.
    let script = "test $(busybox stat -c %g%a /data) = 30002775 && busybox grep -q ' /data ext4 ' /proc/mounts && echo one >/data/f && exit 3";
    let shim = Shim::start(&host, "direct", with_volume(script).to_string().as_bytes());
    shim.create_with_root("direct", &[("ext4", &whole, &[])]).unwrap();
    assert!(host.processes("virtiofsd").is_empty(), "nothing is shared");
    assert_eq!(end(shim), 3);
    assert_eq!(tool("debugfs", &["-R", "cat /f", &disk]), "one\n");
    is_told_and_grows(&host, &source, &with_volume, &whole, &disk);
    // A file system that the guest does not take.
    describe(info("xfs"));
    let shim = Shim::start(&host, "xfs", with_volume("exit 0").to_string().as_bytes());
    let (code, text) = shim.create_with_root("xfs", &[("ext4", &whole, &[])]).unwrap_err();
    assert!(code == Code::UNIMPLEMENTED && text.contains("xfs"), "{code:?} {text}");
    shim.finish();
    describe(info("ext4"));
    let (netns, pod) = pod(&host, "volumes");
    for round in 0..2 {
        // Two at once, which see one another's files.
        let first = format!("first-{round}");
        let script =
            "until test -e /data/answer; do busybox sleep 0.1; done; busybox rm /data/answer; busybox sync; exit 5";
        pod.run_with_root(&first, with_volume(script), &[("ext4", &whole, &[])]).unwrap();
        let second = format!("second-{round}");
        let other = ext4(&host.folder.join("other.ext4"), Some(&base));
        pod.run_with_root(&second, with_volume("echo x >/data/answer; echo more >>/data/f"), &[("ext4", &other, &[])])
            .unwrap();
        assert_eq!(pod.end_of(&second, true).unwrap(), 0);
        assert_eq!(pod.end_of(&first, true).unwrap(), 5);
        let_go(&host, |file| file.ends_with("volume.ext4"));
    }
    assert_eq!(tool("debugfs", &["-R", "cat /f", &disk]), "one\nmore\nmore\n");
    pod.stop().unwrap();
    pod.shutdown().unwrap();
    drop(netns);
    host.audit();
}

#[test]
fn a_guest_has_no_more_of_the_hosts_files_open_than_it_may() {
    let host = Host::new().set("virtiofsd.open_files", "400");
    let many = host.folder.join("many");
    std::fs::create_dir(&many).unwrap();
    (0..1000).for_each(|number| std::fs::write(many.join(format!("file-{number}")), "x").unwrap());
    let volume = format!("{}:/many", many.display());
    let (image, script) = (host.image(), "exec sleep 100000");
    let words = ["run", "--detach", "--name", "many", "--volume", &volume, &image, "sh", "-c", script];
    assert_eq!(host.coracle_outcome(&words).code, 0);
    // Each file that a guest knows is one that virtiofsd has open. The first list may be had from the folder alone.
    let list = "ls -l /many >/dev/null 2>&1; ls -l /many 2>&1 >/dev/null | grep -c 'open files'; true";
    let told = host.coracle_outcome(&["exec", "many", "sh", "-c", list]);
    let refused: u32 = told.line().parse().unwrap_or_default();
    assert!(refused > 400, "a thousand files with four hundred open ones: {told:?}");
    for pid in host.processes("virtiofsd") {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        assert!(open <= 400, "{pid} has {open} files open");
    }
    // What needs no more of them goes on, and all of it goes away.
    assert_eq!(host.coracle_outcome(&["exec", "many", "test", "-d", "/proc/1"]).code, 0);
    assert_eq!(host.coracle_outcome(&["rm", "--force", "many"]).code, 0);
    host.audit();
}

/// What `coracle volume` says of a volume, in a pod of its own, and gives it.
fn is_told_and_grows(
    host: &Host,
    source: &Path,
    with_volume: &dyn Fn(&str) -> serde_json::Value,
    whole: &str,
    disk: &str,
) {
    let path = source.display().to_string();
    let stats = || {
        let said = host.coracle_outcome(&["volume", "stats", &path, "--json"]);
        assert_eq!(said.code, 0, "{said:?}");
        serde_json::from_str::<serde_json::Value>(&said.stdout).unwrap()["usage"].clone()
    };
    let before = host.coracle_outcome(&["volume", "stats", &path]);
    assert!(before.code == 125 && before.stderr.contains("no pod"), "{before:?}");
    let script = "until test -e /data/end; do busybox sleep 0.1; done; exit 4";
    let shim = Shim::start(host, "told", with_volume(script).to_string().as_bytes());
    shim.create_with_root("told", &[("ext4", whole, &[])]).unwrap();
    shim.start_process("").unwrap();
    let first = stats();
    let bytes = |usage: &serde_json::Value| usage[0]["total"].as_u64().unwrap();
    assert!(first[0]["unit"] == "bytes" && (50 << 20..64 << 20).contains(&bytes(&first)), "{first}");
    assert!(first[1]["unit"] == "inodes" && first[1]["used"].as_u64().unwrap() > 0, "{first}");
    let people = host.coracle_outcome(&["volume", "stats", &path]).stdout;
    assert!(people.contains("available") && people.contains(&bytes(&first).to_string()), "{people}");
    let resized = host.coracle_outcome(&["volume", "resize", &path, "160M"]);
    assert_eq!(resized.code, 0, "{resized:?}");
    assert_eq!(std::fs::metadata(disk).unwrap().len(), 160 << 20);
    assert!(bytes(&stats()) > 140 << 20, "{}", stats());
    let smaller = host.coracle_outcome(&["volume", "resize", &path, "8M"]);
    assert!(smaller.code == 125 && smaller.stderr.contains("would lose"), "{smaller:?}");
    let process = serde_json::json!({ "args": ["/bin/busybox", "touch", "/data/end"], "cwd": "/", "user": { "uid": 0, "gid": 0 },
        "env": ["PATH=/bin"] });
    shim.exec("end", &process).unwrap();
    shim.start_process("end").unwrap();
    assert_eq!((shim.wait("end").unwrap(), shim.wait("").unwrap()), (0, 4));
    shim.delete().unwrap();
    shim.finish();
    let _ = tool("e2fsck", &["-f", "-n", disk]);
}

/// Writes a volume as Kubernetes' atomic writer does.
fn write_whole(volume: &Path, version: &str, key: &str, value: &str) {
    let fresh = volume.join(format!("..{version}"));
    std::fs::create_dir_all(&fresh).unwrap();
    std::fs::write(fresh.join(key), value).unwrap();
    std::os::unix::fs::symlink(format!("..{version}"), volume.join("..tmp")).unwrap();
    std::fs::rename(volume.join("..tmp"), volume.join("..data")).unwrap();
    let _ = std::os::unix::fs::symlink(format!("..data/{key}"), volume.join(key));
}

#[test]
fn a_container_that_shares_nothing_has_copies_that_follow_and_its_last_words_come_back() {
    let host = Host::with_own_network().set("storage.shared_fs", "\"none\"");
    let volumes = host.folder.join("pod/volumes");
    let map = volumes.join("kubernetes.io~configmap/map");
    write_whole(&map, "1", "key", "one\n");
    let empty = volumes.join("kubernetes.io~empty-dir/empty");
    std::fs::create_dir_all(&empty).unwrap();
    let (hosts, words) = (host.folder.join("hosts"), host.folder.join("words"));
    std::fs::write(&hosts, "10.1.1.1 somewhere\n").unwrap();
    std::fs::write(&words, "").unwrap();
    let with = |script: &str, mounts: &[(&str, &Path)]| {
        let mut config = config_with(script, mounts);
        config["annotations"] = serde_json::json!({ "io.kubernetes.container.terminationMessagePath": "/last" });
        config
    };
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let script = "busybox grep -q somewhere /etc/hosts || exit 11; busybox grep -q ' /empty tmpfs ' /proc/mounts || exit 12; \
        echo x >/empty/f || exit 13; busybox grep -q one /map/key || exit 14; \
        busybox touch /empty/ready; until busybox grep -q two /map/key; do busybox sleep 0.1; done; echo these >/last; exit 7";
    let mounts: [(&str, &Path); 4] = [("/etc/hosts", &hosts), ("/last", &words), ("/map", &map), ("/empty", &empty)];
    let shim = Shim::start(&host, "none", with(script, &mounts).to_string().as_bytes());
    shim.create_with_root("none", &[("ext4", &whole, &[])]).unwrap();
    assert!(host.processes("virtiofsd").is_empty(), "nothing is shared");
    shim.start_process("").unwrap();
    let process = serde_json::json!({ "args": ["/bin/busybox", "sh", "-c", "until [ -e /empty/ready ]; do busybox sleep 0.1; done"],
        "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"] });
    shim.exec("ready", &process).unwrap();
    shim.start_process("ready").unwrap();
    assert_eq!(shim.wait("ready").unwrap(), 0);
    write_whole(&map, "2", "key", "two\n");
    assert_eq!(shim.wait("").unwrap(), 7);
    assert_eq!(std::fs::read_to_string(&words).unwrap(), "these\n", "the last words are the host's");
    shim.delete().unwrap();
    shim.finish();
    assert_eq!(std::fs::read_dir(&empty).unwrap().count(), 0, "what is the guest's stays there");
    // A folder that both would see is refused by name.
    let shim = Shim::start(&host, "folder", with("exit 0", &[("/data", &host.folder)]).to_string().as_bytes());
    let (code, text) = shim.create_with_root("folder", &[("ext4", &whole, &[])]).unwrap_err();
    assert!(
        code == Code::UNIMPLEMENTED && text.contains("/data") && text.contains("storage.shared_fs"),
        "{code:?} {text}"
    );
    shim.finish();
    host.audit();
}

/// Runs a container with these mounts to its end, each in a pod of its own: its exit code.
fn run(host: &Host, id: &str, config: &serde_json::Value, root: &str) -> u32 {
    let shim = Shim::start(host, id, config.to_string().as_bytes());
    shim.create_with_root(id, &[("ext4", root, &[])]).unwrap();
    end(shim)
}

/// What a file takes of the host's disk, in MiB.
fn taken_mib(file: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    (std::fs::metadata(file).unwrap().blocks() * 512) >> 20
}

#[test]
fn an_empty_dir_on_a_disk_is_the_pods_and_what_is_freed_is_the_hosts_again() {
    use std::os::unix::fs::PermissionsExt;
    let host = Host::with_own_network().set("storage.empty_dir", "\"disk\"").set("storage.empty_dir_mib", "128");
    let volume = host.folder.join("pod/volumes/kubernetes.io~empty-dir/cache");
    std::fs::create_dir_all(volume.join("part")).unwrap();
    // As kubelet makes it for a pod with a group.
    std::os::unix::fs::chown(&volume, None, Some(2000)).unwrap();
    std::fs::set_permissions(&volume, std::fs::Permissions::from_mode(0o2777)).unwrap();
    std::fs::set_permissions(volume.join("part"), std::fs::Permissions::from_mode(0o700)).unwrap();
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let data: [(&str, &Path); 1] = [("/data", &volume)];
    let disk = volume.join("coracle.ext4");

    let script = "test \"$(busybox stat -c '%a %g' /data)\" = '2777 2000' || exit 11; test -z \"$(busybox ls -A /data)\" || exit 12; \
        busybox grep -q ' /data ext4 .*discard' /proc/mounts || exit 13; busybox dd if=/dev/urandom of=/data/big bs=1M count=64 2>/dev/null || exit 14; \
        busybox chmod 700 /data; exit 5";
    assert_eq!(run(&host, "first", &config_with(script, &data), &whole), 5);
    assert!(host.processes("virtiofsd").is_empty());
    let full = taken_mib(&disk);
    assert!((64..80).contains(&full), "{full} MiB are taken by 64");

    // What is more than it has is an error in the guest, and what is freed goes back while the pod lives.
    let script = "test \"$(busybox stat -c %a /data)\" = 700 || exit 21; busybox dd if=/dev/zero of=/data/more bs=1M count=100 2>/dev/null && exit 22; \
        busybox rm /data/more /data/big; busybox sync; echo x >/data/f; exit 6";
    assert_eq!(run(&host, "second", &config_with(script, &data), &whole), 6);
    let left = taken_mib(&disk);
    assert!(left < 16, "{left} MiB are taken by nothing");

    // A machine that is killed leaves a file system that the next one goes on with.
    let shim = Shim::start(
        &host,
        "crash",
        config_with(
            "echo kept >/data/kept; busybox sync; busybox touch /data/ready; \
        while :; do echo x >>/data/log; done",
            &data,
        )
        .to_string()
        .as_bytes(),
    );
    shim.create_with_root("crash", &[("ext4", &whole, &[])]).unwrap();
    shim.start_process("").unwrap();
    let process = serde_json::json!({ "args": ["/bin/busybox", "sh", "-c", "until [ -e /data/ready ]; do busybox sleep 0.1; done"],
        "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"] });
    shim.exec("ready", &process).unwrap();
    shim.start_process("ready").unwrap();
    assert_eq!(shim.wait("ready").unwrap(), 0);
    host.kill(monitor());
    assert_eq!(shim.wait("").unwrap(), 137);
    shim.delete().unwrap();
    shim.finish();
    let script = "test \"$(busybox cat /data/kept)\" = kept && test \"$(busybox cat /data/f)\" = x";
    assert_eq!(run(&host, "after", &config_with(script, &data), &whole), 0);

    // A part of it, as kubelet hands it over.
    let part = host.folder.join("pod/volume-subpaths/cache/app/0");
    let bound = HostMount::new(&["--bind", volume.join("part").to_str().unwrap()], &part);
    let script = "test \"$(busybox stat -c %a /data)\" = 700 || exit 31; echo inner >/data/g; test ! -e /data/f";
    assert_eq!(run(&host, "part", &config_with(script, &[("/data", &part)]), &whole), 0);
    drop(bound);
    // Two containers of one pod at once.
    let (netns, pod) = pod(&host, "dirs");
    let other = ext4(&host.folder.join("other.ext4"), Some(&base));
    let script = "until test -e /data/answer; do busybox sleep 0.1; done; busybox cat /data/part/g";
    pod.run_with_root("one", config_with(script, &data), &[("ext4", &whole, &[])]).unwrap();
    pod.run_with_root("two", config_with("echo x >/data/answer", &data), &[("ext4", &other, &[])]).unwrap();
    assert_eq!(pod.end_of("two", true).unwrap(), 0);
    assert_eq!(pod.end_of("one", true).unwrap(), 0);
    let_go(&host, |file| file.ends_with("coracle.ext4"));
    pod.stop().unwrap();
    pod.shutdown().unwrap();
    drop(netns);
    let files: Vec<_> = std::fs::read_dir(&volume).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(files.len(), 2, "the disk and the folder that was there, in {files:?}");
    host.audit();
}

#[test]
fn a_volume_of_huge_pages_is_of_the_guests() {
    let host = Host::with_own_network();
    let volume = host.folder.join("pod/volumes/kubernetes.io~empty-dir/huge");
    // As kubelet mounts it: without a size.
    let mounted = HostMount::new(&["-t", "hugetlbfs", "-o", "pagesize=2M,mode=770", "none"], &volume);
    let base = host.folder.join("base");
    busybox_folder(&base);
    let whole = ext4(&host.folder.join("whole.ext4"), Some(&base));
    let with_limit = |script: &str, limit: u64| {
        let mut config = config_with(script, &[("/data", &volume)]);
        config["linux"]["resources"] = serde_json::json!({ "memory": { "limit": 64 << 20 },
            "hugepageLimits": [{ "pageSize": "2MB", "limit": limit }] });
        config
    };
    let script = "busybox grep -q ' /data hugetlbfs .*pagesize=2M' /proc/mounts || exit 11; \
        test \"$(busybox stat -c %a /data)\" = 770 || exit 12; busybox grep -q 'HugePages_Total: *4$' /proc/meminfo || exit 13; \
        busybox fallocate -l 8388608 /data/f || exit 14; busybox fallocate -l 2097152 /data/g && exit 15; exit 7";
    assert_eq!(run(&host, "huge", &with_limit(script, 8 << 20), &whole), 7);
    // Of which nobody knows how much it may take.
    let shim = Shim::start(&host, "endless", with_limit("exit 0", 0).to_string().as_bytes());
    let (code, text) = shim.create_with_root("endless", &[("ext4", &whole, &[])]).unwrap_err();
    assert!(code == Code::INVALID_ARGUMENT && text.contains("has no limit of those"), "{code:?} {text}");
    shim.finish();
    drop(mounted);
    // More than the guest has.
    let large = HostMount::new(&["-t", "hugetlbfs", "-o", "pagesize=2M,size=64G", "none"], &volume);
    let shim = Shim::start(&host, "large", with_limit("exit 0", 8 << 20).to_string().as_bytes());
    let (code, text) = shim.create_with_root("large", &[("ext4", &whole, &[])]).unwrap_err();
    assert!(code == Code::FAILED_PRECONDITION && text.contains("pages of 2097152 bytes"), "{code:?} {text}");
    shim.finish();
    drop(large);
    host.audit();
}

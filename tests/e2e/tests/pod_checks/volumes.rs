//! Volumes as kubelet makes them: what it writes as a whole, memory, parts of volumes, and block devices.

use std::path::{Path, PathBuf};
use std::process::Command;

use coracle_e2e::bundles::HostMount;
use coracle_e2e::cri::msg;

use crate::{Bench, Check, holds, same, security};

/// What has to be there before the pod, as kubelet has it: memory, mounted, and what is to go before it.
pub(crate) struct Prepared {
    _part: HostMount,
    _memory: HostMount,
}

impl Prepared {
    pub(crate) fn new(folder: &Path) -> Self {
        let memory = folder.join("volumes/kubernetes.io~empty-dir/memory");
        let mounted = HostMount::new(&["-t", "tmpfs", "-o", "size=2m,mode=1777", "tmpfs"], &memory);
        // A part of it, as kubelet hands it over.
        let (inner, part) = (memory.join("a part"), folder.join("volume-subpaths/memory/app/0"));
        std::fs::create_dir_all(&inner).unwrap();
        let part = HostMount::new(&["--bind", inner.to_str().unwrap()], &part);
        Self { _part: part, _memory: mounted }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn mounted(path: &Path) -> msg::Mount {
    msg::Mount { container_path: "/data".into(), host_path: path.display().to_string(), ..Default::default() }
}

/// Writes a volume as Kubernetes' atomic writer does: a new folder, then the link to it, then what was before goes.
fn write_whole(volume: &Path, version: &str, files: &[(String, Vec<u8>)]) -> std::io::Result<()> {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};
    let fresh = volume.join(format!("..{version}"));
    std::fs::create_dir_all(&fresh)?;
    for (name, bytes) in files {
        let path = fresh.join(name);
        std::fs::create_dir_all(path.parent().unwrap())?;
        std::fs::write(&path, bytes)?;
        chown(&path, None, Some(2000))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o440))?;
    }
    let before = std::fs::read_link(volume.join("..data")).ok();
    symlink(fresh.file_name().unwrap(), volume.join("..data_tmp"))?;
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    let top = |name: &str| name.split('/').next().unwrap_or_default().to_owned();
    for (name, _) in files {
        // One that is there already leads to the new one by itself.
        let _ = symlink(format!("..data/{}", top(name)), volume.join(top(name)));
    }
    for entry in std::fs::read_dir(volume)?.flatten() {
        if entry.path().is_symlink() && !entry.path().exists() {
            std::fs::remove_file(entry.path())?;
        }
    }
    before.map_or(Ok(()), |before| std::fs::remove_dir_all(volume.join(before)))
}

fn key(name: &str, value: &str) -> (String, Vec<u8>) {
    (name.into(), value.into())
}

/// A volume of a kind of Kubernetes', with these files.
fn whole(b: &Bench<'_>, kind: &str, name: &str, files: &[(String, Vec<u8>)]) -> Result<PathBuf, String> {
    let volume = b.folder.join(format!("volumes/kubernetes.io~{kind}")).join(name);
    std::fs::create_dir_all(&volume).and_then(|()| write_whole(&volume, "1", files)).map_err(text)?;
    Ok(volume)
}

/// A disk of the host, which goes with this.
struct Loop(String);

impl Loop {
    fn new(b: &Bench<'_>, name: &str) -> Result<Self, String> {
        let file = b.folder.join(name);
        std::fs::write(&file, vec![b'.'; 1 << 20]).map_err(text)?;
        let made = Command::new("losetup").args(["--find", "--show"]).arg(&file).output().map_err(text)?;
        let device = String::from_utf8_lossy(&made.stdout).trim().to_owned();
        if device.is_empty() { Err(String::from_utf8_lossy(&made.stderr).into_owned()) } else { Ok(Self(device)) }
    }

    fn device(&self, permissions: &str) -> msg::Device {
        msg::Device {
            container_path: "/dev/xvda".into(),
            host_path: self.0.clone(),
            permissions: permissions.into(),
            ..Default::default()
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

pub(crate) const CHECKS: &[Check] = &[
    ("a_change_of_a_config_map_is_heard_and_seen_whole", |b| {
        let volume = whole(b, "configmap", "heard", &[key("a", "one\n"), key("gone", "x")])?;
        // What is read through one folder is of one version.
        let script = "cat /data/a; guest-probe watch /data ..data; while [ -L /data/gone ]; do sleep 0.05; done; cat /data/a /data/b; ls /data; ls -a /data | wc -l";
        let id = b
            .pod
            .start("heard", &["sh", "-c", script], |config| config.mounts.push(mounted(&volume)))
            .map_err(|e| e.1)?;
        b.pod.await_log("heard", "watching");
        write_whole(&volume, "2", &[key("a", "two\n"), key("b", "new\n")]).map_err(text)?;
        same(b.cri.ended(&id).exit_code, 0)?;
        let log = b.pod.await_log("heard", "\n6\n");
        same(log, "one\nwatching\n..data\ntwo\nnew\na\nb\n6\n".into())
    }),
    ("many_changes_of_a_secret_end_with_the_last", |b| {
        let volume = whole(b, "secret", "many", &[key("n", "1\n")])?;
        let script = "echo reads; until grep -q 30 /data/n; do cat /data/n >/dev/null || exit 7; done; cat /data/n";
        let id = b
            .pod
            .start("many", &["sh", "-c", script], |config| config.mounts.push(mounted(&volume)))
            .map_err(|e| e.1)?;
        b.pod.await_log("many", "reads");
        for version in 2..=30 {
            write_whole(&volume, &version.to_string(), &[key("n", &format!("{version}\n"))]).map_err(text)?;
        }
        same(b.cri.ended(&id).exit_code, 0)?;
        holds(&b.pod.await_log("many", "30"), "30\n")
    }),
    ("a_projected_volume_of_two_hundred_files_and_four_megabytes", |b| {
        let files: Vec<_> = (0..200)
            .map(|number: u8| (format!("deep/{number}"), vec![number; 20 << 10]))
            .chain([key("top", "t")])
            .collect();
        let volume = whole(b, "projected", "large", &files)?;
        let script = "cat /data/deep/* | wc -c; stat -L -c '%a %u %g' /data/deep/7; cat /data/deep/* | md5sum";
        let output = b.printed("large", script, |config| config.mounts.push(mounted(&volume)))?;
        holds(&output, "4096000\n440 0 2000\n")?;
        // The same, read here.
        let sum = Command::new("sh").args(["-c", "cat deep/* | md5sum"]).current_dir(&volume).output().map_err(text)?;
        holds(&output, &String::from_utf8_lossy(&sum.stdout))
    }),
    ("two_containers_share_a_config_map", |b| {
        let volume = whole(b, "configmap", "two", &[key("a", "one\n")])?;
        let first = b.printed("map-one", "cat /data/a", |config| config.mounts.push(mounted(&volume)))?;
        write_whole(&volume, "2", &[key("a", "two\n")]).map_err(text)?;
        // Where the guest has a copy it follows by itself.
        let script = "until grep -q two /data/a; do sleep 0.05; done; cat /data/a";
        let second = b.printed("map-two", script, |config| config.mounts.push(mounted(&volume)))?;
        same((first.as_str(), second.as_str()), ("one\n", "two\n"))
    }),
    ("a_config_map_can_not_be_written_to_where_it_is_read_only", |b| {
        let volume = whole(b, "configmap", "ro", &[key("a", "one\n")])?;
        let readonly = msg::Mount { readonly: true, ..mounted(&volume) };
        let (_, output) = b.run("map-ro", "(echo x >/data/new) 2>&1", |config| config.mounts.push(readonly))?;
        holds(&output, "Read-only file system")
    }),
    ("one_file_of_a_volume_by_sub_path", |b| {
        let volume = whole(b, "configmap", "part", &[key("a", "one\n"), key("b", "two\n")])?;
        // As kubelet does it: it resolves the path, and hands over the file itself.
        let file = volume.join("..data/b").canonicalize().map_err(text)?;
        let mount = msg::Mount { container_path: "/etc/app.conf".into(), ..mounted(&file) };
        same(b.printed("sub-file", "cat /etc/app.conf", |config| config.mounts.push(mount))?, "two\n".into())
    }),
    ("one_folder_of_a_volume_by_sub_path", |b| {
        let volume = b.folder.join("volumes/kubernetes.io~empty-dir/files");
        std::fs::create_dir_all(volume.join("inner")).map_err(text)?;
        std::fs::write(volume.join("outer"), "x").map_err(text)?;
        let script = "echo y >/data/f; ls /data; ls /data/.. | grep -c outer; true";
        let output = b.printed("sub-folder", script, |config| config.mounts.push(mounted(&volume.join("inner"))))?;
        same(output, "f\n0\n".into())?;
        same(std::fs::read_to_string(volume.join("inner/f")).map_err(text)?, "y\n".into())
    }),
    ("memory_has_its_size_and_is_full_at_it", |b| {
        let memory = b.folder.join("volumes/kubernetes.io~empty-dir/memory");
        let script = "grep ' /data ' /proc/mounts | cut -d' ' -f3; stat -c %a /data; df -k /data | tail -1 | tr -s ' ' | cut -d' ' -f2; \
            dd if=/dev/zero of=/data/big bs=64k count=40 2>&1 | grep -o 'No space left'; rm /data/big; echo kept >/data/f";
        same(
            b.printed("mem-volume", script, |config| config.mounts.push(mounted(&memory)))?,
            "tmpfs\n1777\n2048\nNo space left\n".into(),
        )?;
        // It is the pod's: the next container has what the one before has left.
        same(
            b.printed("mem-volume-again", "cat /data/f", |config| config.mounts.push(mounted(&memory)))?,
            "kept\n".into(),
        )
    }),
    ("a_part_of_memory_by_sub_path_is_the_same_memory", |b| {
        let (whole, part) =
            (b.folder.join("volumes/kubernetes.io~empty-dir/memory"), b.folder.join("volume-subpaths/memory/app/0"));
        let script = "echo inner >/data/f; ls /data";
        same(b.printed("mem-part", script, |config| config.mounts.push(mounted(&part)))?, "f\n".into())?;
        same(
            b.printed("mem-all", "cat '/data/a part/f'", |config| config.mounts.push(mounted(&whole)))?,
            "inner\n".into(),
        )
    }),
    ("a_block_device_is_the_containers_to_read_and_write", |b| {
        for round in 0..2 {
            let disk = Loop::new(b, "raw-disk")?;
            let script = "stat -c %F /dev/xvda; dd if=/dev/xvda bs=16 count=1 2>/dev/null | tr . x; echo; \
                printf changed | dd of=/dev/xvda bs=1 seek=512 conv=notrunc,fsync 2>/dev/null";
            let output =
                b.printed(&format!("block-{round}"), script, |config| config.devices.push(disk.device("rwm")))?;
            same(output, format!("block special file\n{}\n", "x".repeat(16)))?;
            let bytes = std::fs::read(&disk.0).map_err(text)?;
            same(&bytes[512..519], &b"changed"[..])?;
        }
        Ok(())
    }),
    ("a_block_device_that_may_be_read_is_not_written_to", |b| {
        let disk = Loop::new(b, "read-disk")?;
        let script = "dd if=/dev/xvda bs=4 count=1 2>/dev/null; echo; (printf x | dd of=/dev/xvda bs=1 conv=notrunc,fsync) 2>&1; true";
        let output = b.printed("block-ro", script, |config| config.devices.push(disk.device("r")))?;
        holds(&output, "....\n")?;
        holds(&output, "not permitted")
    }),
    ("three_block_devices_come_and_go_three_times", |b| {
        let disks: Vec<Loop> =
            (0..3).map(|number| Loop::new(b, &format!("disk-{number}"))).collect::<Result<_, _>>()?;
        let devices = disks
            .iter()
            .enumerate()
            .map(|(number, disk)| msg::Device { container_path: format!("/dev/disk{number}"), ..disk.device("rwm") });
        let devices: Vec<_> = devices.collect();
        let script = "for d in /dev/disk*; do dd if=$d bs=1 count=1 2>/dev/null; done; echo";
        for round in 0..3 {
            let devices = devices.clone();
            same(b.printed(&format!("blocks-{round}"), script, |config| config.devices = devices)?, "...\n".into())?;
        }
        Ok(())
    }),
    ("a_device_of_dev_is_there_by_its_number", |b| {
        let node = msg::Mount { container_path: "/data".into(), host_path: "/dev/kmsg".into(), ..Default::default() };
        // As kubelet mounts a hostPath: the machine has one of its own.
        let script =
            "stat -c '%F %t:%T' /data; grep ' /data ' /proc/self/mountinfo | grep -o ' /kmsg /data .* devtmpfs'";
        let output = b.printed("kmsg", script, |config| config.mounts.push(node))?;
        holds(&output, "character special file 1:b\n /kmsg /data ")
    }),
    ("a_block_device_by_a_mount_has_a_file_system_made_on_it", |b| {
        let disk = Loop::new(b, "mounted-disk")?;
        let mount = msg::Mount { container_path: "/data".into(), host_path: disk.0.clone(), ..Default::default() };
        let script = "stat -c %F /data; (ln -s /data /disk && busybox mke2fs -F /disk >/dev/null && mkdir /m && mount -t ext4 /disk /m && echo kept >/m/f && \
            umount /m && mount -t ext4 -o ro /disk /m && cat /m/f; umount /m) 2>&1";
        let output = b.printed("mount-block", script, |config| {
            security(config).privileged = true;
            config.mounts.push(mount);
        })?;
        same(output, "block special file\nkept\n".into())
    }),
    ("a_block_device_is_its_containers_alone", |b| {
        let (own, other) = (Loop::new(b, "own-disk")?, Loop::new(b, "other-disk")?);
        let id = b.pod.start("other-block", &["sleep", "1000"], |config| config.devices.push(other.device("rwm")));
        let id = id.map_err(|e| e.1)?;
        // Whatever number it may have, there is one that opens.
        let script = "m=$((0x$(stat -c %t /dev/xvda))); c=0; \
            for n in $( (echo $((0x$(stat -c %T /dev/xvda))); seq 0 7; seq 16 16 240) | sort -un); do busybox mknod /dev/n$n b $m $n; \
            dd if=/dev/n$n of=/dev/null bs=1 count=1 2>/dev/null && c=$((c+1)); done; echo $c";
        let output = b.printed("own-block", script, |config| config.devices.push(own.device("rwm")));
        b.cri.remove(&id).map_err(|e| e.1)?;
        same(output?, "1\n".into())
    }),
    ("a_socket_in_a_volume_joins_two_containers", |b| {
        for (word, volume) in [
            ("memory", b.folder.join("volumes/kubernetes.io~empty-dir/memory")),
            ("folder", b.folder.join("volumes/kubernetes.io~empty-dir/sockets")),
        ] {
            std::fs::create_dir_all(&volume).map_err(text)?;
            let name = format!("uds-{word}");
            let command = ["guest-probe", "unix", "serve", "/data/socket"];
            let id = b.pod.start(&name, &command, |config| config.mounts.push(mounted(&volume))).map_err(|e| e.1)?;
            b.pod.await_log(&name, "serves");
            let ask = "guest-probe unix ask /data/socket; rm /data/socket";
            let output = b.printed(&format!("ask-{word}"), ask, |config| config.mounts.push(mounted(&volume)))?;
            same((word, output.as_str()), (word, "heard a word\n"))?;
            same(b.cri.ended(&id).exit_code, 0)?;
            b.cri.remove(&id).map_err(|e| e.1)?;
        }
        Ok(())
    }),
];

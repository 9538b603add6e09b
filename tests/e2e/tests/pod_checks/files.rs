//! Root file system, volumes, devices.

use coracle_e2e::cri::msg;

use crate::{Bench, Check, holds, same, security};

/// A folder of the host for a check, and the mount that shows it at `/data`.
fn volume(b: &Bench<'_>, name: &str) -> Result<(std::path::PathBuf, msg::Mount), String> {
    let folder = b.folder.join(format!("volume-{name}"));
    std::fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
    let mount =
        msg::Mount { container_path: "/data".into(), host_path: folder.display().to_string(), ..Default::default() };
    Ok((folder, mount))
}

fn write(path: &std::path::Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(|error| error.to_string())
}

pub(crate) const CHECKS: &[Check] = &[
    ("the_usual_devices_are_there", |b| {
        let script = "for d in null zero full random urandom tty; do [ -c /dev/$d ] || echo no $d; done; \
            for l in fd stdin stdout stderr ptmx; do [ -L /dev/$l ] || echo no $l; done; echo x >/dev/null; head -c 4 /dev/zero | wc -c";
        same(b.printed("devices", script, |_| {})?, "4\n".into())
    }),
    ("a_full_device_is_full", |b| holds(&b.exec("echo x >/dev/full")?.2, "No space left")),
    ("standard_output_can_be_opened_again", |b| {
        same(b.printed("reopen", "echo again >/dev/stdout", |_| {})?, "again\n".into())
    }),
    ("random_bytes_differ", |b| {
        same(b.exec("[ $(head -c 16 /dev/urandom | md5sum | head -c 32) != $(head -c 16 /dev/urandom | md5sum | head -c 32) ]")?.0, 0)
    }),
    ("other_devices_are_closed", |b| {
        // The control of loop devices: its node may be made, and not opened.
        let script = "busybox mknod /tmp/loop c 10 237; (true <>/tmp/loop) 2>&1; true";
        let output = b.printed("closed", script, |_| {})?;
        // The file system that the node is on may know no devices at all.
        if output.contains("not permitted") || output.contains("denied") { Ok(()) } else { Err(output) }
    }),
    ("proc_is_the_containers", |b| {
        holds(&b.printed("proc", "mount | grep ' /proc '", |_| {})?, "proc on /proc type proc")
    }),
    ("sys_is_read_only", |b| holds(&b.printed("sys", "mount | grep ' /sys '", |_| {})?, "ro,")),
    ("shared_memory_is_a_file_system", |b| holds(&b.exec("mount | grep ' /dev/shm '")?.1, "/dev/shm")),
    ("the_root_can_be_written", |b| same(b.printed("root-rw", "echo x >/new; cat /new", |_| {})?, "x\n".into())),
    ("changes_to_the_root_are_the_containers_own", |b| {
        same(b.run("change", "echo x >/only-here", |_| {})?.0, 0)?;
        same(b.run("no-change", "test ! -e /only-here", |_| {})?.0, 0)
    }),
    ("a_file_of_the_image_may_be_removed", |b| {
        same(b.run("remove-file", "rm /etc/not-a-program && test ! -e /etc/not-a-program", |_| {})?.0, 0)
    }),
    ("a_folder_may_be_renamed", |b| {
        same(b.run("rename", "mkdir /d && touch /d/f && busybox mv /d /e && test -f /e/f", |_| {})?.0, 0)
    }),
    ("ten_megabytes_keep_their_sum", |b| {
        let (folder, mount) = volume(b, "sum")?;
        let script = "head -c 10000000 /dev/urandom >/data/big; sha256sum </data/big";
        let inside = b.printed("sum", script, |config| config.mounts.push(mount))?;
        let bytes = std::fs::read(folder.join("big")).map_err(|error| error.to_string())?;
        let digest = sha2_hex(&bytes);
        holds(&inside, &digest)
    }),
    ("owner_and_mode_are_kept_in_a_volume", |b| {
        let (folder, mount) = volume(b, "owner")?;
        let script =
            "touch /data/f && busybox chown 1234:567 /data/f && chmod 4750 /data/f && stat -c '%a %u %g' /data/f";
        let inside = b.printed("owner", script, |config| config.mounts.push(mount))?;
        let metadata = std::fs::metadata(folder.join("f")).map_err(|error| error.to_string())?;
        use std::os::unix::fs::MetadataExt;
        same((inside.as_str(), metadata.uid(), metadata.gid()), ("4750 1234 567\n", 1234, 567))
    }),
    ("links_in_a_volume", |b| {
        let (folder, mount) = volume(b, "links")?;
        let script = "echo x >/data/a; busybox ln /data/a /data/hard; busybox ln -s a /data/soft; echo y >>/data/soft; cat /data/hard; stat -c %h /data/a";
        same(b.printed("links", script, |config| config.mounts.push(mount))?, "x\ny\n2\n".into())?;
        same(std::fs::read_link(folder.join("soft")).unwrap_or_default().display().to_string(), "a".into())
    }),
    ("a_link_out_of_a_volume_leads_nowhere_else", |b| {
        let (folder, mount) = volume(b, "escape")?;
        let secret = b.folder.join("secret");
        write(&secret, "of the host\n")?;
        std::os::unix::fs::symlink(&secret, folder.join("out")).map_err(|error| error.to_string())?;
        let (code, output) = b.run("escape", "cat /data/out 2>&1", |config| config.mounts.push(mount))?;
        holds(&output, "No such file")?;
        same(code, 1)
    }),
    ("what_the_host_changes_is_seen", |b| {
        let (folder, mount) = volume(b, "seen")?;
        write(&folder.join("f"), "one\n")?;
        let script = "cat /data/f; echo ready; until [ -e /data/go ]; do sleep 0.05; done; cat /data/f";
        let id = b
            .pod
            .start("seen-change", &["sh", "-c", script], |config| config.mounts.push(mount))
            .map_err(|error| error.1)?;
        b.pod.await_log("seen-change", "ready");
        write(&folder.join("f"), "two\n")?;
        write(&folder.join("go"), "")?;
        same(b.cri.ended(&id).exit_code, 0)?;
        same(b.pod.await_log("seen-change", "two\n"), "one\nready\ntwo\n".into())
    }),
    ("a_folder_inside_a_volume_is_read_only_alone", |b| {
        let (folder, mount) = volume(b, "inner")?;
        let inner = folder.join("inner");
        std::fs::create_dir_all(&inner).map_err(|error| error.to_string())?;
        let readonly = msg::Mount {
            container_path: "/data/inner".into(),
            host_path: inner.display().to_string(),
            readonly: true,
            ..Default::default()
        };
        let script = "echo x >/data/ok && echo wrote; (echo x >/data/inner/no) 2>&1";
        let (_, output) = b.run("inner", script, |config| config.mounts.extend([mount, readonly]))?;
        holds(&output, "wrote")?;
        holds(&output, "Read-only file system")
    }),
    ("a_volume_is_writable_where_the_root_is_not", |b| {
        let (_, mount) = volume(b, "ro-root")?;
        let change = |config: &mut msg::ContainerConfig| {
            security(config).readonly_rootfs = true;
            config.mounts.push(mount);
        };
        same(b.run("ro-root", "echo x >/data/f && ! (echo x >/f) 2>/dev/null", change)?.0, 0)
    }),
    ("a_file_over_one_of_the_image", |b| {
        let path = b.folder.join("hosts-of-it");
        write(&path, "10.1.2.3 somewhere\n")?;
        let mount = msg::Mount {
            container_path: "/etc/hosts".into(),
            host_path: path.display().to_string(),
            ..Default::default()
        };
        same(b.printed("hosts", "cat /etc/hosts", |config| config.mounts.push(mount))?, "10.1.2.3 somewhere\n".into())
    }),
    ("one_volume_in_two_containers", |b| {
        let (_, mount) = volume(b, "two")?;
        let (first, second) = (mount.clone(), mount);
        let script =
            "until [ -e /data/question ]; do sleep 0.05; done; echo answer >/data/new; mv /data/new /data/answer";
        let one = b
            .pod
            .start("two-one", &["sh", "-c", script], |config| config.mounts.push(first))
            .map_err(|error| error.1)?;
        let script = "touch /data/question; until [ -e /data/answer ]; do sleep 0.05; done; cat /data/answer";
        let output = b.printed("two-two", script, |config| config.mounts.push(second))?;
        same(b.cri.ended(&one).exit_code, 0)?;
        same(output, "answer\n".into())
    }),
    ("fifty_volumes", |b| {
        let mut mounts = Vec::new();
        for number in 0..50 {
            let (folder, mount) = volume(b, &format!("fifty-{number}"))?;
            write(&folder.join("n"), &format!("{number}\n"))?;
            mounts.push(msg::Mount { container_path: format!("/v/{number}"), ..mount });
        }
        let output = b.printed("fifty", "cat /v/*/n | wc -l", |config| config.mounts = mounts)?;
        same(output.trim(), "50")
    }),
    ("a_space_in_a_volumes_path", |b| {
        let (folder, mount) = volume(b, "with space, and comma")?;
        write(&folder.join("f"), "found\n")?;
        let mount = msg::Mount { container_path: "/da ta,x".into(), ..mount };
        same(b.printed("space", "cat '/da ta,x/f'", |config| config.mounts.push(mount))?, "found\n".into())
    }),
    ("free_space_of_the_root_is_told", |b| same(b.exec("df / | tail -1 | wc -l")?.1.trim(), "1")),
    ("masked_folders_are_empty", |b| {
        let change =
            |config: &mut msg::ContainerConfig| security(config).masked_paths = vec!["/proc/bus".into(), "/etc".into()];
        same(b.printed("masked-folder", "ls /etc | wc -l", change)?.trim(), "0")
    }),
    ("a_volume_keeps_what_was_synced", |b| {
        let (folder, mount) = volume(b, "sync")?;
        let script = "dd if=/dev/zero of=/data/f bs=4096 count=10 conv=fsync 2>/dev/null && busybox sync";
        same(b.run("sync", script, |config| config.mounts.push(mount))?.0, 0)?;
        same(std::fs::metadata(folder.join("f")).map(|metadata| metadata.len()).unwrap_or(0), 40960)
    }),
    ("a_hole_in_a_file", |b| {
        let (folder, mount) = volume(b, "hole")?;
        let script = "busybox truncate -s 100M /data/f && stat -c %s /data/f";
        same(b.printed("hole", script, |config| config.mounts.push(mount))?, "104857600\n".into())?;
        use std::os::unix::fs::MetadataExt;
        let blocks = std::fs::metadata(folder.join("f")).map(|metadata| metadata.blocks()).unwrap_or(u64::MAX);
        if blocks < 1000 { Ok(()) } else { Err(format!("{blocks} blocks")) }
    }),
];

fn sha2_hex(bytes: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    hex::encode(Sha256::digest(bytes))
}

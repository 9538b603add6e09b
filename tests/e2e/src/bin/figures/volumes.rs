//! Volumes of each kind: written, read back (from the cache of whoever has one), and filled with small files; and what the host has again of memory that a guest has freed.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine;
use coracle_e2e::bundles::{HostMount, ext4, tool};
use coracle_e2e::{Containerd, Host, Running};
use serde_json::{Value, json};

use crate::taken::{REFERENCE, Series};

/// What is written and read in one go, in bytes; pages in no order; and small files.
const BYTES: usize = 64 << 20;
const READS: usize = 4096;
const WRITES: usize = 1024;
const FILES: usize = 10_000;

/// The volumes: by what runc's is, which is the same thing on the same disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A folder of the host's.
    Folder,
    /// A memory `emptyDir`.
    Memory,
    /// An `emptyDir` that is a disk of the guest's; runc's is a folder.
    EmptyDirDisk,
    /// A file system on a disk that the guest mounts; runc's is mounted by the host.
    Direct,
    /// A disk as it is, by a loop device.
    Raw,
}

const KINDS: [(&str, Kind); 5] = [
    ("folder", Kind::Folder),
    ("memory", Kind::Memory),
    ("empty_dir_disk", Kind::EmptyDirDisk),
    ("direct", Kind::Direct),
    ("raw_disk", Kind::Raw),
];

pub(crate) fn measure(rounds: usize) -> Value {
    let mut host = Host::with_own_network().set("storage.empty_dir_mib", "512");
    let direct = host.folder.join("direct");
    host = host.set("storage.direct_volumes", &format!("{:?}", direct.display().to_string()));
    let containerd = Containerd::start(&host);
    let mut series = Series::default();
    for round in 0..rounds {
        for (name, kind) in KINDS {
            let word = if kind == Kind::EmptyDirDisk { "\"disk\"" } else { "\"folder\"" };
            host = host.set("storage.empty_dir", word);
            for runtime in ["coracle", "runc"] {
                let volume = Volume::new(&host, &direct, kind, &format!("{name}-{runtime}-{round}"), runtime == "runc");
                let id = format!("v-{name}-{runtime}-{round}");
                let words = volume.run(runtime, &id);
                let command = containerd.command(&words.iter().map(String::as_str).collect::<Vec<_>>());
                let label = if runtime == "runc" { format!("{REFERENCE} {name}") } else { name.to_owned() };
                series.take(&label, &volume.steps(), command);
                volume.remove();
            }
        }
    }
    let returned = returned(&host);
    drop(containerd);
    host.audit();
    let bytes = |step: &str| matches!(step, "write" | "read_back").then_some(BYTES as u64);
    let reference = |kind: &str| format!("{REFERENCE} {}", kind.trim_start_matches("runc "));
    json!({
        "bytes": BYTES, "random_reads": READS, "random_writes": WRITES, "files": FILES,
        "kinds": series.report(bytes, reference),
        "memory_returned": returned,
    })
}

struct Volume {
    kind: Kind,
    folder: PathBuf,
    source: PathBuf,
    disk: Option<String>,
    mounted: Option<HostMount>,
}

impl Volume {
    fn new(host: &Host, direct: &Path, kind: Kind, name: &str, is_hosts: bool) -> Self {
        let folder = host.folder.join(name);
        let source = match kind {
            Kind::Memory | Kind::EmptyDirDisk => folder.join("volumes/kubernetes.io~empty-dir/v"),
            _ => folder.join("v"),
        };
        std::fs::create_dir_all(&source).expect("a folder");
        let mut volume = Self { kind, source, disk: None, mounted: None, folder };
        match kind {
            Kind::Folder | Kind::EmptyDirDisk => {}
            Kind::Memory => {
                volume.mounted = Some(HostMount::new(&["-t", "tmpfs", "-o", "size=256m", "none"], &volume.source))
            }
            Kind::Direct => {
                let file = ext4_of(&volume.folder.join("disk"));
                if is_hosts {
                    volume.mounted = Some(HostMount::new(&["-o", "loop", &file], &volume.source));
                } else {
                    let key = base64::engine::general_purpose::URL_SAFE.encode(volume.source.to_str().expect("a path"));
                    let info = json!({ "volume-type": "block", "device": file, "fstype": "ext4" });
                    std::fs::create_dir_all(direct.join(&key)).expect("a folder");
                    std::fs::write(direct.join(key).join("mountInfo.json"), info.to_string()).expect("a description");
                }
            }
            Kind::Raw => {
                let file = volume.folder.join("disk");
                std::fs::File::create(&file).and_then(|file| file.set_len(BYTES as u64)).expect("a file");
                let file = file.display().to_string();
                volume.disk = Some(tool("losetup", &["--find", "--show", &file]).trim().to_owned());
            }
        }
        volume
    }

    fn steps(&self) -> Vec<&'static str> {
        let mut steps = vec!["write", "read_back", "random_read_back", "random_write"];
        if self.kind != Kind::Raw {
            steps.push("files");
        }
        steps
    }

    fn script(&self) -> String {
        let place = self.disk.as_deref().unwrap_or("/data/big");
        let all = self.steps().into_iter().map(|step| match step {
            "write" => format!("guest-probe write {place} {BYTES}"),
            "read_back" => format!("guest-probe read {place} {BYTES}"),
            "random_read_back" => format!("guest-probe random {place} {READS}"),
            "random_write" => format!("guest-probe random-write {place} {WRITES}"),
            _ => format!("guest-probe files /data/many {FILES}"),
        });
        ["echo 0".to_owned()].into_iter().chain(all).collect::<Vec<_>>().join(" && ")
    }

    fn run(&self, runtime: &str, id: &str) -> Vec<String> {
        let runtime = format!("io.containerd.{runtime}.v2");
        let what = match &self.disk {
            Some(disk) => ["--device".to_owned(), disk.clone()],
            None => {
                ["--mount".to_owned(), format!("type=bind,src={},dst=/data,options=rbind:rw", self.source.display())]
            }
        };
        let words = ["run", "--rm", "--runtime", &runtime].map(str::to_owned).into_iter().chain(what);
        words.chain(["test:latest", id, "sh", "-c", &self.script()].map(str::to_owned)).collect()
    }

    fn remove(self) {
        if let Some(disk) = &self.disk {
            let _ = Command::new("losetup").args(["--detach", disk]).status();
        }
        drop(self.mounted);
        std::fs::remove_dir_all(&self.folder).expect("the volume's folder");
    }
}

/// An empty file system of 512 MiB.
fn ext4_of(file: &Path) -> String {
    let text = ext4(file, None);
    std::fs::File::options().write(true).open(file).and_then(|file| file.set_len(512 << 20)).expect("a larger file");
    let _ = tool("resize2fs", &["-f", &text]);
    text
}

/// The size of what the guest's memory holds and then frees, in bytes.
const HELD: u64 = 1 << 30;

/// What the machine of a pod takes on the host, in KiB: before, while it holds a gibibyte, and after that was freed.
fn returned(host: &Host) -> Value {
    // What a program holds, which has read it all: busybox' tail keeps it.
    let script = format!(
        "exec 3>&1; echo before; read x; (dd if=/dev/zero bs=1M count={} 2>/dev/null; echo held >&3; read x) | tail -c {HELD} >/dev/null; \
         echo freed; read x",
        HELD >> 20
    );
    let options = ["--memory", "1600m", "--interactive", "--network", "none"];
    let mut running = Running::start(host.run_command(&options, &["sh", "-c", &script]));
    let [mut before, mut held] = [0; 2];
    for (word, kib) in [("before", &mut before), ("held", &mut held)] {
        let _ = running.read_until(word);
        *kib = monitor_kib(host);
        running.write(b"\n");
    }
    let _ = running.read_until("freed");
    // The guest reports pages when they have been free for a moment: until nothing more comes back, or a minute.
    let (start, mut after, mut since) = (Instant::now(), monitor_kib(host), Instant::now());
    while since.elapsed() < Duration::from_secs(5) && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(200));
        let now = monitor_kib(host);
        if now + 1024 < after {
            (after, since) = (now, Instant::now());
        }
    }
    running.write(b"\n");
    let outcome = running.finish();
    assert_eq!(outcome.code, 0, "{outcome:?}");
    json!({ "held_bytes": HELD, "host_kib_before": before, "host_kib_held": held, "host_kib_after": after })
}

/// The memory of all machine monitors of this host (proc(5), `smaps_rollup`, `Pss`).
fn monitor_kib(host: &Host) -> u64 {
    let of = |pid: i32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        line.and_then(|rest| rest.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
    };
    host.processes(coracle_e2e::monitor()).into_iter().map(of).sum()
}

//! What is left of a test.

use std::time::{Duration, Instant};

use crate::Host;

/// How long the kernel may take to take down what was told to go.
const PATIENCE: Duration = Duration::from_secs(20);

/// Something that is left.
#[derive(Debug)]
pub enum Left {
    /// A process: its pid and command line.
    Process(i32, String),
    /// A mount, as a line of mountinfo.
    Mount(String),
    /// A socket, as a line of /proc/net/unix.
    Socket(String),
    /// A cgroup's folder.
    Cgroup(String),
    /// A file or folder of runtime state.
    File(String),
}

/// The processes that carry this host's mark in their command line, environment or working directory.
pub(crate) fn processes(host: &Host) -> Vec<(i32, String)> {
    let mark = host.mark();
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if pid.unsigned_abs() == own {
            continue;
        }
        let text = |name: &str| {
            let bytes = std::fs::read(entry.path().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).replace('\0', " ")
        };
        let line = text("cmdline");
        if line.contains(&mark) || text("environ").contains(&mark) {
            found.push((pid, line));
        }
    }
    found
}

fn left(host: &Host) -> Vec<Left> {
    let mark = host.mark();
    let mut left: Vec<Left> = processes(host).into_iter().map(|(pid, line)| Left::Process(pid, line)).collect();
    let marked = |path: &str| -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines().filter(|line| line.contains(&mark)).map(str::to_owned).collect()
    };
    left.extend(marked("/proc/self/mountinfo").into_iter().map(Left::Mount));
    left.extend(marked("/proc/net/unix").into_iter().map(Left::Socket));
    for entry in std::fs::read_dir(&host.run).into_iter().flatten().flatten() {
        left.push(Left::File(entry.path().display().to_string()));
    }
    // The group above those of the pods, once it is empty, is left by all runtimes: it is theirs who named it.
    let top = std::path::Path::new("/sys/fs/cgroup");
    for hierarchy in std::fs::read_dir(top).into_iter().flatten().flatten() {
        let _ = std::fs::remove_dir(hierarchy.path().join(&mark));
    }
    let _ = std::fs::remove_dir(top.join(&mark));
    cgroups(top, &mark, &mut left);
    left
}

/// Cgroups that are named after this host, or hold our programs' name.
fn cgroups(folder: &std::path::Path, mark: &str, left: &mut Vec<Left>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.contains(mark) || name.contains("coracle") {
            left.push(Left::Cgroup(entry.path().display().to_string()));
        }
        cgroups(&entry.path(), mark, left);
    }
}

/// What is left once the kernel has had its time.
pub(crate) fn wait_for_nothing(host: &Host) -> Vec<Left> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let left = left(host);
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        // An audit looks again: the end of processes that are not its children is no event for it.
        std::thread::sleep(Duration::from_millis(50));
    }
}

//! What a host can run out of, and what may not be left on it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// How long what was ended may take to be gone.
const GONE: Duration = Duration::from_secs(10);

/// How often it is looked at meanwhile.
const LOOK: Duration = Duration::from_millis(10);

/// This process, as the host of pods.
pub(crate) struct Host {
    descriptors: (u64, u64),
    /// The control group that limits its processes.
    group: Option<PathBuf>,
}

impl Host {
    /// Puts this process into a control group of its own, where there is one that limits processes.
    pub(crate) fn new() -> Self {
        let own = format!("faults-{}", std::process::id());
        let controller =
            |folder: &str| fs::read_to_string(Path::new(folder).join("cgroup.controllers")).unwrap_or_default();
        let parent = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].into_iter().find(|folder| {
            folder.ends_with("pids") && Path::new(folder).exists() || controller(folder).contains("pids")
        });
        let group = parent.map(|parent| Path::new(parent).join(own));
        let group = group.filter(|group| {
            let made = fs::create_dir(group).is_ok() && group.join("pids.max").exists();
            made && fs::write(group.join("cgroup.procs"), "0").is_ok()
        });
        Self { descriptors: getrlimit(Resource::RLIMIT_NOFILE).expect("the limit of descriptors"), group }
    }

    /// Whether the processes can be limited.
    pub(crate) fn limits_processes(&self) -> bool {
        self.group.is_some()
    }

    /// No descriptor more.
    pub(crate) fn exhaust_descriptors(&self) {
        setrlimit(Resource::RLIMIT_NOFILE, 3, self.descriptors.1).expect("a limit of descriptors");
    }

    /// No process and no thread more.
    pub(crate) fn exhaust_processes(&self) {
        let group = self.group.as_ref().expect("a control group");
        let now = fs::read_to_string(group.join("pids.current")).expect("how many there are");
        fs::write(group.join("pids.max"), now.trim()).expect("a limit of processes");
    }

    /// As before.
    pub(crate) fn relieve(&self) {
        setrlimit(Resource::RLIMIT_NOFILE, self.descriptors.0, self.descriptors.1).expect("the limit of descriptors");
        if let Some(group) = &self.group {
            fs::write(group.join("pids.max"), "max").expect("no limit of processes");
        }
    }

    /// How many descriptors this process has.
    pub(crate) fn descriptors(&self) -> usize {
        fs::read_dir("/proc/self/fd").expect("the descriptors").count()
    }

    /// What there is more than before: descriptors, and processes.
    pub(crate) fn left(&self, descriptors: usize) -> Vec<String> {
        let mut left = Vec::new();
        if !becomes(|| self.descriptors() <= descriptors) {
            left.push(format!("{} descriptors are left", self.descriptors() - descriptors));
        }
        if !becomes(no_child) {
            left.push("a process is left".into());
            // The next pod is not to be taken for what this one has left.
            for child in children() {
                let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
                let _ = waitpid(Pid::from_raw(child), None);
            }
        }
        left
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let Some(group) = &self.group else { return };
        let parent = group.parent().expect("a parent").join("cgroup.procs");
        let _ = fs::write(parent, "0").and_then(|()| fs::remove_dir(group));
    }
}

/// The numbers of this process's children.
fn children() -> Vec<i32> {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().flat_map(str::parse).collect::<Vec<_>>()).collect()
}

/// Whether this process has no child, those that have ended left out.
fn no_child() -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return false,
            Ok(_) => {}
            Err(_) => return true,
        }
    }
}

/// Whether something becomes true before long.
fn becomes(is_so: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while !is_so() {
        if begun.elapsed() > GONE {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

/// A small disk for a pod's files, below this thread's own `/run`.
pub(crate) struct Disk(PathBuf);

impl Disk {
    /// Makes it.
    pub(crate) fn new() -> Self {
        let folder = PathBuf::from("/run/pod");
        fs::create_dir(&folder).expect("a folder");
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=16m")).expect("a small disk");
        Self(folder)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Leaves no room.
    pub(crate) fn fill(&self) {
        use std::io::Write;
        let mut file = fs::File::create(self.0.join("full")).expect("a file");
        let block = vec![0; 1 << 16];
        while file.write_all(&block).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
    }

    /// Makes room again.
    pub(crate) fn relieve(&self) {
        let _ = fs::remove_file(self.0.join("full"));
    }
}

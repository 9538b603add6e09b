//! The bench for end-to-end tests: a host of one's own for each test, and the audit that nothing of it is left.
//!
//! A test's [`Host`] has folders of its own, whose names stand in the command lines, mounts and sockets of all that it
//! starts. So what is left can be told from other tests', which run beside it.

mod audit;
pub mod bundles;
mod containerd;
pub mod cri;
mod images;
mod netns;
mod pod_shim;
mod run;
mod shim;
mod snapshot;
mod streaming;
mod tap_wire;
mod wire;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

pub use audit::Left;
pub use containerd::Containerd;
pub use cri::{Cri, Pod};
pub use images::{LayerEntry, copy_layout, copy_layout_with_layers, docker_archive, layout_archive, layout_with_layer};
pub use netns::{Netns, ip, try_ip};
pub use pod_shim::{POD_CONFIG, PodShim, read_metrics};
pub use run::{Outcome, Running};
pub use shim::{Refused, RootMount, Shim};
pub use snapshot::Snapshot;
pub use streaming::{Forwarded, Streams};
pub use tap_wire::TapWire;
pub use wire::{Wire, run_in};

/// One test's host.
#[derive(Debug)]
pub struct Host {
    /// The folder of runtime state; short, and the mark by which the test's things are known.
    pub run: PathBuf,
    /// The folder of images, containers and files.
    pub folder: PathBuf,
    settings: Vec<String>,
    links: Vec<String>,
}

/// A path that the environment gives.
///
/// # Panics
/// Where it is not set: run these tests by `cargo xtask test`.
#[must_use]
pub fn path(variable: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(path) => path.into(),
        None => panic!("{variable} is not set: run these tests by `cargo xtask test --lane e2e`"),
    }
}

/// The links of this thread's network namespace.
fn links() -> Vec<String> {
    let table = std::fs::read_to_string("/proc/thread-self/net/dev").expect("the links");
    let mut links: Vec<String> =
        table.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim().to_owned()).collect();
    links.sort();
    links
}

/// What the command lines of machine monitors hold: QEMU, or the built-in one where `CORACLE_TEST_MONITOR` says so.
#[must_use]
pub fn monitor() -> &'static str {
    if MONITOR_NAME.as_str() == "qemu" { "qemu-system" } else { "-v2 vmm " }
}

/// The monitor under test, as the setting names it.
static MONITOR_NAME: std::sync::LazyLock<String> =
    std::sync::LazyLock::new(|| std::env::var("CORACLE_TEST_MONITOR").unwrap_or_else(|_| "qemu".into()));

/// Whether the tests run in the lane of sealed machines, which are made by the rules of confidential guests.
#[must_use]
pub fn sealed() -> bool {
    std::env::var_os("CORACLE_TEST_SEALED").is_some()
}

/// Whether this test is left out, because it is of the open lane alone: what it needs a sealed machine has not.
#[must_use]
pub fn open_only(what: &str) -> bool {
    if sealed() {
        println!("left out: open lane only: {what}");
    }
    sealed()
}

/// How long what comes by itself may take: a guest's own time is slow where it is emulated.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(90);

/// Looks until it is as expected. It must look again: nobody tells a test that what it looks at has changed.
///
/// # Panics
/// Where it does not become so.
pub fn becomes<T: std::fmt::Debug>(what: &str, look: impl Fn() -> T, is: impl Fn(&T) -> bool) {
    let start = std::time::Instant::now();
    loop {
        let found = look();
        if is(&found) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: {found:?}");
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
}

impl Host {
    /// A host whose settings allow emulation and name the guest image under test.
    ///
    /// # Panics
    /// Where its folders can't be made.
    #[must_use]
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // The end makes sure that no mark is the beginning of another one.
        let mark = format!("ce-{}-{number}-e", std::process::id());
        let host = Self {
            run: Path::new("/run").join(&mark),
            folder: std::env::temp_dir().join(&mark),
            settings: Vec::new(),
            links: links(),
        };
        for folder in [&host.run, &host.folder] {
            std::fs::create_dir_all(folder).expect("a test's folder");
        }
        let name = format!("{:?}", MONITOR_NAME.as_str());
        let host = host.set("machine.accelerator", "\"any\"").set("machine.monitor", &name);
        // Tests beside one another would share the host's one bridge.
        let host = host.set("network.default", "\"none\"");
        let host = if sealed() { host.set("machine.sealed", "true") } else { host };
        // In the lab a guest runs nested in an emulated machine.
        let host = if monitor() == "qemu-system" { host } else { host.set("guest.boot_timeout_seconds", "120") };
        host.set("guest.folder", &format!("{:?}", path("CORACLE_TEST_GUEST")))
    }

    /// A host with a network of its own: for the rest of this test's thread, and all that it starts.
    ///
    /// # Panics
    /// Where the namespace can't be made.
    #[must_use]
    pub fn with_own_network() -> Self {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace");
        ip("link set lo up");
        Self::new().set("network.default", "\"bridge\"")
    }

    /// Adds a setting, replacing an earlier one of the same name. The value is TOML.
    ///
    /// # Panics
    /// Where the file can't be written.
    #[must_use]
    pub fn set(mut self, key: &str, value: &str) -> Self {
        self.settings.retain(|line| !line.starts_with(&format!("{key} = ")));
        self.settings.push(format!("{key} = {value}"));
        let run = format!("run.folder = {:?}", self.run);
        let text = format!("{run}\n{}\n", self.settings.join("\n"));
        std::fs::write(self.settings_file(), text).expect("the settings");
        self
    }

    /// The name by which this test's things are known.
    #[must_use]
    pub fn mark(&self) -> String {
        self.run.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The settings' file.
    #[must_use]
    pub fn settings_file(&self) -> PathBuf {
        self.folder.join("settings.toml")
    }

    /// The image that tests run.
    #[must_use]
    pub fn image(&self) -> String {
        format!("oci:{}", path("CORACLE_TEST_IMAGE").display())
    }

    /// The folder for images and containers.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// `coracle` on this host.
    #[must_use]
    pub fn coracle(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(path("CORACLE_TEST_BINARY"));
        command.args(arguments).env("CORACLE_CONFIG", self.settings_file()).env("CORACLE_ROOT", self.root());
        command.env_remove("TTRPC_ADDRESS");
        command
    }

    /// `coracle run --rm` with more options, the image, and a command.
    #[must_use]
    pub fn run(&self, options: &[&str], command: &[&str]) -> Outcome {
        Outcome::of(self.run_command(options, command), b"")
    }

    /// The same, not started.
    #[must_use]
    pub fn run_command(&self, options: &[&str], command: &[&str]) -> Command {
        let image = self.image();
        let mut arguments = vec!["run", "--rm"];
        arguments.extend(options);
        arguments.push(&image);
        arguments.extend(command);
        self.coracle(&arguments)
    }

    /// Runs a shell script in a fresh container.
    #[must_use]
    pub fn sh(&self, script: &str) -> Outcome {
        self.run(&[], &["sh", "-c", script])
    }

    /// Starts a detached container of this name.
    ///
    /// # Panics
    /// Where it does not start.
    pub fn detached(&self, name: &str, script: &str) {
        let image = self.image();
        let outcome = self.coracle_outcome(&["run", "--detach", "--name", name, &image, "sh", "-c", script]);
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }

    /// Runs `coracle` to its end.
    #[must_use]
    pub fn coracle_outcome(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(self.coracle(arguments), b"")
    }

    /// The folder of the only pod of this host.
    ///
    /// # Panics
    /// Where there is none, or more than one.
    #[must_use]
    pub fn pod(&self) -> PathBuf {
        let pods: Vec<_> = std::fs::read_dir(&self.run).expect("the run folder").flatten().collect();
        assert_eq!(pods.len(), 1, "one pod: {pods:?}");
        pods[0].path()
    }

    /// Where the one pod's monitor connects to when its guest dials this port of the host's.
    #[must_use]
    pub fn guest_socket(&self, port: u32) -> PathBuf {
        let folder = if monitor() == "qemu-system" { "m" } else { "m/vsock" };
        self.pod().join(folder).join(format!("vsock.sock_{port}"))
    }

    /// The pids of this host's processes whose command line holds `word`.
    #[must_use]
    pub fn processes(&self, word: &str) -> Vec<i32> {
        audit::processes(self).into_iter().filter(|(_, line)| line.contains(word)).map(|(pid, _)| pid).collect()
    }

    /// Kills this host's processes whose command line holds `word`, with -9.
    ///
    /// # Panics
    /// Where there is none.
    pub fn kill(&self, word: &str) {
        let pids = self.processes(word);
        assert!(!pids.is_empty(), "no process with {word}: {:?}", audit::processes(self));
        for pid in pids {
            let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }

    /// Checks that nothing of this host is left, and removes its folders. Every test ends with it.
    ///
    /// # Panics
    /// With a list of what is left.
    pub fn audit(self) {
        let left = audit::wait_for_nothing(&self);
        let links = links();
        let containers = self.root().join("containers");
        let kept: Vec<_> =
            std::fs::read_dir(containers).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        let _ = std::fs::remove_dir_all(&self.folder);
        let _ = std::fs::remove_dir_all(&self.run);
        assert!(left.is_empty(), "left behind: {left:#?}");
        assert!(kept.is_empty(), "containers left behind: {kept:?}");
        assert_eq!(links, self.links, "network devices");
    }
}

/// A folder with busybox, to be a container's root.
///
/// # Panics
/// Where busybox is missing.
#[must_use]
pub fn busybox_root(host: &Host) -> String {
    let root = host.folder.join("busybox");
    if !root.exists() {
        for folder in ["bin", "etc", "dev", "proc", "sys", "tmp"] {
            std::fs::create_dir_all(root.join(folder)).expect("a folder");
        }
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
        for name in ["sh", "sleep", "cat", "grep", "hostname", "date"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("a link");
        }
    }
    root.display().to_string()
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

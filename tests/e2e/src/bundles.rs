//! Containers from folders and disks, without an image: for tests that talk to a shim.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cri::msg;
use crate::{Host, Netns, POD_CONFIG, PodShim, Shim};

/// Runs a program of the host's to its end.
///
/// # Panics
/// Where it fails.
#[must_use]
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let outcome = Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(outcome.status.success(), "{program}: {}", String::from_utf8_lossy(&outcome.stderr));
    String::from_utf8_lossy(&outcome.stdout).into_owned()
}

/// An empty file system of ext4 in a file, with what is in the folder `from`.
///
/// # Panics
/// Where it can't be made.
#[must_use]
pub fn ext4(file: &Path, from: Option<&Path>) -> String {
    std::fs::File::create(file).unwrap().set_len(64 << 20).unwrap();
    let text = file.display().to_string();
    let mut arguments = vec!["-q", "-F"];
    let from = from.map(|from| from.display().to_string());
    arguments.extend(from.iter().flat_map(|from| ["-d", from.as_str()]));
    arguments.push(&text);
    let _ = tool("mkfs.ext4", &arguments);
    text
}

/// A container that runs a script by busybox.
#[must_use]
pub fn script_config(script: &str) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": { "args": ["/bin/busybox", "sh", "-c", script], "cwd": "/", "user": { "uid": 0, "gid": 0 },
            "env": ["PATH=/bin"] },
        "root": { "path": "rootfs" },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] }],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "network" }] }
    })
}

/// A folder with busybox, and nothing else.
///
/// # Panics
/// Where it can't be made.
pub fn busybox_folder(folder: &Path) {
    for inner in ["bin", "proc", "dev", "sys"] {
        std::fs::create_dir_all(folder.join(inner)).unwrap();
    }
    std::fs::copy("/bin/busybox", folder.join("bin/busybox")).unwrap();
}

/// Runs the container of a shim to its end.
///
/// # Panics
/// Where the shim refuses.
#[must_use]
pub fn end(shim: Shim) -> u32 {
    shim.start_process("").unwrap();
    let code = shim.wait("").unwrap();
    shim.delete().unwrap();
    shim.finish();
    code
}

/// What the machine's monitor has open below a folder.
///
/// # Panics
/// Where there is not one monitor.
#[must_use]
pub fn open_files(host: &Host) -> Vec<String> {
    let [monitor] = host.processes(crate::monitor()).try_into().expect("one monitor");
    let links = std::fs::read_dir(format!("/proc/{monitor}/fd")).unwrap().flatten();
    let files =
        links.filter_map(|link| std::fs::read_link(link.path()).ok()).filter(|file| file.starts_with(&host.folder));
    files.filter_map(|file| Some(file.strip_prefix(&host.folder).ok()?.display().to_string())).collect()
}

/// Waits until the monitor has let go of the files that `is_it` names: a removal goes on after its answer.
///
/// # Panics
/// Where it has not within a minute.
pub fn let_go(host: &Host, is_it: impl Fn(&str) -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let open = open_files(host);
        if !open.iter().any(|file| is_it(file)) {
            return;
        }
        assert!(std::time::Instant::now() < deadline, "the monitor still has {open:?}");
        // A file that is closed is no event.
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// The same with mounts: where in the container, and what of the host.
#[must_use]
pub fn config_with(script: &str, mounts: &[(&str, &Path)]) -> serde_json::Value {
    let mut config = script_config(script);
    let binds = mounts.iter().map(|(destination, source)| {
        serde_json::json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind"] })
    });
    if let Some(all) = config.get_mut("mounts").and_then(|mounts| mounts.as_array_mut()) {
        all.extend(binds);
    }
    config
}

/// Runs a pod over the Sandbox API, in a namespace that is made for it.
///
/// # Panics
/// Where it does not come up.
#[must_use]
pub fn pod(host: &Host, id: &str) -> (Netns, PodShim) {
    let netns = Netns::new(host, id);
    let pod = PodShim::start(host, id);
    let config = msg::PodSandboxConfig::new();
    pod.create(&netns.path(), POD_CONFIG, &config).unwrap();
    pod.boot().unwrap();
    (netns, pod)
}

/// A mount of the host's, as long as this lives.
#[derive(Debug)]
pub struct HostMount(PathBuf);

impl HostMount {
    /// Mounts by mount(8), at a folder that is made.
    ///
    /// # Panics
    /// Where it fails.
    #[must_use]
    pub fn new(words: &[&str], target: &Path) -> Self {
        std::fs::create_dir_all(target).unwrap();
        let path = target.display().to_string();
        let _ = tool("mount", &[words, &[&path]].concat());
        Self(target.to_owned())
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

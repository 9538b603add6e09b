//! A private containerd for a test.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{Host, Outcome, path};

/// It is stopped when this is dropped.
#[derive(Debug)]
pub struct Containerd {
    child: Child,
    folder: PathBuf,
    /// The namespace of its containers: a test's own, for their control groups on the host are named after it.
    namespace: String,
    /// Whether CNI may have made its bridge, which it never removes.
    has_bridge: bool,
}

impl Containerd {
    /// Starts one on `host`, with our shim in its `$PATH` and the test image imported as `test:latest`.
    ///
    /// # Panics
    /// Where it does not start.
    #[must_use]
    pub fn start(host: &Host) -> Self {
        let containerd = Self::without_image(host);
        containerd.import(&containerd.namespace, "test", &path("CORACLE_TEST_IMAGE"));
        containerd
    }

    /// Starts one that serves CRI with the runtimes `coracle` and `runc`, and pods on a bridge; the test image is
    /// [`crate::cri::IMAGE`], for pods too. The host must have a network of its own ([`Host::with_own_network`]).
    ///
    /// # Panics
    /// Where it does not start.
    #[must_use]
    pub fn with_cri(host: &Host) -> Self {
        let containerd = Self::with_cri_again(host);
        let pause = host.folder.join("pause");
        crate::images::copy_layout_with_command(&path("CORACLE_TEST_IMAGE"), &pause, &["sleep", "1000000"]);
        containerd.import("k8s.io", "docker.io/library/pause", &pause);
        containerd.import("k8s.io", "docker.io/library/test", &path("CORACLE_TEST_IMAGE"));
        containerd
    }

    /// Starts one that serves CRI again, where an earlier one was killed.
    ///
    /// # Panics
    /// Where it does not start.
    #[must_use]
    pub fn with_cri_again(host: &Host) -> Self {
        let mut containerd = Self::launch(host, &cri_plugin(host));
        containerd.has_bridge = true;
        containerd
    }

    fn import(&self, namespace: &str, base: &str, layout: &Path) {
        let archive = self.folder.join("image.tar");
        crate::layout_archive(layout, &archive);
        let archive = archive.display().to_string();
        let import = self.command_in(namespace, &["images", "import", "--base-name", base, &archive]);
        let outcome = Outcome::of(import, b"");
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }

    /// The socket at which it serves.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    /// Starts one whose folders may hold what an earlier one has left.
    ///
    /// # Panics
    /// Where it does not start.
    #[must_use]
    pub fn without_image(host: &Host) -> Self {
        Self::launch(host, "disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n")
    }

    fn launch(host: &Host, more: &str) -> Self {
        // Its root is a folder on disk: overlay mounts need one.
        let folder = host.folder.join("cd");
        std::fs::create_dir_all(&folder).expect("containerd's folder");
        let text = format!(
            "version = 2\nroot = \"{0}/root\"\nstate = \"{0}/state\"\n{more}\
             [grpc]\naddress = \"{0}/c.sock\"\n[debug]\nlevel = \"debug\"\n",
            folder.display()
        );
        let config = folder.join("config.toml");
        std::fs::write(&config, text).expect("containerd's configuration");
        let shims = path("CORACLE_TEST_SHIM").parent().expect("a folder").to_owned();
        let search = format!("{}:{}", shims.display(), std::env::var("PATH").unwrap_or_default());
        let mut child = Command::new("containerd")
            .arg("-c")
            .arg(&config)
            .env("PATH", search)
            .env("CORACLE_CONFIG", host.settings_file())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("containerd");
        let log = folder.join("log");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        let mut last = String::new();
        for line in lines.by_ref().map_while(Result::ok) {
            if line.contains("containerd successfully booted") {
                std::thread::spawn(move || {
                    let text: String = lines.map_while(Result::ok).map(|line| line + "\n").collect();
                    let _ = std::fs::write(log, text);
                });
                let namespace = host.mark();
                return Self { child, folder, namespace, has_bridge: false };
            }
            last = line;
        }
        panic!("containerd ended with {:?}: {last}", child.wait());
    }

    /// A `ctr` command, not started.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_in(&self.namespace, arguments)
    }

    fn command_in(&self, namespace: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.socket()).args(["--namespace", namespace]).args(arguments);
        command
    }

    /// A `ctr` command, run to its end.
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(self.command(arguments), b"")
    }

    /// `ctr run --rm` of a command in the test image.
    #[must_use]
    pub fn run(&self, id: &str, command: &[&str]) -> Outcome {
        let mut arguments = vec!["run", "--rm", "--runtime", "io.containerd.coracle.v2", "test:latest", id];
        arguments.extend(command);
        self.ctr(&arguments)
    }

    /// Starts a container in the background.
    ///
    /// # Panics
    /// Where it does not start.
    pub fn detached(&self, id: &str, command: &[&str]) {
        let mut arguments = vec!["run", "--detach", "--runtime", "io.containerd.coracle.v2", "test:latest", id];
        arguments.extend(command);
        let outcome = self.ctr(&arguments);
        assert_eq!(outcome.code, 0, "{outcome:?}");
    }

    /// Removes a container and its task, whatever they do.
    pub fn remove(&self, id: &str) {
        let _ = self.ctr(&["tasks", "kill", "--signal", "SIGKILL", id]);
        let _ = self.ctr(&["tasks", "delete", "--force", id]);
        let _ = self.ctr(&["containers", "delete", id]);
    }

    /// Stops it, and gives what it has logged, the shims' lines among it.
    ///
    /// # Panics
    /// Where there is no log.
    #[must_use]
    pub fn stop(self) -> String {
        let log = self.folder.join("log");
        drop(self);
        // A thread writes it when the last line has come.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        loop {
            match std::fs::read_to_string(&log) {
                Ok(text) if !text.is_empty() => return text,
                _ => assert!(std::time::Instant::now() < deadline, "containerd has no log"),
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Kills it with -9; its shims live on.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
        if self.has_bridge {
            let _ = Command::new("ip").args(["link", "delete", BRIDGE]).stderr(Stdio::null()).status();
        }
    }
}

/// The bridge of pods.
const BRIDGE: &str = "pods0";

/// Who makes pods, where the environment says so: "shim" is our Sandbox API, which containerd 2 knows. A line of configuration.
fn sandboxer() -> String {
    std::env::var("CORACLE_TEST_SANDBOXER").map(|name| format!("sandboxer = {name:?}\n")).unwrap_or_default()
}

/// The configuration of the CRI plugin, and of a network whose pods are on the bridge.
fn cri_plugin(host: &Host) -> String {
    let network = host.folder.join("cni");
    std::fs::create_dir_all(&network).expect("CNI's folder");
    let conflist = serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [{
            "type": "bridge", "bridge": BRIDGE, "isGateway": true, "ipMasq": false, "mtu": 1400,
            "ipam": {
                "type": "host-local",
                "dataDir": host.folder.join("ipam"),
                "ranges": [[{ "subnet": "10.88.0.0/24" }], [{ "subnet": "fd00:88::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]
            }
        }, { "type": "portmap", "capabilities": { "portMappings": true } }]
    });
    std::fs::write(network.join("10-test.conflist"), conflist.to_string()).expect("CNI's configuration");
    format!(
        r#"[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
enable_selinux = false
disable_apparmor = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{network}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.coracle]
runtime_type = "io.containerd.coracle.v2"
{sandboxer}[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"#,
        image = crate::cri::PAUSE,
        sandboxer = sandboxer(),
        network = network.display(),
    )
}

//! The bench for flow tests: the sandbox of the host, the real agent of the guest, and between them a machine that is none.

mod hands;
mod scripted;

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use coracle_machine::fake::{FakeDriver, FakeGuest, Program};
use coracle_machine::{AgentAddress, Kernel, KernelForm};
use coracle_protocol::ttrpc::asynchronous::transport::Listener;
use coracle_protocol::{hello, oci, ports};
use coracle_sandbox::{Config, CreateRequest, Event, Exit, ProcessId, Sandbox, Stdio};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

pub use hands::{Hands, Wire};
pub use scripted::{DENIED_CLOCK, SILENT_CLOCK, STREAMS, Scripted};

/// Runs a test on an event loop of its own, in a mount namespace of its own, whose `/run` is empty: what it mounts there is
/// gone with its thread.
///
/// # Panics
/// Where the namespace can't be made: these tests need root.
pub fn in_own_mounts<T>(test: impl Future<Output = T>) -> T {
    own_mounts();
    event_loop().block_on(test)
}

/// Gives this thread a mount namespace of its own, whose `/run` is empty.
///
/// # Panics
/// See [`in_own_mounts`].
pub fn own_mounts() {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)
        .expect("a mount namespace: run these tests as root, by `cargo xtask test --lane flow`");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).expect("an empty /run");
    std::fs::create_dir_all("/run/cgroup").expect("a folder");
    mount(Some("cgroup2"), "/run/cgroup", Some("cgroup2"), MsFlags::empty(), none).expect("cgroup version 2");
}

/// An event loop such as the shim and the agent have.
///
/// # Panics
/// Where the kernel has none to give.
#[must_use]
pub fn event_loop() -> tokio::runtime::Runtime {
    let keep = Duration::from_millis(100);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().thread_keep_alive(keep).build();
    runtime.expect("an event loop")
}

/// A pod over a fake machine.
pub struct Bench {
    /// The pod.
    pub sandbox: Sandbox,
    /// What happens in it.
    pub events: mpsc::UnboundedReceiver<Event>,
    /// Its folder's parent, removed at the end.
    pub folder: tempfile::TempDir,
}

/// A configuration over `folder`, whose kernel is a file that is there.
fn config(folder: &Path) -> Config {
    let kernel = folder.join("vmlinux");
    std::fs::write(&kernel, "").expect("a file");
    let machine = folder.join("m");
    std::fs::create_dir(&machine).expect("a folder");
    Config {
        name: "flow".into(),
        folder: machine,
        kernel: Kernel { path: kernel.clone(), form: KernelForm::PvhElf },
        initrd: kernel,
        command_line: String::new(),
        memory_mib: 64,
        huge_pages: false,
        disk_limits: coracle_machine::Limits::default(),
        vcpus: 1,
        virtiofsd: None,
        memory_max_mib: 256,
        vcpus_max: 1,
        user_network: None,
        labels: false,
        hook_folder: String::new(),
        empty_dir_mib: None,
        swap_folder: None,
        direct_volumes: "/nowhere".into(),
        shares_files: true,
        layers_as_memory: false,
        sealed: false,
        host_cpus: Vec::new(),
        host_nodes: Vec::new(),
        network: coracle_network::Options::default(),
        clock_period: Duration::from_secs(300),
        trace: None,
        boot_timeout: Duration::from_secs(30),
        agent_timeout: Duration::from_secs(600),
        version: coracle_protocol::VERSION.into(),
    }
}

impl Bench {
    /// A pod whose guest runs `program`; `change` changes its configuration.
    ///
    /// # Panics
    /// Where its folder can't be made.
    #[must_use]
    pub fn with(program: Program, change: impl FnOnce(&mut Config)) -> Self {
        Self::of(FakeDriver::new(program), tempfile::tempdir().expect("a folder"), change)
    }

    /// A pod of this driver's in a folder.
    ///
    /// # Panics
    /// Where there is no room in it.
    #[must_use]
    pub fn of(driver: FakeDriver, folder: tempfile::TempDir, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(folder.path());
        change(&mut config);
        let (sandbox, events) = Sandbox::new(config, Arc::new(driver));
        Self { sandbox, events, folder }
    }

    /// A pod whose guest runs the real agent.
    #[must_use]
    pub fn real() -> Self {
        Self::real_with(|_| {})
    }

    /// The same with another configuration.
    #[must_use]
    pub fn real_with(change: impl FnOnce(&mut Config)) -> Self {
        let program: Program = Arc::new(|guest| {
            let socket = guest.port_socket(ports::AGENT);
            Box::pin(run_agent(guest, socket))
        });
        Self::with(program, change)
    }

    /// A root file system with busybox.
    ///
    /// # Panics
    /// Where busybox is missing.
    #[must_use]
    pub fn rootfs(&self) -> PathBuf {
        let root = self.folder.path().join("rootfs");
        if !root.exists() {
            make_rootfs(&root);
        }
        root
    }

    /// Creates a container of a shell script.
    ///
    /// # Errors
    /// What the sandbox says.
    pub async fn create(&self, id: &str, script: &str, stdio: Stdio) -> coracle_sandbox::Result<()> {
        let args = serde_json::json!(["/bin/sh", "-c", script]);
        self.create_command(id, &args, stdio).await
    }

    /// Creates a container of a command.
    ///
    /// # Errors
    /// What the sandbox says.
    pub async fn create_command(
        &self,
        id: &str,
        args: &serde_json::Value,
        stdio: Stdio,
    ) -> coracle_sandbox::Result<()> {
        let spec = spec(args);
        let request = CreateRequest { id: id.into(), spec, root: self.rootfs(), rootfs: Vec::new(), stdio };
        self.sandbox.create(request).await
    }

    /// Runs a shell script, as [`Self::run_spec`] does.
    ///
    /// # Panics
    /// Where any of that fails.
    pub async fn run(&self, id: &str, script: &str) -> (Exit, String) {
        self.run_spec(id, spec(&serde_json::json!(["/bin/sh", "-c", script]))).await
    }

    /// Creates and starts a container, waits for its end, deletes it, and gives what it printed.
    ///
    /// # Panics
    /// Where any of that fails.
    pub async fn run_spec(&self, id: &str, spec: oci::Spec) -> (Exit, String) {
        let (stdio, output) = captured();
        let process = first(id);
        let request = CreateRequest { id: id.into(), spec, root: self.rootfs(), rootfs: Vec::new(), stdio };
        self.sandbox.create(request).await.expect("create");
        self.sandbox.start(&process).await.expect("start");
        let exit = self.sandbox.wait(&process).await.expect("wait");
        let deleted = self.sandbox.delete(&process).await.expect("delete");
        assert_eq!(deleted, exit, "delete tells what wait told");
        (exit, output.text())
    }
}

/// A container's first process.
#[must_use]
pub fn first(id: &str) -> ProcessId {
    ProcessId { container: id.into(), exec: String::new() }
}

/// Another process of a container.
#[must_use]
pub fn beside(id: &str, exec: &str) -> ProcessId {
    ProcessId { container: id.into(), exec: exec.into() }
}

/// A specification of a command.
///
/// # Panics
/// Never: the text is well-formed.
#[must_use]
pub fn spec(args: &serde_json::Value) -> oci::Spec {
    let json = serde_json::json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": { "args": args, "env": ["PATH=/bin"], "cwd": "/", "user": {},
            "capabilities": { "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"] } },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": [
            { "type": "pid" }, { "type": "mount" }, { "type": "uts" }, { "type": "ipc" }, { "type": "network" }
        ] }
    });
    coracle_protocol::from_json(&json.to_string()).expect("a specification")
}

/// Makes a root file system with busybox.
///
/// # Panics
/// Where busybox is missing.
pub fn make_rootfs(root: &Path) {
    std::fs::create_dir_all(root.join("bin")).expect("a folder");
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
    for name in [
        "sh", "echo", "cat", "sleep", "true", "kill", "uname", "umask", "grep", "ls", "mknod", "touch", "head", "wc",
        "stat",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).expect("a link");
    }
}

/// The real agent as a fake machine's guest, which serves at `socket`: where a machine has a shared file system, it has the host's own folder.
async fn run_agent(guest: FakeGuest, socket: PathBuf) -> String {
    let shared = Path::new(coracle_protocol::paths::SHARED);
    std::fs::create_dir_all(shared).expect("the shared folder");
    let folder = guest.spec.folder.join("shared");
    mount(Some(&folder), shared, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .expect("the shared folder");
    let own = guest.spec.folder.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    let config = coracle_agent::Config {
        program: std::env::var_os("CORACLE_TEST_AGENT")
            .expect("run these tests by `cargo xtask test --lane flow`")
            .into(),
        cgroups: Path::new("/run/cgroup").join(format!("flow{own}")),
        resolv_conf: "/run/resolv.conf".into(),
        shared: coracle_agent::SharedSource::InPlace,
    };
    let cgroups = config.cgroups.clone();
    let listener = Listener::bind(format!("unix://{}", socket.display())).expect("a socket");
    let streams = incoming(UnixListener::bind(guest.port_socket(ports::STREAMS)).expect("a socket"));
    let _server = coracle_agent::serve(config, listener, streams).await.expect("the agent");
    let _cleanup = PowerOff(cgroups);
    greet(&guest, &hello::line()).await;
    "the host has hung up".into()
}

/// The connections to a socket of a guest that is no machine.
#[must_use]
pub fn incoming(listener: UnixListener) -> coracle_agent::Incoming {
    Box::pin(futures::stream::unfold(listener, |listener| async move {
        let (stream, peer) = loop {
            match listener.accept().await {
                Ok(accepted) => break accepted,
                // Out of descriptors: there may be some again.
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        let port = peer.as_pathname().and_then(AgentAddress::port_of)?;
        Some(((port, Box::pin(stream) as coracle_agent::Connection), listener))
    }))
}

/// What the end of a machine does to the processes in it, by the folder of their cgroups.
struct PowerOff(PathBuf);

impl Drop for PowerOff {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        while nix::mount::umount2(coracle_protocol::paths::SHARED, nix::mount::MntFlags::MNT_DETACH).is_ok() {}
        // Those that were killed leave a moment later: what is left then is removed by who looks for it.
        let _ = remove_cgroups(&self.0);
    }
}

/// Removes a cgroup and those below it, in which no process is any more.
///
/// # Errors
/// The kernel's, where one still is.
pub fn remove_cgroups(folder: &Path) -> std::io::Result<()> {
    for below in std::fs::read_dir(folder)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroups(&below.path())?;
    }
    std::fs::remove_dir(folder)
}

/// Says `line` to the host, and lives for as long as that listens.
///
/// # Panics
/// Where the host does not listen.
pub async fn greet(guest: &FakeGuest, line: &str) {
    let mut host = UnixStream::connect(guest.hello_socket()).await.expect("the host");
    host.write_all(line.as_bytes()).await.expect("a greeting");
    let _ = host.read(&mut [0; 1]).await;
}

/// Streams of which the output is kept.
#[must_use]
pub fn captured() -> (Stdio, Captured) {
    let output = Captured::default();
    let stdio =
        Stdio { stdout: Some(Box::pin(output.clone())), stderr: Some(Box::pin(output.clone())), ..Default::default() };
    (stdio, output)
}

/// Output that was kept.
#[derive(Debug, Clone, Default)]
pub struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    /// It as text.
    ///
    /// # Panics
    /// Where a writer has panicked.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("the output")).into_owned()
    }
}

impl AsyncWrite for Captured {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        self.0.lock().expect("the output").extend(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

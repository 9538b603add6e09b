//! A client of Kubernetes' container runtime interface: what kubelet and crictl ask of containerd.

use bytes::Bytes;
use protobuf::{Message, MessageField};
use tokio::net::UnixStream;

use crate::{Containerd, Forwarded, Streams};

#[expect(warnings, reason = "generated code")]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/cri/mod.rs"));
}
pub use generated::cri as msg;

/// A refused request: gRPC's status number and text.
pub type CriError = (u32, String);

/// The name under which the tests' containerd knows the test image.
pub const IMAGE: &str = "docker.io/library/test:latest";

/// The same of an image for runc's pause process.
pub const PAUSE: &str = "docker.io/library/pause:latest";

/// A connection.
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    sender: h2::client::SendRequest<Bytes>,
}

impl Cri {
    /// Connects to a containerd that serves CRI.
    ///
    /// # Panics
    /// Where it does not.
    #[must_use]
    pub fn connect(containerd: &Containerd) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let sender = runtime.block_on(async {
            let stream = UnixStream::connect(containerd.socket()).await.expect("containerd listens");
            let (sender, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
            tokio::spawn(connection);
            sender
        });
        let cri = Self { runtime, sender };
        // One that was started on what an earlier one has left serves a moment after it listens, and tells so by this error only.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while let Err((_, text)) = cri.call::<msg::ListPodSandboxResponse>("ListPodSandbox", &msg::Empty::new()) {
            assert!(std::time::Instant::now() < deadline, "{text}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        cri
    }

    /// Calls a method of the runtime service.
    ///
    /// # Errors
    /// [`CriError`].
    pub fn call<A: Message>(&self, method: &str, request: &impl Message) -> Result<A, CriError> {
        self.call_service("RuntimeService", method, request)
    }

    /// The names of the images that the runtime knows.
    ///
    /// # Panics
    /// Where it does not say.
    #[must_use]
    pub fn images(&self) -> Vec<String> {
        let images: msg::ListImagesResponse =
            self.call_service("ImageService", "ListImages", &msg::Empty::new()).expect("images");
        images.images.into_iter().flat_map(|image| image.repo_tags).collect()
    }

    fn call_service<A: Message>(&self, service: &str, method: &str, request: &impl Message) -> Result<A, CriError> {
        let message = request.write_to_bytes().expect("a message");
        let mut body = vec![0];
        body.extend(u32::try_from(message.len()).expect("a short message").to_be_bytes());
        body.extend(message);
        let request = http::Request::post(format!("http://localhost/runtime.v1.{service}/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request");
        let sender = self.sender.clone();
        let answer = self.runtime.block_on(async {
            let mut sender = sender.ready().await.map_err(broken)?;
            let (response, mut stream) = sender.send_request(request, false).map_err(broken)?;
            stream.send_data(body.into(), true).map_err(broken)?;
            receive(response.await.map_err(broken)?).await
        })?;
        Ok(A::parse_from_bytes(answer.get(5..).unwrap_or_default()).expect("a well-formed answer"))
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn broken(error: h2::Error) -> CriError {
    (14, format!("the connection is broken: {error}"))
}

async fn receive(response: http::Response<h2::RecvStream>) -> Result<Vec<u8>, CriError> {
    let (head, mut body) = response.into_parts();
    let mut data = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(broken)?;
        let _ = body.flow_control().release_capacity(chunk.len());
        data.extend(chunk);
    }
    let trailers = body.trailers().await.map_err(broken)?.unwrap_or(head.headers);
    let text = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    match text("grpc-status").parse::<u32>() {
        Ok(0) => Ok(data),
        Ok(code) => Err((code, text("grpc-message"))),
        Err(_) => Err((2, "an answer without a status".into())),
    }
}

/// A pod to run and containers in it, with the defaults of the tests.
pub struct Pod<'a> {
    cri: &'a Cri,
    /// Its name for the runtime.
    pub id: String,
    config: msg::PodSandboxConfig,
}

impl<'a> Pod<'a> {
    /// Runs a pod whose configuration `change` changes, with the runtime of this name.
    ///
    /// # Errors
    /// [`CriError`].
    pub fn run(
        cri: &'a Cri,
        runtime: &str,
        name: &str,
        change: impl FnOnce(&mut msg::PodSandboxConfig),
    ) -> Result<Self, CriError> {
        let config = Self::config(name, change);
        let request = msg::RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: runtime.into(),
            ..Default::default()
        };
        let id = cri.call::<msg::PodId>("RunPodSandbox", &request)?.pod_sandbox_id;
        Ok(Self { cri, id, config })
    }

    /// A pod that runs already, and was run with this configuration.
    pub fn found(cri: &'a Cri, id: &str, name: &str, change: impl FnOnce(&mut msg::PodSandboxConfig)) -> Self {
        Self { cri, id: id.into(), config: Self::config(name, change) }
    }

    fn config(name: &str, change: impl FnOnce(&mut msg::PodSandboxConfig)) -> msg::PodSandboxConfig {
        let metadata = msg::PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "default".into(),
            ..Default::default()
        };
        let mut config = msg::PodSandboxConfig {
            metadata: MessageField::some(metadata),
            hostname: name.into(),
            linux: MessageField::some(msg::LinuxPodSandboxConfig::new()),
            ..Default::default()
        };
        change(&mut config);
        config
    }

    /// Creates a container of this command, changed by `change`, and gives its id.
    ///
    /// # Errors
    /// [`CriError`].
    pub fn create(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut msg::ContainerConfig),
    ) -> Result<String, CriError> {
        let mut config = msg::ContainerConfig {
            metadata: MessageField::some(msg::ContainerMetadata { name: name.into(), ..Default::default() }),
            image: MessageField::some(msg::ImageSpec { image: IMAGE.into(), ..Default::default() }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: MessageField::some(msg::LinuxContainerConfig::new()),
            ..Default::default()
        };
        // As kubelet does where nobody asks for the pod's.
        let apart = msg::NamespaceOption { pid: 1, ..Default::default() };
        let linux = config.linux.mut_or_insert_default();
        linux.security_context.mut_or_insert_default().namespace_options = MessageField::some(apart);
        change(&mut config);
        let request = msg::CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.config.clone()),
            ..Default::default()
        };
        Ok(self.cri.call::<msg::ContainerId>("CreateContainer", &request)?.container_id)
    }

    /// Creates and starts one.
    ///
    /// # Errors
    /// [`CriError`].
    pub fn start(
        &self,
        name: &str,
        command: &[&str],
        change: impl FnOnce(&mut msg::ContainerConfig),
    ) -> Result<String, CriError> {
        let id = self.create(name, command, change)?;
        self.cri.start(&id).map(|()| id)
    }

    /// What a container has logged, the runtime's columns taken off.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        self.log_of(name, "")
    }

    /// What a container has logged of one stream, `stdout` or `stderr`, or of both where it is empty.
    #[must_use]
    pub fn log_of(&self, name: &str, stream: &str) -> String {
        let path = std::path::Path::new(&self.config.log_directory).join(format!("{name}.log"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let columns = text.lines().map(|line| line.splitn(4, ' ').collect::<Vec<_>>());
        columns
            .filter(|columns| columns.len() == 4 && columns[1].starts_with(stream))
            .map(|columns| format!("{}\n", columns[3]))
            .collect()
    }

    /// Waits until a container has logged `text`, and gives the log as it is then.
    ///
    /// containerd tells the end of a container before it has written the last of its log, and writes the lines of its two streams
    /// in no order.
    ///
    /// # Panics
    /// Where it has not after a minute.
    pub fn await_log(&self, name: &str, text: &str) -> String {
        self.await_log_of(name, "", text)
    }

    /// [`Pod::await_log`] of one stream, `stdout` or `stderr`.
    ///
    /// # Panics
    /// Where it has not after a minute.
    pub fn await_log_of(&self, name: &str, stream: &str, text: &str) -> String {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let log = self.log_of(name, stream);
            if log.contains(text) {
                return log;
            }
            let lines = log.lines().count();
            let last: Vec<_> = log.lines().skip(lines.saturating_sub(5)).collect();
            assert!(
                std::time::Instant::now() < deadline,
                "{name} has not logged {text:?}; of {lines} the last: {last:?}"
            );
            // A file that grows is no event: kubelet looks again, too.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// The pod's status.
    ///
    /// # Errors
    /// [`CriError`].
    pub fn status(&self) -> Result<msg::PodSandboxStatus, CriError> {
        let answer: msg::PodSandboxStatusResponse = self.cri.call("PodSandboxStatus", &pod_id(&self.id))?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Stops the pod.
    ///
    /// # Errors
    /// [`CriError`].
    pub fn stop(&self) -> Result<(), CriError> {
        self.cri.call::<msg::Empty>("StopPodSandbox", &pod_id(&self.id)).map(drop)
    }

    /// Stops and removes the pod whose shim was killed: containerd learns of that a moment later, and refuses until then. Kubelet
    /// asks again.
    ///
    /// # Errors
    /// The last [`CriError`], after half a minute of them.
    pub fn remove_as_kubelet_does(self) -> Result<(), CriError> {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            let removed =
                self.stop().and_then(|()| self.cri.call::<msg::Empty>("RemovePodSandbox", &pod_id(&self.id)).map(drop));
            if removed.is_ok() || std::time::Instant::now() > deadline {
                return removed;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }

    /// Stops and removes the pod and all in it.
    ///
    /// # Errors
    /// [`CriError`].
    pub fn remove(self) -> Result<(), CriError> {
        self.stop()?;
        self.cri.call::<msg::Empty>("RemovePodSandbox", &pod_id(&self.id)).map(drop)
    }
}

fn pod_id(id: &str) -> msg::PodId {
    msg::PodId { pod_sandbox_id: id.into(), ..Default::default() }
}

fn container_id(id: &str) -> msg::ContainerId {
    msg::ContainerId { container_id: id.into(), ..Default::default() }
}

/// What is done with a container.
impl Cri {
    /// Starts it.
    ///
    /// # Errors
    /// [`CriError`], as in all that follow.
    pub fn start(&self, id: &str) -> Result<(), CriError> {
        self.call::<msg::Empty>("StartContainer", &container_id(id)).map(drop)
    }

    /// Asks it to end, and kills it after `timeout` seconds.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn stop(&self, id: &str, timeout: i64) -> Result<(), CriError> {
        let request = msg::StopContainerRequest { container_id: id.into(), timeout, ..Default::default() };
        self.call::<msg::Empty>("StopContainer", &request).map(drop)
    }

    /// Removes it.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn remove(&self, id: &str) -> Result<(), CriError> {
        self.call::<msg::Empty>("RemoveContainer", &container_id(id)).map(drop)
    }

    /// Its status.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn status(&self, id: &str) -> Result<msg::ContainerStatus, CriError> {
        let answer: msg::ContainerStatusResponse = self.call("ContainerStatus", &container_id(id))?;
        Ok(answer.status.unwrap_or_default())
    }

    /// Waits until it has ended, and gives its status.
    ///
    /// # Panics
    /// Where it has not after two minutes.
    #[must_use]
    pub fn ended(&self, id: &str) -> msg::ContainerStatus {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(120);
        loop {
            let status = self.status(id).expect("a status");
            if status.state == 2 {
                return status;
            }
            assert!(std::time::Instant::now() < deadline, "it has not ended: {status:?}");
            // CRI tells no end by an event: kubelet looks again, too.
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }

    /// Runs a command in it to its end: exit code, output, error output.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn exec(&self, id: &str, command: &[&str]) -> Result<(i32, String, String), CriError> {
        let request = msg::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 60,
            ..Default::default()
        };
        let answer: msg::ExecSyncResponse = self.call("ExecSync", &request)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok((answer.exit_code, text(answer.stdout), text(answer.stderr)))
    }

    /// Starts a command in it whose streams are joined to the caller.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn exec_streams(&self, id: &str, command: &[&str], tty: bool) -> Result<Streams, CriError> {
        let request = msg::ExecRequest {
            container_id: id.into(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        let answer: msg::Url = self.call("Exec", &request)?;
        Ok(Streams::connect(&answer.url))
    }

    /// Joins the caller to the streams of its first process.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn attach(&self, id: &str, tty: bool) -> Result<Streams, CriError> {
        let request = msg::AttachRequest {
            container_id: id.into(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
            ..Default::default()
        };
        let answer: msg::Url = self.call("Attach", &request)?;
        Ok(Streams::connect(&answer.url))
    }

    /// Connects to a port of a pod's loopback.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn port_forward(&self, pod: &str, port: i32) -> Result<Forwarded, CriError> {
        let request = msg::PortForwardRequest { pod_sandbox_id: pod.into(), port: vec![port], ..Default::default() };
        let answer: msg::Url = self.call("PortForward", &request)?;
        Ok(Forwarded::connect(&answer.url, port))
    }

    /// What it has used.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn stats(&self, id: &str) -> Result<msg::ContainerStats, CriError> {
        let answer: msg::ContainerStatsResponse = self.call("ContainerStats", &container_id(id))?;
        Ok(answer.stats.unwrap_or_default())
    }
}

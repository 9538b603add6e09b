//! A shim, driven by hand over the Sandbox API as containerd 2 does it.

use std::path::{Path, PathBuf};
use std::process::Command;

use containerd_shim_protos::api;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::sandbox_api as sandbox;
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::{Client, TaskClient};

use crate::cri::msg;
use crate::shim::{Refused, RootMount, patience, refused};
use crate::{Host, Outcome, path};

/// The options' type that containerd's CRI sends.
pub const POD_CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// A shim that was started for a pod.
pub struct PodShim {
    pods: SandboxClient,
    tasks: TaskClient,
    id: String,
    bundle: PathBuf,
    containers: PathBuf,
}

impl PodShim {
    /// Runs the shim's `start` in a bundle without a specification, where containerd 2 has those of pods, and connects.
    ///
    /// # Panics
    /// Where it does not start, or answers in another form than containerd reads.
    #[must_use]
    pub fn start(host: &Host, id: &str) -> Self {
        let bundle = host.folder.join("io.containerd.sandbox.controller.v1.shim/test").join(id);
        std::fs::create_dir_all(&bundle).expect("a bundle");
        let mut command = Command::new(path("CORACLE_TEST_SHIM"));
        command.args(["-namespace", "test", "-id", id, "start"]).current_dir(&bundle);
        command.env("CORACLE_CONFIG", host.settings_file()).env("MAX_SHIM_VERSION", "2");
        let outcome = Outcome::of(command, b"");
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
        let answer: serde_json::Value = serde_json::from_str(&outcome.stdout).expect("JSON");
        assert_eq!((answer["version"].as_i64(), answer["protocol"].as_str()), (Some(3), Some("ttrpc")));
        let client = Client::connect(answer["address"].as_str().expect("an address")).expect("the shim listens");
        let containers = host.folder.join("containers");
        Self {
            pods: SandboxClient::new(client.clone()),
            tasks: TaskClient::new(client),
            id: id.into(),
            bundle,
            containers,
        }
    }

    /// Creates the pod of this description.
    ///
    /// # Errors
    /// [`Refused`], as in all that follow.
    pub fn create(&self, netns: &str, kind: &str, config: &msg::PodSandboxConfig) -> Result<(), Refused> {
        let value = protobuf::Message::write_to_bytes(config).expect("a message");
        let request = sandbox::CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: self.bundle.display().to_string(),
            netns_path: netns.into(),
            options: MessageField::some(Any { type_url: kind.into(), value, ..Default::default() }),
            ..Default::default()
        };
        self.pods.create_sandbox(patience(), &request).map(drop).map_err(refused)
    }

    /// Boots it.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn boot(&self) -> Result<sandbox::StartSandboxResponse, Refused> {
        let request = sandbox::StartSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.pods.start_sandbox(patience(), &request).map_err(refused)
    }

    /// Its status.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn status(&self) -> Result<sandbox::SandboxStatusResponse, Refused> {
        self.status_of(&self.id)
    }

    /// The status of a pod of another name.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn status_of(&self, id: &str) -> Result<sandbox::SandboxStatusResponse, Refused> {
        let request = sandbox::SandboxStatusRequest { sandbox_id: id.into(), verbose: true, ..Default::default() };
        self.pods.sandbox_status(patience(), &request).map_err(refused)
    }

    /// Operating system and architecture.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn platform(&self) -> Result<(String, String), Refused> {
        let request = sandbox::PlatformRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let platform = self.pods.platform(patience(), &request).map_err(refused)?.platform.unwrap_or_default();
        Ok((platform.os, platform.architecture))
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn ping(&self) -> Result<(), Refused> {
        let request = sandbox::PingRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.pods.ping_sandbox(patience(), &request).map(drop).map_err(refused)
    }

    /// What it has used: the message's type and bytes.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn metrics(&self) -> Result<(String, Vec<u8>), Refused> {
        let request = sandbox::SandboxMetricsRequest { sandbox_id: self.id.clone(), ..Default::default() };
        let mut answer = self.pods.sandbox_metrics(patience(), &request).map_err(refused)?;
        let data = answer.mut_metrics().data.clone().unwrap_or_default();
        Ok((data.type_url, data.value))
    }

    /// Stops it.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn stop(&self) -> Result<(), Refused> {
        let request = sandbox::StopSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.pods.stop_sandbox(patience(), &request).map(drop).map_err(refused)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn wait(&self) -> Result<u32, Refused> {
        let request = sandbox::WaitSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.pods.wait_sandbox(patience(), &request).map(|answer| answer.exit_status).map_err(refused)
    }

    /// Ends the shim.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn shutdown(&self) -> Result<(), Refused> {
        let request = sandbox::ShutdownSandboxRequest { sandbox_id: self.id.clone(), ..Default::default() };
        self.pods.shutdown_sandbox(patience(), &request).map(drop).map_err(refused)
    }

    /// Makes and starts a container of the pod, whose output goes to the file that is given back.
    ///
    /// # Errors
    /// See [`Self::create`].
    ///
    /// # Panics
    /// Where its bundle can't be written.
    pub fn run(&self, id: &str, config: serde_json::Value) -> Result<PathBuf, Refused> {
        self.run_with_root(id, config, &[])
    }

    /// The same for one whose root these mounts make: type, source and options of each.
    ///
    /// # Errors
    /// See [`Self::create`].
    ///
    /// # Panics
    /// Where its bundle can't be written.
    pub fn run_with_root(
        &self,
        id: &str,
        mut config: serde_json::Value,
        root: &[RootMount<'_>],
    ) -> Result<PathBuf, Refused> {
        let bundle = self.containers.join(id);
        std::fs::create_dir_all(&bundle).expect("a bundle");
        config["annotations"] = serde_json::json!({
            "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": self.id,
        });
        std::fs::write(bundle.join("config.json"), config.to_string()).expect("a bundle");
        let output = bundle.join("output");
        let request = api::CreateTaskRequest {
            id: id.into(),
            bundle: bundle.display().to_string(),
            stdout: format!("file://{}", output.display()),
            rootfs: root.iter().map(crate::shim::mount).collect(),
            ..Default::default()
        };
        self.tasks.create(patience(), &request).map_err(refused)?;
        let request = api::StartRequest { id: id.into(), ..Default::default() };
        self.tasks.start(patience(), &request).map_err(refused)?;
        Ok(output)
    }

    /// Kills a container.
    pub fn kill(&self, id: &str) {
        let request = api::KillRequest { id: id.into(), signal: 9, ..Default::default() };
        let _ = self.tasks.kill(patience(), &request);
    }

    /// Waits for a container's end, and deletes it where `delete` says so.
    ///
    /// # Errors
    /// See [`Self::create`].
    pub fn end_of(&self, id: &str, delete: bool) -> Result<u32, Refused> {
        let request = api::WaitRequest { id: id.into(), ..Default::default() };
        let status = self.tasks.wait(patience(), &request).map_err(refused)?.exit_status;
        if delete {
            let request = api::DeleteRequest { id: id.into(), ..Default::default() };
            self.tasks.delete(patience(), &request).map_err(refused)?;
        }
        Ok(status)
    }

    /// The code with which the Task API refuses to tell the pod's own state, and what it says to a Shutdown.
    ///
    /// # Panics
    /// Where it tells one.
    #[must_use]
    pub fn as_a_task(&self) -> (Code, bool) {
        let request = api::StateRequest { id: self.id.clone(), ..Default::default() };
        let code = self.tasks.state(patience(), &request).map_err(refused).map(drop).expect_err("a pod is no task").0;
        let request = api::ShutdownRequest { id: self.id.clone(), ..Default::default() };
        (code, self.tasks.shutdown(patience(), &request).is_ok())
    }

    /// The pod's bundle.
    #[must_use]
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }
}

/// Reads metrics of version 1 or 2: processor time in nanoseconds, memory in bytes.
///
/// # Panics
/// For another type.
#[must_use]
pub fn read_metrics((kind, bytes): &(String, Vec<u8>)) -> (u64, u64) {
    use containerd_shim_protos::{cgroups, cgroups_v2};
    match kind.as_str() {
        "io.containerd.cgroups.v1.Metrics" => {
            let metrics = cgroups::metrics::Metrics::parse_from_bytes(bytes).expect("metrics");
            (metrics.cpu.usage.total, metrics.memory.usage.usage)
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let metrics = cgroups_v2::metrics::Metrics::parse_from_bytes(bytes).expect("metrics");
            (metrics.cpu.usage_usec * 1000, metrics.memory.usage)
        }
        other => panic!("metrics of type {other}"),
    }
}

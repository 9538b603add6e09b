//! The Sandbox service (`containerd.runtime.sandbox.v1`): containerd makes the pod by it, where its runtime has
//! `sandboxer = "shim"`, and the pod's containers by the Task service of the same socket.
//!
//! ```text
//! start ─▶ CreateSandbox: description, control group, specification ─▶ StartSandbox: boot ─▶ Task.Create … ─▶ StopSandbox ─▶ ShutdownSandbox
//! ```

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api as api;
use containerd_shim_protos::sandbox_async::Sandbox as SandboxService;
use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::asynchronous::TtrpcContext;
use containerd_shim_protos::types::platform::Platform;
use coracle_protocol::oci;
use coracle_sandbox::{Error, ProcessId, Status};
use tokio::sync::Mutex;

use crate::error::answer;
use crate::pod_config::PodConfig;
use crate::shim::Shim;
use crate::{bundle, folder, metrics};

/// What SandboxStatus says, by containerd's words.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service.
pub(crate) struct PodService {
    shim: Arc<Shim>,
    /// The settings of this pod's runtime, where it has some of its own.
    settings: Option<PathBuf>,
    // Set once, by the first stop.
    stopped: AtomicBool,
    // Held across a start, so that there is one.
    pod: Mutex<Option<Described>>,
}

/// A pod that was created.
struct Described {
    spec: oci::Spec,
    started: Option<SystemTime>,
}

impl PodService {
    pub(crate) fn new(shim: Arc<Shim>, settings: Option<PathBuf>) -> Self {
        Self { shim, settings, stopped: AtomicBool::new(false), pod: Mutex::new(None) }
    }

    /// The process that stands for the pod, which is only named `id` by its own containerd.
    fn own(&self, id: &str) -> Result<ProcessId, Error> {
        if id != self.shim.id {
            return Err(Error::NotFound(format!("the pod {id}")));
        }
        Ok(ProcessId { container: id.to_owned(), exec: String::new() })
    }

    async fn create(&self, request: &api::CreateSandboxRequest) -> Result<(), Error> {
        let own = self.own(&request.sandbox_id)?;
        let mut pod = self.pod.lock().await;
        if pod.is_some() {
            return Err(Error::Exists(format!("the pod {}", own.container)));
        }
        if !request.rootfs.is_empty() {
            return Err(Error::Unsupported("a root file system of the pod itself".into()));
        }
        if request.netns_path.is_empty() {
            return Err(Error::Unsupported(
                "the pod asks for the host's own network, which a machine can't share: give it a network namespace"
                    .into(),
            ));
        }
        let config = PodConfig::read(request.options.as_ref())?;
        let text = config.spec(&self.shim.namespace, &own.container, &request.netns_path).to_string();
        // For the action `delete`, which finds there what to give back after a shim that has died.
        bundle::write(Path::new(&request.bundle_path), &text)?;
        let spec: oci::Spec = coracle_protocol::from_json(&text).map_err(|error| Error::Invalid(error.to_string()))?;
        self.shim.set_described();
        self.shim.join_cgroup(bundle::cgroup(&spec)).await?;
        config.write_files(&folder::files(&self.shim.folder))?;
        *pod = Some(Described { spec, started: None });
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<SystemTime, Error> {
        let own = self.own(id)?;
        let mut pod = self.pod.lock().await;
        let pod = pod.as_mut().ok_or_else(|| Error::State(format!("the pod {id} was not created")))?;
        if self.stopped.load(Ordering::Relaxed) {
            return Err(Error::Ended(format!("the pod {id} was stopped")));
        }
        if pod.started.is_some() {
            return Err(Error::State(format!("the pod {id} was started already")));
        }
        let sandbox = self.shim.sandbox_or_new(self.settings.as_deref(), &pod.spec.Annotations)?;
        sandbox.run_pod(&own.container, &pod.spec).await?;
        sandbox.start(&own).await?;
        Ok(*pod.started.insert(SystemTime::now()))
    }

    /// Ends the pod. What has ended already is as it should be.
    async fn stop(&self, id: &str) -> Result<(), Error> {
        let own = self.own(id)?;
        // A start that comes later, or is on its way, does not bring it back.
        self.stopped.store(true, Ordering::Relaxed);
        let Ok(sandbox) = self.shim.sandbox() else { return Ok(()) };
        // A boot that is under way is through with this, and the links are given back before containerd takes the network down.
        sandbox.stop().await?;
        match sandbox.kill(&own, 9).await {
            Ok(()) | Err(Error::NotFound(_) | Error::Ended(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn wait(&self, id: &str) -> Result<coracle_sandbox::Exit, Error> {
        let own = self.own(id)?;
        self.shim.sandbox()?.wait(&own).await
    }

    async fn status(&self, request: &api::SandboxStatusRequest) -> Result<api::SandboxStatusResponse, Error> {
        let own = self.own(&request.sandbox_id)?;
        let started = self.pod.try_lock().ok().and_then(|pod| pod.as_ref()?.started);
        let state = match self.shim.sandbox() {
            Ok(sandbox) => sandbox.state(&own).await.ok(),
            Err(_) => None,
        };
        let ready = state.as_ref().is_some_and(|state| state.status == Status::Running);
        let mut info = HashMap::new();
        if let (true, Ok(sandbox)) = (request.verbose, self.shim.sandbox()) {
            let details = serde_json::json!({
                "version": coracle_protocol::VERSION,
                "endReason": sandbox.end_reason().await?,
                "console": sandbox.console(CONSOLE_LINES).await?,
            });
            info.insert("coracle".to_owned(), details.to_string());
        }
        Ok(api::SandboxStatusResponse {
            sandbox_id: own.container,
            pid: std::process::id(),
            state: if ready { READY } else { NOT_READY }.into(),
            info,
            created_at: started.map(metrics::timestamp).into(),
            exited_at: state.and_then(|state| state.exit).map(|exit| metrics::timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn metrics(&self, id: &str) -> Result<api::SandboxMetricsResponse, Error> {
        let own = self.own(id)?;
        let all: Vec<_> = self.shim.sandbox()?.stats_of_all().await?.into_iter().map(|(_, stats)| stats).collect();
        let packed = metrics::pack(&metrics::sum(&all)).map_err(|error| Error::Failed(error.to_string()))?;
        let mut response = api::SandboxMetricsResponse::new();
        let metric = response.mut_metrics();
        metric.set_timestamp(metrics::timestamp(SystemTime::now()));
        metric.set_id(own.container);
        metric.set_data(packed);
        Ok(response)
    }
}

/// How many lines of the guest's console a verbose status shows.
const CONSOLE_LINES: usize = 20;

/// A processor's architecture by the names that containerd uses (Go's).
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl SandboxService for PodService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::CreateSandboxRequest,
    ) -> Answer<api::CreateSandboxResponse> {
        answer("CreateSandbox", self.create(&request).await)?;
        Ok(api::CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> Answer<api::StartSandboxResponse> {
        let started = answer("StartSandbox", self.start(&request.sandbox_id).await)?;
        Ok(api::StartSandboxResponse {
            pid: std::process::id(),
            created_at: MessageField::some(metrics::timestamp(started)),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, request: api::PlatformRequest) -> Answer<api::PlatformResponse> {
        answer("Platform", self.own(&request.sandbox_id))?;
        let platform = Platform { os: "linux".into(), architecture: architecture().into(), ..Default::default() };
        Ok(api::PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StopSandboxRequest,
    ) -> Answer<api::StopSandboxResponse> {
        answer("StopSandbox", self.stop(&request.sandbox_id).await)?;
        Ok(api::StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::WaitSandboxRequest,
    ) -> Answer<api::WaitSandboxResponse> {
        let exit = answer("WaitSandbox", self.wait(&request.sandbox_id).await)?;
        Ok(api::WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(metrics::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: api::SandboxStatusRequest,
    ) -> Answer<api::SandboxStatusResponse> {
        answer("SandboxStatus", self.status(&request).await)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: api::PingRequest) -> Answer<api::PingResponse> {
        answer("PingSandbox", self.own(&request.sandbox_id))?;
        Ok(api::PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::ShutdownSandboxRequest,
    ) -> Answer<api::ShutdownSandboxResponse> {
        answer("ShutdownSandbox", self.own(&request.sandbox_id))?;
        self.shim.end();
        Ok(api::ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: api::SandboxMetricsRequest,
    ) -> Answer<api::SandboxMetricsResponse> {
        answer("SandboxMetrics", self.metrics(&request.sandbox_id).await)
    }
}

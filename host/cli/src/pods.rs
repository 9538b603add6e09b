//! Pods that run, by their shims' sockets: containerd's, and those of `coracle run`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use containerd_shim_protos::shim_async::Client;
use containerd_shim_protos::ttrpc::{self, Request};
use coracle_protocol::management::{DESCRIBE, Description, METRICS, POD, SOCKET};
use coracle_protocol::metrics::{Families, SHIM, read};
use futures::StreamExt;
use serde_json::Value;
use tokio::sync::OnceCell;

use crate::place;

/// How long a shim may take over what it knows, or its guest says in two seconds.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it may take over what its guest has to do for it.
const WORK_PATIENCE: Duration = Duration::from_secs(30);

/// How many pods are asked at once.
pub(crate) const AT_ONCE: usize = 16;

/// A pod's shim.
#[derive(Clone)]
pub(crate) struct Pod {
    socket: PathBuf,
    /// The connection to it, from the first request on.
    client: OnceCell<Client>,
}

/// The folder in which the pods of this user are.
pub(crate) fn folder() -> Result<PathBuf> {
    if place::is_root() { Ok(coracle_settings::Settings::load()?.run_folder) } else { place::run_folder() }
}

/// All that have a socket. One may be that of a shim which has died.
pub(crate) fn all() -> Result<Vec<Pod>> {
    let folder = folder()?;
    let entries = match std::fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("list the pods in {}", folder.display())),
    };
    let mut sockets: Vec<_> = entries.flatten().map(|pod| pod.path().join(SOCKET)).collect();
    sockets.retain(|socket| socket.exists());
    sockets.sort();
    Ok(sockets.into_iter().map(|socket| Pod { socket, client: OnceCell::new() }).collect())
}

/// Those that answer, with what they are.
pub(crate) async fn described() -> Result<Vec<(Pod, Description)>> {
    Ok(looked_at().await?.0)
}

/// Those that answer, with what they are, and how many are there and do not.
pub(crate) async fn looked_at() -> Result<(Vec<(Pod, Description)>, usize)> {
    let ask = |pod: Pod| async move {
        let about = pod.describe().await.ok();
        // The socket of a shim that has died takes no connection: that one is not silent.
        let is_there = pod.client.initialized();
        (about.map(|about| (pod, about)), is_there)
    };
    let asked: Vec<_> = futures::stream::iter(all()?).map(ask).buffered(AT_ONCE).collect().await;
    let silent = asked.iter().filter(|(about, is_there)| about.is_none() && *is_there).count();
    Ok((asked.into_iter().filter_map(|(about, _)| about).collect(), silent))
}

/// The pod of this name alone, or all that answer where there is no name; and how many are there and do not.
pub(crate) async fn chosen(name: Option<&str>) -> Result<(Vec<(Pod, Description)>, usize)> {
    match name {
        Some(name) => Ok((vec![find(name).await?], 0)),
        None => looked_at().await,
    }
}

/// The pod of this name, or whose id begins with it, or of Kubernetes' name `NAMESPACE/NAME`.
pub(crate) async fn find(name: &str) -> Result<(Pod, Description)> {
    let all = described().await?;
    let is = |about: &Description| {
        let Description { kubernetes, id, .. } = about;
        id == name || !kubernetes.name.is_empty() && name == format!("{}/{}", kubernetes.namespace, kubernetes.name)
    };
    if let Some(found) = all.iter().find(|(_, about)| is(about)) {
        return Ok(found.clone());
    }
    let mut by_start = all.iter().filter(|(_, about)| !name.is_empty() && about.id.starts_with(name));
    match (by_start.next(), by_start.next()) {
        (Some(found), None) => Ok(found.clone()),
        (Some(_), Some(_)) => bail!("{name} is the beginning of more than one pod's id"),
        (None, _) => bail!("no pod {name} runs; `coracle pods` lists those that do"),
    }
}

impl Pod {
    /// The socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Asks the shim.
    pub(crate) async fn call(
        &self,
        service: &str,
        method: &str,
        payload: Vec<u8>,
        patience: Duration,
    ) -> ttrpc::Result<Vec<u8>> {
        let asked = async {
            let connect = async || Client::connect(&format!("unix://{}", self.socket.display())).await;
            let client = self.client.get_or_try_init(connect).await?;
            let mut request = Request::new();
            (request.service, request.method, request.payload) = (service.into(), method.into(), payload);
            request.timeout_nano = i64::try_from(patience.as_nanos()).unwrap_or(i64::MAX);
            Ok(client.request(request).await?.payload)
        };
        let late = |_| ttrpc::Error::Others(format!("no answer within {} s", patience.as_secs()));
        tokio::time::timeout(patience, asked).await.map_err(late)?
    }

    /// Asks the pod itself, in JSON. A refusal is told in its own words.
    pub(crate) async fn ask(&self, method: &str, wanted: &Value) -> Result<Value> {
        match self.call(POD, method, wanted.to_string().into_bytes(), WORK_PATIENCE).await {
            Ok(answer) => serde_json::from_slice(&answer).context("the shim's answer"),
            Err(ttrpc::Error::RpcStatus(status)) => bail!("{}", status.message()),
            Err(error) => Err(error).with_context(|| format!("the pod at {} does not answer", self.socket.display())),
        }
    }

    /// What it is.
    pub(crate) async fn describe(&self) -> Result<Description> {
        let answer = self.call(POD, DESCRIBE, Vec::new(), PATIENCE).await;
        let answer = answer.with_context(|| format!("the pod at {} does not answer", self.socket.display()))?;
        serde_json::from_slice(&answer).context("the shim's description")
    }

    /// Its figures, with the labels by which pods are told apart (Kata: docs/design/kata-2-0-metrics.md).
    pub(crate) async fn figures(&self, about: &Description) -> Result<Families> {
        let answer = self.call(POD, METRICS, Vec::new(), PATIENCE).await;
        let answer = answer.with_context(|| format!("the pod {} does not answer", about.id))?;
        let mut families = read(&String::from_utf8_lossy(&answer), &SHIM).families;
        let kubernetes = &about.kubernetes;
        let mut labels = vec![("sandbox_id", about.id.as_str())];
        if !kubernetes.uid.is_empty() {
            labels.extend([
                ("cri_uid", kubernetes.uid.as_str()),
                ("cri_name", &kubernetes.name),
                ("cri_namespace", &kubernetes.namespace),
            ]);
        }
        families.label(&labels);
        Ok(families)
    }
}

/// The figures of these pods together, and how many have not answered.
pub(crate) async fn figures(pods: Vec<(Pod, Description)>) -> (Families, usize) {
    let ask = |(pod, about): (Pod, Description)| async move { pod.figures(&about).await };
    let mut found = futures::stream::iter(pods).map(ask).buffered(AT_ONCE);
    let (mut families, mut failed) = (Families::default(), 0);
    while let Some(answer) = found.next().await {
        match answer {
            Ok(more) => families.merge(more),
            Err(_) => failed += 1,
        }
    }
    (families, failed)
}

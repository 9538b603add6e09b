//! CreateContainer: from the wire's specification to a process that waits for its start.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_container::New;
use coracle_container::cgroup::Cgroup;
use coracle_faults as faults;
use coracle_protocol::agent::CreateContainerRequest;
use coracle_protocol::protobuf::MessageDyn;
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use oci_spec::runtime::{Hooks, Spec};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::connections::Ports;
use crate::hooks::Point;
use crate::mounts::Mounts;
use crate::process::{Process, Streams};
use crate::state::{Agent, Container, Made};
use crate::thread::{on_thread, to_its_end};
use crate::{Error, Result, devices, diagnostics, oom, remove, storage};

/// Makes the container. One whose request has passed its deadline meanwhile is removed.
pub(crate) async fn create(agent: &Arc<Agent>, request: CreateContainerRequest) -> Result<Empty> {
    let (maker, remover, id) = (Arc::clone(agent), Arc::clone(agent), request.container_id.clone());
    let undo = async move || {
        let Ok(container) = remover.container(&id) else { return };
        match remove::destroy(&remover, &container).await {
            Ok(()) => remover.forget(&id),
            Err(error) => println!("coracle-agent: container {id}, for which nobody waits: {error}"),
        }
    };
    to_its_end(async move { make(&maker, request).await }, undo).await
}

async fn make(agent: &Arc<Agent>, request: CreateContainerRequest) -> Result<Empty> {
    let ports = Ports { stdin: request.stdin_port, stdout: request.stdout_port, stderr: request.stderr_port };
    let named = agent.connections.named(ports).await?;
    let id = request.container_id;
    let _reservation = agent.reserve(&id)?;
    let spec = request.OCI.into_option();
    let mut spec = spec.ok_or_else(|| Error::Invalid("CreateContainer without a specification".into()))?;
    if devices::names_any(&request.devices, &spec) {
        let (devices, mut resolved) = (request.devices, spec);
        // The kernel may not see them yet.
        spec = on_thread(move || devices::resolve(&devices, &mut resolved).map(|()| resolved)).await?;
    }
    let spec: Spec = from_wire(&spec)?;
    let rootfs: PathBuf = spec
        .root()
        .as_ref()
        .map(|root| root.path().clone())
        .filter(|path| path.is_absolute())
        .ok_or_else(|| Error::Invalid("the container's root has no absolute path".into()))?;
    if spec.hooks().as_ref().is_some_and(|hooks| *hooks != Hooks::default()) {
        return Err(Error::Unsupported(
            "a hook in a specification: those of the guest's own folder are run, and it".into(),
        ));
    }
    let folders = storage::shared_folders(&spec);
    let storages = storage::Attached::new(agent, request.storages, folders).await?;
    faults::at("guest.create.storages").await?;
    let terminal = spec.process().as_ref().and_then(oci_spec::runtime::Process::terminal).unwrap_or(false);
    let (theirs, ours) = Streams::new(terminal)?.split();
    let (program, parent) = (agent.config.program.clone(), agent.config.cgroups.clone());
    let pids_of = if request.sandbox_pidns { Some(agent.pause().await?) } else { None };
    let linux = spec.linux().as_ref();
    let (seccomp, personality) =
        (linux.and_then(|linux| linux.seccomp().clone()), linux.and_then(|linux| linux.personality().clone()));
    let (root, termination_log) = (rootfs.clone(), diagnostics::termination_log(&spec));
    let new = New { spec, rootfs, pids_of };
    let name = id.clone();
    let (cgroup, prepared) = on_thread(move || {
        let cgroup = Cgroup::create(&parent, &name)?;
        prepare(&program, &cgroup, new, theirs).map(|prepared| (cgroup, prepared))
    })
    .await?;
    let pid = prepared.pid;
    let (mounts, process) = match (Mounts::of(pid), Process::watch(prepared, ours).await) {
        (Ok(mounts), Ok(process)) => (mounts, process),
        (mounts, Ok(process)) => {
            undo(cgroup, Some(process), None).await;
            return mounts.map(|_| Empty::new());
        }
        (mounts, Err(error)) => {
            undo(cgroup, None, mounts.ok()).await;
            return Err(error);
        }
    };
    if let Err(error) = agent.hooks(Point::Prestart, &id, pid, &root).await {
        undo(cgroup, Some(process), Some(mounts)).await;
        return Err(error);
    }
    if let Some(named) = named {
        named.serve(&id, "", &process).await;
    }
    if pids_of.is_some() {
        kill_rest(&cgroup, &process);
    }
    let oom_watch = oom::watch(&cgroup, id.clone(), agent.oom_sender.clone());
    agent.insert(Container::new(
        Made { id, cgroup, pid, root, termination_log, seccomp, personality, mounts, storages: storages.keep() },
        process,
        oom_watch,
    ));
    Ok(Empty::new())
}

/// Leaves nothing of a container whose create fails. That one's error is the one to tell.
async fn undo(cgroup: Cgroup, process: Option<Arc<Process>>, mounts: Option<Mounts>) {
    let _ = cgroup.kill();
    if let Some(process) = process {
        process.wait().await;
    }
    let _ = on_thread(move || {
        let removed = cgroup.remove();
        if let Some(mounts) = mounts {
            mounts.let_go();
        }
        removed
    })
    .await;
}

/// With a pid namespace of its own a container ends when its first process does; without one this has to see to it.
fn kill_rest(cgroup: &Cgroup, first: &Arc<Process>) {
    let (cgroup, first) = (cgroup.clone(), Arc::clone(first));
    tokio::spawn(async move {
        first.wait().await;
        // A container that was removed meanwhile has no processes.
        let _ = cgroup.kill();
    });
}

fn prepare(
    program: &Path,
    cgroup: &Cgroup,
    new: New,
    stdio: coracle_container::Stdio,
) -> coracle_container::Result<coracle_container::Prepared> {
    let resources = new.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let devices = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let limited = resources.map_or(Ok(()), |resources| cgroup.apply(resources));
    let limited = limited.and_then(|()| cgroup.restrict_devices(devices));
    let prepared = limited.and_then(|()| coracle_container::create(program, cgroup.path(), new, stdio));
    if prepared.is_err() {
        // The first error is the one to tell; an empty cgroup is all that could stay.
        let _ = cgroup.kill().and_then(|()| cgroup.remove());
    }
    prepared
}

/// A structure of the OCI specification from its message.
pub(crate) fn from_wire<T: DeserializeOwned>(message: &dyn MessageDyn) -> Result<T> {
    let mut value = coracle_protocol::to_json(message);
    to_oci_names(&mut value);
    serde_json::from_value(value).map_err(|error| Error::Invalid(format!("the specification is not valid: {error}")))
}

/// Kata's runtime writes namespaces and capabilities in their short form: `mnt`, `net`, `NET_RAW`.
fn to_oci_names(value: &mut Value) {
    if let Some(namespaces) = value.pointer_mut("/linux/namespaces").and_then(Value::as_array_mut) {
        for kind in namespaces.iter_mut().filter_map(|namespace| namespace.get_mut("type")) {
            match kind.as_str() {
                Some("mnt") => *kind = "mount".into(),
                Some("net") => *kind = "network".into(),
                _ => {}
            }
        }
    }
    for sets in ["/process/capabilities", "/capabilities"] {
        let Some(sets) = value.pointer_mut(sets).and_then(Value::as_object_mut) else { continue };
        for name in sets.values_mut().filter_map(Value::as_array_mut).flatten() {
            if let Some(short) = name.as_str().filter(|name| !name.starts_with("CAP_")) {
                *name = format!("CAP_{short}").into();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use coracle_protocol::oci;

    use super::*;

    #[test]
    fn katas_short_names_are_understood() {
        let json = r#"{"ociVersion":"1.0.2","root":{"path":"/r"},"process":{"args":["a"],"cwd":"/","user":{"uid":1},
            "capabilities":{"bounding":["NET_RAW","CAP_KILL"]},"rlimits":[{"type":"RLIMIT_CORE"}]},
            "linux":{"namespaces":[{"type":"mnt"},{"type":"net"},{"type":"pid"}],"resources":{"pids":{}}}}"#;
        let message: oci::Spec = coracle_protocol::from_json(json).unwrap();
        let spec: Spec = from_wire(&message).unwrap();
        let capabilities = spec.process().as_ref().unwrap().capabilities().as_ref().unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 2);
        assert_eq!(spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap().len(), 3);
    }

    #[test]
    fn an_unknown_namespace_is_refused() {
        let json = r#"{"root":{"path":"/r"},"linux":{"namespaces":[{"type":"bogus"}]}}"#;
        let message: oci::Spec = coracle_protocol::from_json(json).unwrap();
        assert!(from_wire::<Spec>(&message).is_err());
    }
}

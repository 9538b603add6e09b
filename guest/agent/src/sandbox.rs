//! CreateSandbox and DestroySandbox: what all containers of the pod share.

use std::path::PathBuf;
use std::sync::Arc;

use coracle_protocol::agent::{CreateSandboxRequest, DestroySandboxRequest};
use coracle_protocol::paths;
use coracle_protocol::protobuf::well_known_types::empty::Empty;

use crate::state::Agent;
use crate::{Error, Result, remove, storage};

/// Sets the pod up.
pub(crate) async fn create(agent: &Arc<Agent>, request: CreateSandboxRequest) -> Result<Empty> {
    if let Some(module) = request.kernel_modules.first() {
        return Err(Error::Unsupported(format!("the kernel module {}", module.name)));
    }
    if !request.guest_hook_path.is_empty() {
        let folder = PathBuf::from(&request.guest_hook_path);
        // Programs of the guest image, and none that the host brings along by the folder that it shares.
        let real = std::fs::canonicalize(&folder).unwrap_or_else(|_| folder.clone());
        let climbs = folder.components().any(|part| part == std::path::Component::ParentDir);
        if !folder.is_absolute() || climbs || real.starts_with(paths::STATE) {
            return Err(Error::Invalid(format!("{} is no folder of the guest image", folder.display())));
        }
        // A pod is set up once; who does it again may not change what its containers are held to.
        if agent.hooks.get_or_init(|| folder.clone()) != &folder {
            return Err(Error::State("the pod has another folder of hooks".into()));
        }
    }
    if !request.dns.is_empty() {
        let lines: String = request.dns.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&agent.config.resolv_conf, lines).map_err(Error::system("set the guest's name servers"))?;
    }
    if request.sandbox_pidns {
        agent.pause().await?;
    }
    if !request.hostname.is_empty() {
        std::fs::write("/proc/sys/kernel/hostname", &request.hostname).map_err(Error::system("set the host name"))?;
    }
    // They live as long as the pod.
    storage::Attached::new(agent, request.storages, Vec::new()).await?.keep();
    Ok(Empty::new())
}

/// Ends all containers.
pub(crate) async fn destroy(agent: &Arc<Agent>, _: DestroySandboxRequest) -> Result<Empty> {
    for container in agent.all() {
        remove::destroy(agent, &container).await?;
        agent.forget(&container.id);
    }
    Ok(Empty::new())
}

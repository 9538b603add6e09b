//! The pod's network: taken over from its namespace before the boot, told to the guest after it.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use coracle_machine::{AgentAddress, Device, Tap};
use coracle_network::{Link, Namespace, plan};
use coracle_protocol::agent::{AddARPNeighborsRequest, UpdateInterfaceRequest, UpdateRoutesRequest};
use coracle_protocol::oci;
use coracle_protocol::protobuf::MessageField;

use tokio::sync::OwnedRwLockReadGuard;

use crate::agent::{Agent, Patience};
use crate::forward::Forward;
use crate::{Result, spec};

/// Gives back the links of the pod that `spec` describes, after one that could not do so itself.
pub async fn give_back_network(spec: &oci::Spec) {
    // A specification that is refused has taken none.
    if let Ok(Some(path)) = spec::network(spec) {
        coracle_network::give_back(&path).await;
    }
}

/// A network that was taken over. Dropping this gives the links back.
pub(crate) struct Network {
    namespace: Namespace,
    // Read when the guest is told, taken out when they are given back.
    links: Mutex<Vec<Link>>,
    // Held from before the first link is taken until after the last one was given back.
    held: Mutex<Option<OwnedRwLockReadGuard<()>>>,
}

impl Network {
    /// Takes over the links of the namespace at `path`; each comes back as a device, too.
    ///
    /// `held` is held meanwhile, so that [`crate::Sandbox::stop`] can wait for one that was given up.
    pub(crate) async fn take(path: &Path, held: OwnedRwLockReadGuard<()>) -> Result<(Self, Vec<Device>)> {
        let namespace = Namespace::open(path).await?;
        let links = namespace.links().await?;
        let network = Self { namespace, links: Mutex::default(), held: Mutex::new(Some(held)) };
        let mut devices = Vec::new();
        for link in links {
            let tap = Tap::new(network.namespace.connect(&link).await?);
            devices.push(Device::Net { mac: link.mac, tap });
            network.lock().push(link);
        }
        Ok((network, devices))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the namespace had links at all.
    pub(crate) fn has_links(&self) -> bool {
        !self.lock().is_empty()
    }

    /// Tells the guest of its interfaces.
    pub(crate) async fn tell(&self, agent: &Agent) -> Result<()> {
        let links = self.lock().clone();
        for link in &links {
            let interface = MessageField::some(plan::interface(link));
            let request = UpdateInterfaceRequest { interface, ..Default::default() };
            agent
                .call("UpdateInterface", Patience::Bounded, async |agent, ctx| {
                    agent.update_interface(ctx, &request).await
                })
                .await?;
        }
        let routes = plan::routes(&links);
        if !routes.Routes.is_empty() {
            let request = UpdateRoutesRequest { routes: MessageField::some(routes), ..Default::default() };
            agent
                .call("UpdateRoutes", Patience::Bounded, async |agent, ctx| agent.update_routes(ctx, &request).await)
                .await?;
        }
        let neighbours = plan::neighbours(&links);
        if !neighbours.ARPNeighbors.is_empty() {
            let request = AddARPNeighborsRequest { neighbors: MessageField::some(neighbours), ..Default::default() };
            agent
                .call("AddARPNeighbors", Patience::Bounded, async |agent, ctx| {
                    agent.add_arp_neighbors(ctx, &request).await
                })
                .await?;
        }
        Ok(())
    }

    /// Lets the loopback of the namespace lead to the guest's.
    pub(crate) async fn forward(&self, address: AgentAddress) -> Result<Forward> {
        Forward::start(&self.namespace, address).await
    }

    /// Gives the links back as they were, once.
    pub(crate) async fn give_back(&self) {
        let links = std::mem::take(&mut *self.lock());
        for link in &links {
            self.namespace.disconnect(link).await;
        }
        drop(self.held.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let (namespace, links) = (self.namespace.clone(), std::mem::take(&mut *self.lock()));
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Where the pod was stopped in order there is nothing left to undo.
        tokio::spawn(async move {
            for link in &links {
                namespace.disconnect(link).await;
            }
            drop(held);
        });
    }
}

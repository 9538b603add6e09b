//! The pod's network: taken over from its namespace before the boot, told to the guest after it.

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use coracle_machine::{AgentAddress, Device, Tap};
use coracle_network::{Contents, Link, Namespace, Route, plan};
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
    taken: Mutex<Taken>,
}

/// Links that were taken over.
#[derive(Default)]
struct Taken {
    links: Vec<Link>,
    /// Routes that lead nowhere.
    barred: Vec<Route>,
    /// Held from before the first link is taken until after the last one was given back.
    _held: Option<OwnedRwLockReadGuard<()>>,
}

impl Taken {
    async fn give_back(self, namespace: &Namespace) {
        for link in &self.links {
            namespace.disconnect(link).await;
        }
    }
}

impl Network {
    /// Takes over the links of the namespace at `path`; each comes back as a device, too.
    ///
    /// `held` is held meanwhile, so that [`crate::Sandbox::stop`] can wait for one that was given up.
    pub(crate) async fn take(path: &Path, held: OwnedRwLockReadGuard<()>) -> Result<(Self, Vec<Device>)> {
        let namespace = Namespace::open(path).await?;
        let Contents { links, barred } = namespace.free_contents(path).await?;
        let network = Self { namespace, taken: Mutex::new(Taken { links: Vec::new(), barred, _held: Some(held) }) };
        let mut devices = Vec::new();
        for link in links {
            let tap = Tap::new(network.namespace.connect(&link).await?);
            devices.push(Device::Net { mac: link.mac, tap });
            network.lock().links.push(link);
        }
        Ok((network, devices))
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the namespace had links at all.
    pub(crate) fn has_links(&self) -> bool {
        !self.lock().links.is_empty()
    }

    /// Tells the guest of its interfaces.
    pub(crate) async fn tell(&self, agent: &Agent) -> Result<()> {
        let contents = {
            let taken = self.lock();
            Contents { links: taken.links.clone(), barred: taken.barred.clone() }
        };
        for link in &contents.links {
            let interface = MessageField::some(plan::interface(link));
            let request = UpdateInterfaceRequest { interface, ..Default::default() };
            agent
                .call("UpdateInterface", Patience::Bounded, async |agent, ctx| {
                    agent.update_interface(ctx, &request).await
                })
                .await?;
        }
        let routes = plan::routes(&contents);
        if !routes.Routes.is_empty() {
            let request = UpdateRoutesRequest { routes: MessageField::some(routes), ..Default::default() };
            agent
                .call("UpdateRoutes", Patience::Bounded, async |agent, ctx| agent.update_routes(ctx, &request).await)
                .await?;
        }
        let neighbours = plan::neighbours(&contents.links);
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
        let taken = std::mem::take(&mut *self.lock());
        taken.give_back(&self.namespace).await;
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let (namespace, taken) = (self.namespace.clone(), std::mem::take(&mut *self.lock()));
        // Where the pod was stopped in order there is nothing left to undo.
        tokio::spawn(async move { taken.give_back(&namespace).await });
    }
}

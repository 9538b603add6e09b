//! The pod's network: taken over from its namespace before the boot, told to the guest after it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use coracle_machine::{AgentAddress, Descriptor, Device};
use coracle_network::{Contents, Link, Namespace, Route, plan};
use coracle_protocol::agent::{AddARPNeighborsRequest, UpdateInterfaceRequest, UpdateRoutesRequest};
use coracle_protocol::oci;
use coracle_protocol::protobuf::MessageField;

use tokio::sync::OwnedRwLockReadGuard;

use crate::agent::{Agent, Patience};
use crate::forward::Forward;
use crate::{Error, Result, spec};

/// The file of a pod's folder that names the links which it has taken, by their numbers in their namespace, one a line.
const TAKEN: &str = "links";

/// The links that a pod, whose folder this is, has taken and not given back.
#[must_use]
pub fn taken_links(folder: &Path) -> Vec<u32> {
    let text = std::fs::read_to_string(folder.join(TAKEN)).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn note_taken(folder: &Path, links: &[u32]) -> Result<()> {
    let text: String = links.iter().map(|link| format!("{link}\n")).collect();
    let path = folder.join(TAKEN);
    std::fs::write(&path, text).map_err(|error| Error::Failed(format!("write {}: {error}", path.display())))
}

/// Gives back links of the pod that `spec` describes, after one that could not do so itself.
pub async fn give_back_network(spec: &oci::Spec, links: &[u32]) {
    // A specification that is refused has taken none.
    if let Ok(Some(path)) = spec::network(spec) {
        coracle_network::give_back(&path, links).await;
    }
}

/// A network that was taken over. Dropping this gives the links back.
pub(crate) struct Network {
    namespace: Namespace,
    folder: PathBuf,
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
    /// Gives them back, of the pod in `folder`.
    async fn give_back(self, namespace: &Namespace, folder: &Path) {
        for link in &self.links {
            namespace.disconnect(link.index).await;
        }
        if !self.links.is_empty() {
            // A folder that is gone names none either.
            let _ = std::fs::remove_file(folder.join(TAKEN));
        }
    }
}

impl Network {
    /// Takes over the links of the namespace at `path`; each comes back as a device, too. Which they are is noted in the pod's
    /// `folder`, for whoever has to give them back where this process can't.
    ///
    /// `held` is held meanwhile, so that [`crate::Sandbox::stop`] can wait for one that was given up.
    pub(crate) async fn take(
        path: &Path,
        folder: &Path,
        held: OwnedRwLockReadGuard<()>,
    ) -> Result<(Self, Vec<Device>)> {
        let namespace = Namespace::open(path).await?;
        let Contents { links, barred } = namespace.free_contents(path).await?;
        let network = Self {
            namespace,
            folder: folder.to_owned(),
            taken: Mutex::new(Taken { links: Vec::new(), barred, _held: Some(held) }),
        };
        let (mut devices, mut noted) = (Vec::new(), Vec::new());
        for link in links {
            noted.push(link.index);
            note_taken(folder, &noted)?;
            let tap = match network.namespace.connect(&link).await {
                Ok(tap) => Descriptor::new(tap),
                Err(error) => {
                    // What it has is somebody else's.
                    noted.pop();
                    note_taken(folder, &noted)?;
                    return Err(error.into());
                }
            };
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
        tell(agent, &contents).await
    }

    /// Lets the loopback of the namespace lead to the guest's.
    pub(crate) async fn forward(&self, address: AgentAddress) -> Result<Forward> {
        Forward::start(&self.namespace, address).await
    }

    /// Gives the links back as they were, once.
    pub(crate) async fn give_back(&self) {
        let taken = std::mem::take(&mut *self.lock());
        taken.give_back(&self.namespace, &self.folder).await;
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let (namespace, folder) = (self.namespace.clone(), self.folder.clone());
        let taken = std::mem::take(&mut *self.lock());
        // Where the pod was stopped in order there is nothing left to undo.
        tokio::spawn(async move { taken.give_back(&namespace, &folder).await });
    }
}

/// Tells the guest of its interfaces, routes and neighbours.
pub(crate) async fn tell(agent: &Agent, contents: &Contents) -> Result<()> {
    for link in &contents.links {
        let interface = MessageField::some(plan::interface(link));
        let request = UpdateInterfaceRequest { interface, ..Default::default() };
        agent
            .call("UpdateInterface", Patience::Bounded, async |agent, ctx| agent.update_interface(ctx, &request).await)
            .await?;
    }
    let routes = plan::routes(contents);
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
            .call("AddARPNeighbors", Patience::Bounded, async |agent, ctx| agent.add_arp_neighbors(ctx, &request).await)
            .await?;
    }
    Ok(())
}

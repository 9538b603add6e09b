//! The pod's network: taken over from its namespace before the boot, told to the guest after it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use coracle_machine::{AgentAddress, Descriptor, Device, Machine};
use coracle_network::{Contents, Hold, Link, Namespace, Options, Route, plan};
use coracle_protocol::agent::{AddARPNeighborsRequest, UpdateInterfaceRequest, UpdateRoutesRequest};
use coracle_protocol::oci;
use coracle_protocol::protobuf::MessageField;

use tokio::sync::OwnedRwLockReadGuard;

use crate::agent::{Agent, Patience};
use crate::forward::Forward;
use crate::{Error, Result, spec};

/// The file of a pod's folder that names the links which it has taken, one a line.
const TAKEN: &str = "links";

/// What it takes to give back the links that a pod, whose folder this is, has taken and not given back.
#[must_use]
pub fn taken_links(folder: &Path) -> Vec<Hold> {
    let text = std::fs::read_to_string(folder.join(TAKEN)).unwrap_or_default();
    text.lines().filter_map(Hold::parse).collect()
}

fn note_taken<'a>(folder: &Path, holds: impl Iterator<Item = &'a Hold>) -> Result<()> {
    let text: String = holds.map(|hold| hold.line() + "\n").collect();
    let (path, fresh) = (folder.join(TAKEN), folder.join(format!("{TAKEN}.new")));
    // Whoever is killed meanwhile has left the one or the other.
    let written = std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, &path));
    written.map_err(|error| Error::Failed(format!("write {}: {error}", path.display())))
}

/// Gives back links of the pod that `spec` describes, after one that could not do so itself.
///
/// Without a specification, or one that names no namespace, the devices among them are the host's again.
pub async fn give_back_network(spec: Option<&oci::Spec>, links: &[Hold]) {
    match spec.map(spec::network) {
        Some(Ok(Some(path))) => coracle_network::give_back(&path, links).await,
        _ => coracle_network::give_devices_back(links).await,
    }
}

/// A network that was taken over. Dropping this gives the links back.
pub(crate) struct Network {
    namespace: Namespace,
    folder: PathBuf,
    options: Options,
    /// Whether the machine can have the devices that links are.
    has_functions: bool,
    // Read when the guest is told, taken out when they are given back.
    taken: Mutex<Taken>,
    /// Held by who looks for links that have come or gone.
    scan: tokio::sync::Mutex<()>,
}

/// Links that were taken over.
#[derive(Default)]
struct Taken {
    links: Vec<TakenLink>,
    /// Routes that lead nowhere.
    barred: Vec<Route>,
    /// Whether the guest knows them as they are.
    is_told: bool,
    /// Whether links were looked for since the boot.
    is_scanned: bool,
    /// Whether they were given back: then there are no more.
    is_over: bool,
    /// Held from before the first link is taken until after the last one was given back.
    _held: Option<OwnedRwLockReadGuard<()>>,
}

#[derive(Clone)]
struct TakenLink {
    link: Link,
    hold: Hold,
    device: Device,
}

impl Taken {
    /// Gives them back, of the pod in `folder`.
    async fn give_back(self, namespace: &Namespace, folder: &Path) {
        for taken in self.links.iter().rev() {
            namespace.disconnect(&taken.hold).await;
        }
        // A folder that is gone names none either.
        let _ = std::fs::remove_file(folder.join(TAKEN));
    }
}

impl Network {
    /// Takes over the links of the namespace at `path`; each comes back as a device, too. Which they are is noted in the pod's
    /// `folder`, for whoever has to give them back where this process can't.
    ///
    /// `has_functions` is whether the machine can have the devices that links are. `held` is held meanwhile, so that [`crate::Sandbox::stop`] can wait for one that was given up.
    pub(crate) async fn take(
        path: &Path,
        folder: &Path,
        options: Options,
        has_functions: bool,
        held: OwnedRwLockReadGuard<()>,
    ) -> Result<(Self, Vec<Device>)> {
        let namespace = Namespace::open(path).await?;
        let Contents { links, barred } = namespace.free_contents(path, options.model).await?;
        let network = Self {
            namespace,
            folder: folder.to_owned(),
            options,
            has_functions,
            taken: Mutex::new(Taken { barred, _held: Some(held), ..Taken::default() }),
            scan: tokio::sync::Mutex::default(),
        };
        let mut devices = Vec::new();
        for link in links {
            let taken = network.connect(link).await?;
            devices.push(taken.device.clone());
            network.lock().links.push(taken);
        }
        Ok((network, devices))
    }

    /// Takes one link over. It is noted before that, and no longer where that fails.
    async fn connect(&self, link: Link) -> Result<TakenLink> {
        let hold = self.namespace.hold(&link, &self.options, self.has_functions).await?;
        let noted: Vec<Hold> = self.lock().links.iter().map(|taken| taken.hold.clone()).collect();
        note_taken(&self.folder, noted.iter().chain([&hold]))?;
        match self.namespace.connect(&link, &self.options, &hold).await {
            Ok(taken) => {
                let device = match taken {
                    coracle_network::Taken::Queues(taps) => {
                        Device::Net { mac: link.mac, taps: taps.into_iter().map(Descriptor::new).collect() }
                    }
                    coracle_network::Taken::Function(address) => Device::Vfio { address, by_iommufd: false },
                };
                Ok(TakenLink { link, hold, device })
            }
            Err(error) => {
                // What it has is somebody else's.
                note_taken(&self.folder, noted.iter())?;
                Err(error.into())
            }
        }
    }

    /// Takes over links that have come since, and lets go of those that have gone: a runtime may make them after the container was.
    /// `gains` is whether the machine gains and loses links while it runs. It is not given up halfway: nobody would know of a link.
    pub(crate) async fn rescan(&self, machine: &dyn Machine, agent: &Agent, gains: bool) -> Result<()> {
        let _alone = self.scan.lock().await;
        if self.lock().is_over {
            return Ok(());
        }
        let known: Vec<TakenLink> = self.lock().links.clone();
        let present = self.namespace.others().await?;
        let is_known = |index: &u32| known.iter().any(|taken| taken.link.index == *index);
        let mut fresh = Vec::new();
        // What is there already was looked at, and is not judged again.
        if present.iter().any(|index| !is_known(index)) {
            match self.namespace.contents(self.options.model).await {
                Ok(found) => {
                    fresh = found.links.into_iter().filter(|link| !is_known(&link.index)).collect();
                    self.lock().barred = found.barred;
                }
                // Whoever changes the namespace of a pod that runs does not keep its containers from starting again.
                Err(error) if self.lock().is_scanned => log::warn!("no link is taken over: {error}"),
                Err(error) => return Err(error.into()),
            }
        }
        // One that is there without an address is still what it was.
        // (A device that the machine has itself is no link meanwhile.)
        let is_gone = |taken: &&TakenLink| !present.contains(&taken.link.index) && taken.hold.function.is_none();
        let gone = known.iter().filter(is_gone);
        for taken in gone {
            if gains {
                machine.detach(taken.device.clone()).await.unwrap_or_else(|error| {
                    log::warn!("the network link {} stays in the machine: {error}", taken.link.name);
                });
            }
            let mut all = self.lock();
            all.links.retain(|other| other.link.index != taken.link.index);
            all.is_told = false;
        }
        let outcome = self.gain(machine, fresh, gains).await;
        let noted: Vec<Hold> = self.lock().links.iter().map(|taken| taken.hold.clone()).collect();
        note_taken(&self.folder, noted.iter())?;
        outcome?;
        self.lock().is_scanned = true;
        if self.lock().is_told { Ok(()) } else { self.tell(agent).await }
    }

    async fn gain(&self, machine: &dyn Machine, fresh: Vec<Link>, gains: bool) -> Result<()> {
        if let Some(link) = fresh.first().filter(|_| !gains) {
            return Err(Error::Unsupported(format!(
                "the network link {} came after the pod's machine was started, and this monitor's machines gain none: make it before",
                link.name
            )));
        }
        for link in fresh {
            let taken = self.connect(link).await?;
            if let Err(error) = machine.attach(taken.device.clone()).await {
                self.namespace.disconnect(&taken.hold).await;
                return Err(error.into());
            }
            let mut all = self.lock();
            all.links.push(taken);
            all.is_told = false;
        }
        Ok(())
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
            let links = taken.links.iter().map(|taken| taken.link.clone()).collect();
            Contents { links, barred: taken.barred.clone() }
        };
        tell(agent, &plan::for_guest(&contents, self.options.model)).await?;
        self.lock().is_told = true;
        Ok(())
    }

    /// Lets the loopback of the namespace lead to the guest's.
    pub(crate) async fn forward(&self, address: AgentAddress) -> Result<Forward> {
        Forward::start(&self.namespace, address).await
    }

    /// Gives the links back as they were, once.
    pub(crate) async fn give_back(&self) {
        // What is being taken over is given back with the rest.
        let _alone = self.scan.lock().await;
        let taken = std::mem::replace(&mut *self.lock(), Taken { is_over: true, ..Taken::default() });
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

//! A network namespace, over a netlink socket that was made in it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coracle_machine::PciAddress;
use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::{Handle, LinkUnspec};

use crate::{
    Address, Contents, Error, Function, Hold, Link, Model, Options, Result, Steered, Switches, filter, function, limit,
    macvtap, read, routed, steer, switches, tap,
};

/// What becomes of a link that is taken over.
#[derive(Debug)]
pub enum Taken {
    /// The other end of what stands beside it, a descriptor a pair of queues; it lives as long as they.
    Queues(Vec<OwnedFd>),
    /// The PCI device that it was.
    Function(PciAddress),
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Namespace {
    file: Arc<File>,
    handle: Handle,
}

/// The kernel's refusal of a step.
pub(crate) fn kernel(step: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    let step = step.into();
    move |source| Error::Kernel { step, source }
}

impl Namespace {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// [`Error::Namespace`].
    pub async fn open(path: &Path) -> Result<Self> {
        let failed = |source| Error::Namespace { path: path.display().to_string(), source };
        let file = Arc::new(File::open(path).map_err(failed)?);
        if is_hosts(&file) {
            return Err(Error::Host { path: path.display().to_string() });
        }
        let (connection, handle, _) = inside(&file, rtnetlink::new_connection).await.map_err(failed)?;
        // It ends with the last handle.
        tokio::spawn(connection);
        Ok(Self { file, handle })
    }

    /// What a pod takes over, of a namespace in which no process lives: its links would be gone.
    ///
    /// # Errors
    /// [`Error::Inhabited`]; as [`Self::contents`].
    pub async fn free_contents(&self, path: &Path, model: Model) -> Result<Contents> {
        let namespace = Arc::clone(&self.file);
        let found = tokio::task::spawn_blocking(move || inhabitant(&namespace)).await.map_err(std::io::Error::other);
        let failed = |source| Error::System { step: format!("look who uses {}", path.display()), source };
        match found.and_then(|found| found).map_err(failed)? {
            Some((pid, name)) => Err(Error::Inhabited { path: path.display().to_string(), pid, name }),
            None => self.contents(model).await,
        }
    }

    /// What there is to take over in this way.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a link of a kind that is not taken over, [`Error::TooMany`], [`Error::Clash`], [`Error::Route`],
    /// [`Error::Kernel`].
    pub async fn contents(&self, model: Model) -> Result<Contents> {
        read::contents(&self.handle, model).await
    }

    /// Takes a link over, to give back what `hold` says ([`Self::hold`]).
    ///
    /// # Errors
    /// [`Error::System`], [`Error::Kernel`], [`Error::Model`]; then the link is as it was.
    pub async fn connect(&self, link: &Link, options: &Options, hold: &Hold) -> Result<Taken> {
        if let Some(function) = &hold.function {
            let taken = self.take_function(function, options).await;
            if taken.is_err() {
                self.disconnect(hold).await;
            }
            return taken;
        }
        self.take_queues(link, options, hold).await.map(Taken::Queues)
    }

    async fn take_function(&self, function: &Function, options: &Options) -> Result<Taken> {
        if options.to_guest.is_some() || options.from_guest.is_some() {
            let why = "there is nothing between it and the guest that could be limited".into();
            return Err(Error::Function { name: function.name.clone(), why });
        }
        let own = function.clone();
        let handed_over = tokio::task::spawn_blocking(move || function::hand_over(&own)).await;
        let failed =
            |error: tokio::task::JoinError| Error::Function { name: function.name.clone(), why: error.to_string() };
        handed_over.map_err(failed)??;
        Ok(Taken::Function(function.rebind.address))
    }

    async fn take_queues(&self, link: &Link, options: &Options, hold: &Hold) -> Result<Vec<OwnedFd>> {
        match options.model {
            Model::Macvtap => {
                macvtap::check(link)?;
                if options.to_guest.is_some() || options.from_guest.is_some() {
                    return Err(Error::Limits { name: link.name.clone() });
                }
                let taken = self.take_macvtap(link, hold, options.queues).await;
                if taken.is_err() {
                    self.disconnect(hold).await;
                }
                taken
            }
            Model::None => Err(Error::Model { name: link.name.clone(), kind: link.kind.clone(), model: "none" }),
            Model::TcFilter | Model::Routed => {
                let (queues, tap) = self.make_tap(link, options.queues).await?;
                if options.model == Model::TcFilter {
                    // It undoes what it has done by itself: what else is there at that place is somebody else's.
                    filter::join(&self.handle, link.index, tap).await?;
                }
                let joined = async {
                    if options.model == Model::Routed {
                        self.make_router(link, hold.switches).await?;
                        routed::join(&self.handle, link, tap).await?;
                    }
                    if let Some(bits) = options.to_guest {
                        limit::limit(&self.handle, tap, bits).await?;
                    }
                    match options.from_guest {
                        Some(bits) => limit::limit(&self.handle, link.index, bits).await,
                        None => Ok(()),
                    }
                };
                if let Err(error) = joined.await {
                    // A limit that could not be set is somebody else's.
                    self.disconnect(&Hold { is_limited: false, ..hold.clone() }).await;
                    return Err(error);
                }
                Ok(queues)
            }
        }
    }

    /// Makes a tap beside `link`: its descriptors and number.
    async fn make_tap(&self, link: &Link, queues: u16) -> Result<(Vec<OwnedFd>, u32)> {
        let name = tap_name(link.index);
        let own = name.clone();
        let failed = |source| Error::System { step: format!("make the tap {name}"), source };
        let fds = inside(&self.file, move || tap::make(&own, queues)).await.map_err(failed)?;
        let index = self.number(&name).await?.ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        let change = LinkUnspec::new_with_index(index).mtu(link.mtu).up().build();
        self.handle.link().set(change).execute().await.map_err(kernel(format!("start the tap {name}")))?;
        Ok((fds, index))
    }

    async fn take_macvtap(&self, link: &Link, hold: &Hold, queues: u16) -> Result<Vec<OwnedFd>> {
        let name = tap_name(link.index);
        self.set_switches(&link.name, Switches { is_silent_v4: true, ..hold.switches }).await?;
        macvtap::make(&self.handle, link, &hold.v6, &name).await?;
        let own = name.clone();
        let opened = inside(&self.file, move || macvtap::open(&own, queues)).await;
        opened.map_err(|source| Error::System { step: format!("open the macvtap {name}"), source })
    }

    /// The number of the link of this name.
    async fn number(&self, name: &str) -> Result<Option<u32>> {
        match self.handle.link().get().match_name(name.to_owned()).execute().try_next().await {
            Ok(found) => Ok(found.map(|message| message.header.index)),
            // ENODEV: there is none.
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => Ok(None),
            Err(error) => Err(kernel(format!("find the link {name}"))(error)),
        }
    }

    /// What it will take to give a link back. `has_functions` is whether the machine can have a device that a link is.
    ///
    /// # Errors
    /// [`Error::Function`] for a device that can't be handed over;     /// [`Error::System`] where the namespace can't be entered.
    pub async fn hold(&self, link: &Link, options: &Options, has_functions: bool) -> Result<Hold> {
        let name = link.name.clone();
        let switches = inside(&self.file, move || Ok(switches::read(&name))).await;
        let failed = |source| Error::System { step: "look at the switches of the pod's namespace".into(), source };
        let mut hold = Hold::of(link, options, switches.map_err(failed)?);
        if options.model != Model::Routed {
            hold.function = function::of(link)?;
        }
        if hold.function.is_some() && !has_functions {
            let why = "this monitor's machines take none (QEMU's PC does: `machine.monitor`, `machine.type`)".into();
            return Err(Error::Function { name: link.name.clone(), why });
        }
        if options.model == Model::Macvtap {
            // Those that the kernel has given it, too.
            hold.v6 = read::addresses_v6(&self.handle, link.index).await?;
        }
        Ok(hold)
    }

    async fn set_switches(&self, link: &str, wanted: Switches) -> Result<()> {
        let name = link.to_owned();
        let failed = |source| Error::System { step: "set the switches of the pod's namespace".into(), source };
        inside(&self.file, move || switches::write(&name, wanted)).await.map_err(failed)
    }

    /// Lets the namespace be a router for the link's addresses, and what its tap brings.
    async fn make_router(&self, link: &Link, before: Switches) -> Result<()> {
        let has = |is_v6: bool| link.addresses.iter().any(|address| address.ip.is_ipv6() == is_v6);
        let wanted = Switches {
            forwards_v4: before.forwards_v4 || has(false),
            forwards_v6: before.forwards_v6 || has(true),
            answers_v6: before.answers_v6 || has(true),
            ..before
        };
        self.set_switches(&link.name, wanted).await?;
        let tap = tap_name(link.index);
        let failed = |source| Error::System { step: "let a tap bring what the namespace has elsewhere".into(), source };
        inside(&self.file, move || routed::accept_own(&tap)).await.map_err(failed)
    }

    /// The numbers of all links but loopback and those that stand beside links that were taken over.
    ///
    /// # Errors
    /// [`Error::Kernel`].
    pub async fn others(&self) -> Result<Vec<u32>> {
        let all: Vec<_> = self.handle.link().get().execute().try_collect().await.map_err(kernel("list the links"))?;
        let others = all.iter().filter(|message| !read::is_loopback(message) && !read::is_own(message));
        Ok(others.map(|message| message.header.index).collect())
    }

    /// Listens on every TCP port of the namespace's loopback, whoever else may listen there.
    ///
    /// # Errors
    /// [`Error::System`], where the kernel is older than 5.17 for one.
    pub async fn steer_loopback(&self) -> Result<Steered> {
        let namespace = Arc::clone(&self.file);
        let steered = inside(&self.file, move || steer::all_ports(&*namespace)).await;
        steered.map_err(|source| Error::System { step: "steer the loopback of the pod's namespace".into(), source })
    }

    /// Undoes what [`Self::connect`] has done to a link itself. One that is gone is no error.
    pub async fn disconnect(&self, hold: &Hold) {
        if let Some(function) = &hold.function {
            take_function_back(function).await;
            function::give_link_back(hold, function, &*self.file).await;
            let up = async {
                let index = self.number(&function.name).await?.ok_or_else(|| Error::Function {
                    name: function.name.clone(),
                    why: "it is not back in its namespace".into(),
                })?;
                let change = LinkUnspec::new_with_index(index).up().build();
                self.handle.link().set(change).execute().await.map_err(kernel(format!("start {}", function.name)))
            };
            if let Err(error) = up.await {
                log::warn!("{error}");
            }
            return;
        }
        if hold.is_limited {
            limit::undo(&self.handle, hold.index).await;
        }
        match hold.model {
            Model::None => {}
            Model::TcFilter => filter::undo(&self.handle, hold.index).await,
            Model::Macvtap => {
                let macvtap = self.number(&tap_name(hold.index)).await.unwrap_or_default();
                macvtap::undo(&self.handle, hold, macvtap).await;
            }
            Model::Routed => {
                let (_, addresses) = read::named(&self.handle, hold.index).await.unwrap_or_default();
                let v4: Vec<Address> = addresses.into_iter().filter(|address| address.ip.is_ipv4()).collect();
                routed::undo(&self.handle, hold.index, &v4, &hold.v6).await;
            }
        }
        if matches!(hold.model, Model::Macvtap | Model::Routed) {
            let (name, _) = read::named(&self.handle, hold.index).await.unwrap_or_default();
            if let Err(error) = self.set_switches(&name, hold.switches).await {
                log::debug!("{error}");
            }
        }
    }
}

/// What stands beside a link has this name, and the link's number behind it.
pub(crate) const TAP_PREFIX: &str = "coracle";

fn tap_name(link: u32) -> String {
    format!("{TAP_PREFIX}{link}")
}

/// Runs `work` on a thread of its own that is in the namespace. A socket belongs to the namespace in which it is made.
async fn inside<T: Send + 'static>(
    namespace: &Arc<File>,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> std::io::Result<T> {
    let (sender, done) = futures::channel::oneshot::channel();
    let (namespace, runtime) = (Arc::clone(namespace), tokio::runtime::Handle::current());
    std::thread::Builder::new().name("netns".into()).spawn(move || {
        // What is made registers with the event loop.
        let _entered = runtime.enter();
        let outcome = setns(&*namespace, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from).and_then(|()| work());
        // Who asked may have gone.
        let _ = sender.send(outcome);
    })?;
    done.await.map_err(std::io::Error::other)?
}

/// Whether a namespace is that of this process, or of the host's first one.
fn is_hosts(namespace: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let Ok(own) = namespace.metadata().map(of) else { return false };
    ["/proc/self/ns/net", "/proc/1/ns/net"].iter().any(|path| std::fs::metadata(path).map(of).is_ok_and(|it| it == own))
}

/// A process whose network namespace this is, and its name. One that ends meanwhile is none.
fn inhabitant(namespace: &File) -> std::io::Result<Option<(u32, String)>> {
    use std::os::unix::fs::MetadataExt;
    let wanted = namespace.metadata().map(|found| (found.dev(), found.ino()))?;
    let numbers = std::fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut inside = numbers.filter(|pid: &u32| {
        std::fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|found| (found.dev(), found.ino()) == wanted)
    });
    Ok(inside.next().map(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (pid, name.trim_end().to_owned())
    }))
}

/// Gives back links of the namespace at `path` after a pod that could not do so itself, the last one first. A namespace that is gone
/// has none.
pub async fn give_back(path: &Path, links: &[Hold]) {
    match Namespace::open(path).await {
        Ok(namespace) => {
            for hold in links.iter().rev() {
                namespace.disconnect(hold).await;
            }
        }
        Err(error) => {
            log::info!("no link is given back: {error}");
            give_devices_back(links).await;
        }
    }
}

/// Gives back the devices among links alone, where nobody knows of a namespace any more: they are the host's all the same.
pub async fn give_devices_back(links: &[Hold]) {
    for function in links.iter().filter_map(|hold| hold.function.as_ref()) {
        take_function_back(function).await;
    }
}

/// How long a device's driver may take to have it again.
const DEVICE_PATIENCE: Duration = Duration::from_secs(60);

/// Gives a device to its driver again, on a thread of its own: the kernel waits for whoever has it open.
async fn take_function_back(function: &Function) {
    let own = function.clone();
    let work = tokio::task::spawn_blocking(move || function::take_back(&own));
    if tokio::time::timeout(DEVICE_PATIENCE, work).await.is_err() {
        log::warn!("the PCI device {} is not its driver's again: somebody has it open", function.rebind.address);
    }
}

//! A network namespace, over a netlink socket that was made in it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Handle, LinkUnspec};

use crate::{Contents, Error, Link, Result, Steered, read, steer, tap};

/// The ingress qdisc as a parent of filters (`TC_H_INGRESS`).
const INGRESS: u32 = 0xffff_0000;
/// Every protocol (`ETH_P_ALL`), in network byte order.
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

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
    pub async fn free_contents(&self, path: &Path) -> Result<Contents> {
        let namespace = Arc::clone(&self.file);
        let found = tokio::task::spawn_blocking(move || inhabitant(&namespace)).await.map_err(std::io::Error::other);
        let failed = |source| Error::System { step: format!("look who uses {}", path.display()), source };
        match found.and_then(|found| found).map_err(failed)? {
            Some((pid, name)) => Err(Error::Inhabited { path: path.display().to_string(), pid, name }),
            None => self.contents().await,
        }
    }

    /// What there is to take over.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a link of a kind that is not taken over, [`Error::TooMany`], [`Error::Clash`], [`Error::Route`],
    /// [`Error::Kernel`].
    pub async fn contents(&self) -> Result<Contents> {
        read::contents(&self.handle).await
    }

    /// Makes a tap beside `link`, and lets each be the other's wire. The tap lives as long as the descriptor.
    ///
    /// # Errors
    /// [`Error::System`], [`Error::Kernel`].
    pub async fn connect(&self, link: &Link) -> Result<OwnedFd> {
        let name = format!("coracle{}", link.index);
        let own = name.clone();
        let failed = |source| Error::System { step: format!("make the tap {name}"), source };
        let fd = inside(&self.file, move || tap::make(&own)).await.map_err(failed)?;
        let found = self.handle.link().get().match_name(name.clone()).execute().try_next().await;
        let made = found.map_err(kernel(format!("find the tap {name}")))?;
        let index = made.map(|message| message.header.index).ok_or_else(|| Error::System {
            step: format!("find the tap {name}"),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        let change = LinkUnspec::new_with_index(index).mtu(link.mtu).up().build();
        self.handle.link().set(change).execute().await.map_err(kernel(format!("start the tap {name}")))?;
        // The tap goes with its descriptor; the link stays, and must not keep what is only half done.
        self.add_ingress(link.index).await?;
        let joined = async {
            self.add_ingress(index).await?;
            self.redirect(link.index, index).await?;
            self.redirect(index, link.index).await
        };
        if let Err(error) = joined.await {
            self.disconnect(link.index).await;
            return Err(error);
        }
        Ok(fd)
    }

    /// Gives a link the place where its incoming packets can be looked at. A link that has one already is somebody else's.
    async fn add_ingress(&self, link: u32) -> Result<()> {
        let index = i32::try_from(link).unwrap_or_default();
        let step = format!("add an ingress qdisc to link {link}");
        self.handle.qdisc().add(index).ingress().execute().await.map_err(kernel(step))
    }

    /// Sends on what arrives at one link as if the other one had sent it.
    async fn redirect(&self, from: u32, to: u32) -> Result<()> {
        let step = || format!("redirect packets of link {from} to link {to}");
        let from = i32::try_from(from).unwrap_or_default();
        let filter = self.handle.traffic_filter(from).add().parent(INGRESS).protocol(ALL_PROTOCOLS);
        let filter = filter.redirect(to).map_err(kernel(step()))?;
        filter.execute().await.map_err(kernel(step()))
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

    /// Undoes what [`Self::connect`] has done to the link of this number itself. A link that is gone is no error.
    pub async fn disconnect(&self, link: u32) {
        let mut request = self.handle.qdisc().del(i32::try_from(link).unwrap_or_default());
        let header = &mut request.message_mut().header;
        (header.parent, header.handle) = (TcHandle::INGRESS, TcHandle { major: 0xffff, minor: 0 });
        if let Err(error) = request.execute().await {
            log::debug!("the link {link} keeps its filter: {error}");
        }
    }
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

/// Gives back links of the namespace at `path`, by their numbers, after a pod that could not do so itself. A namespace that is gone
/// has none.
pub async fn give_back(path: &Path, links: &[u32]) {
    match Namespace::open(path).await {
        Ok(namespace) => {
            for link in links {
                namespace.disconnect(*link).await;
            }
        }
        Err(error) => log::info!("no link is given back: {error}"),
    }
}

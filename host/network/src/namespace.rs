//! A network namespace, over a netlink socket that was made in it.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Handle, LinkUnspec};

use crate::{Address, Error, Link, Neighbour, Result, Route, Steered, steer, tap};

/// The ingress qdisc as a parent of filters (`TC_H_INGRESS`).
const INGRESS: u32 = 0xffff_0000;
/// The scope of what is on a link itself (`RT_SCOPE_LINK`).
const SCOPE_LINK: u8 = 253;
/// Every protocol (`ETH_P_ALL`), in network byte order.
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

/// See the module.
#[derive(Debug, Clone)]
pub struct Namespace {
    file: Arc<File>,
    handle: Handle,
}

fn kernel(step: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
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

    /// The links that a pod takes over: all with an address but loopback.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for one of a kind that is not taken over, [`Error::Kernel`].
    pub async fn links(&self) -> Result<Vec<Link>> {
        let messages: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(kernel("list the links"))?;
        let mut links = Vec::new();
        for message in messages {
            if message.header.link_layer_type != LinkLayerType::Ether {
                continue;
            }
            let mut link = link(&message);
            (link.addresses, link.routes) = self.addresses(link.index).await?;
            if link.addresses.is_empty() {
                continue;
            }
            if let Some(kind) = other_kind(&message) {
                return Err(Error::Unsupported { name: link.name, kind });
            }
            link.routes.extend(self.routes(link.index).await?);
            link.neighbours = self.neighbours(link.index).await?;
            links.push(link);
        }
        Ok(links)
    }

    /// The addresses of a link, and the ways to the peers that some of them name.
    async fn addresses(&self, index: u32) -> Result<(Vec<Address>, Vec<Route>)> {
        let messages = self.handle.address().get().set_link_index_filter(index).execute();
        let messages: Vec<_> = messages.try_collect().await.map_err(kernel("list the addresses"))?;
        let (mut addresses, mut routes) = (Vec::new(), Vec::new());
        for message in messages.into_iter().filter(|message| message.header.scope == AddressScope::Universe) {
            let prefix = message.header.prefix_len;
            let (mut local, mut other) = (None, None);
            for attribute in &message.attributes {
                match attribute {
                    AddressAttribute::Local(ip) => local = Some(*ip),
                    AddressAttribute::Address(ip) => other = Some(*ip),
                    _ => {}
                }
            }
            let Some(ip) = local.or(other) else { continue };
            addresses.push(Address { ip, prefix });
            if let Some(peer) = other.filter(|peer| *peer != ip) {
                routes.push(Route {
                    destination: Some(Address { ip: peer, prefix }),
                    gateway: None,
                    source: None,
                    scope: SCOPE_LINK,
                    flags: 0,
                    is_v6: peer.is_ipv6(),
                });
            }
        }
        Ok((addresses, routes))
    }

    async fn routes(&self, index: u32) -> Result<Vec<Route>> {
        let mut routes: Vec<(u32, Route)> = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut wanted = RouteMessage::default();
            wanted.header.address_family = family;
            let found: Vec<RouteMessage> =
                self.handle.route().get(wanted).execute().try_collect().await.map_err(kernel("list the routes"))?;
            for message in &found {
                routes.extend(route(message, index)?);
            }
        }
        // The guest's messages have no metric: of several ways to one place the best one counts.
        routes.sort_by_key(|(metric, _)| *metric);
        let mut best: Vec<Route> = Vec::new();
        for (_, route) in routes {
            let same = |known: &Route| (known.destination, known.is_v6) == (route.destination, route.is_v6);
            if !best.iter().any(same) {
                best.push(route);
            }
        }
        Ok(best)
    }

    async fn neighbours(&self, index: u32) -> Result<Vec<Neighbour>> {
        let messages: Vec<_> =
            self.handle.neighbours().get().execute().try_collect().await.map_err(kernel("list the neighbours"))?;
        let set = messages
            .into_iter()
            .filter(|message| message.header.ifindex == index && message.header.state == NeighbourState::Permanent);
        Ok(set
            .filter_map(|message| {
                let (mut ip, mut mac) = (None, None);
                for attribute in &message.attributes {
                    match attribute {
                        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
                        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::V6(*v6)),
                        NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
                        _ => {}
                    }
                }
                Some(Neighbour { ip: ip.filter(|ip| !ip.is_multicast())?, mac: mac? })
            })
            .collect())
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
            self.disconnect(link).await;
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

    /// Undoes what [`Self::connect`] has done to `link` itself. A link that is gone is no error.
    pub async fn disconnect(&self, link: &Link) {
        let index = i32::try_from(link.index).unwrap_or_default();
        let mut request = self.handle.qdisc().del(index);
        let header = &mut request.message_mut().header;
        (header.parent, header.handle) = (TcHandle::INGRESS, TcHandle { major: 0xffff, minor: 0 });
        if let Err(error) = request.execute().await {
            log::debug!("the link {} keeps its filter: {error}", link.name);
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

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 1500,
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    link
}

/// The kind of a link that is no veth.
fn other_kind(message: &LinkMessage) -> Option<String> {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let kind = infos.into_iter().flatten().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind.clone()),
        _ => None,
    });
    match kind {
        Some(InfoKind::Veth) => None,
        Some(kind) => Some(kind.to_string()),
        None => Some("physical".into()),
    }
}

/// Whether a namespace is that of this process, or of the host's first one.
fn is_hosts(namespace: &File) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let Ok(own) = namespace.metadata().map(of) else { return false };
    ["/proc/self/ns/net", "/proc/1/ns/net"].iter().any(|path| std::fs::metadata(path).map(of).is_ok_and(|it| it == own))
}

/// A route of the main table through the link `index` that somebody has set, and its metric.
fn route(message: &RouteMessage, index: u32) -> Result<Option<(u32, Route)>> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let (mut out, mut destination, mut gateway, mut source) = (None, None, None, None);
    let (mut metric, mut several) = (0, false);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(link) => out = Some(*link),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::MultiPath(hops) => several = hops.iter().any(|hop| hop.interface_index == index),
            _ => {}
        }
    }
    let wanted = (out == Some(index) || several)
        && table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && header.kind == RouteType::Unicast
        && !matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    if !wanted {
        return Ok(None);
    }
    if several {
        return Err(Error::MultiPath);
    }
    let route = Route {
        destination: destination
            .filter(|_| header.destination_prefix_length > 0)
            .map(|ip| Address { ip, prefix: header.destination_prefix_length }),
        gateway,
        source,
        scope: header.scope.into(),
        // The others say how the link is at the moment.
        flags: header.flags.bits() & RouteFlags::Onlink.bits(),
        is_v6: header.address_family == AddressFamily::Inet6,
    };
    Ok(Some((metric, route)))
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// Gives back the links of the namespace at `path` after a pod that could not do so itself. A namespace that is gone has none.
pub async fn give_back(path: &Path) {
    let Ok(namespace) = Namespace::open(path).await else { return };
    let Ok(links) = namespace.links().await else { return };
    for link in &links {
        namespace.disconnect(link).await;
    }
}

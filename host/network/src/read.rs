//! What a namespace holds, read from the kernel: one list of each kind, whatever the number of links.

use std::net::IpAddr;

use coracle_machine::NETS_MAX;
use futures::TryStreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteType,
};

use crate::namespace::{TAP_PREFIX, kernel};
use crate::{Address, Contents, Error, Link, Model, Neighbour, Result, Route, RouteKind};

/// The scope of what is on a link itself (`RT_SCOPE_LINK`).
const SCOPE_LINK: u8 = 253;

/// What a pod takes over.
pub(crate) async fn contents(handle: &Handle, model: Model) -> Result<Contents> {
    let found: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(kernel("list the links"))?;
    let addresses = all_addresses(handle).await?;
    let mut routes: Vec<RouteMessage> = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family;
        let of: Vec<_> = handle.route().get(wanted).execute().try_collect().await.map_err(kernel("list the routes"))?;
        routes.extend(of);
    }
    let neighbours: Vec<NeighbourMessage> =
        handle.neighbours().get().execute().try_collect().await.map_err(kernel("list the neighbours"))?;
    taken_over(model, &found, &addresses, &routes, &neighbours)
}

async fn all_addresses(handle: &Handle) -> Result<Vec<AddressMessage>> {
    handle.address().get().execute().try_collect().await.map_err(kernel("list the addresses"))
}

/// All addresses of IPv6 that a link has, those that the kernel gives it among them.
pub(crate) async fn addresses_v6(handle: &Handle, index: u32) -> Result<Vec<Address>> {
    let all = all_addresses(handle).await?;
    let own = all.iter().filter(|message| message.header.index == index);
    let address = |message: &AddressMessage| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) if ip.is_ipv6() => {
                Some(Address { ip: *ip, prefix: message.header.prefix_len })
            }
            _ => None,
        })
    };
    Ok(own.filter_map(address).collect())
}

pub(crate) fn is_loopback(message: &LinkMessage) -> bool {
    message.header.link_layer_type == LinkLayerType::Loopback
}

/// Whether it is what stands beside a link that was taken over, by its kind and name: the link itself may have gone.
pub(crate) fn is_own(message: &LinkMessage) -> bool {
    let is_kind = matches!(kind_of(message), Some(InfoKind::Tun | InfoKind::MacVtap));
    let name = link(message).name;
    is_kind && name.strip_prefix(TAP_PREFIX).is_some_and(|rest| rest.parse::<u32>().is_ok())
}

/// The name of a link, and its addresses.
pub(crate) async fn named(handle: &Handle, index: u32) -> Result<(String, Vec<Address>)> {
    let found = handle.link().get().match_index(index).execute().try_next().await.map_err(kernel("find a link"))?;
    let name = found.as_ref().map(|message| link(message).name).unwrap_or_default();
    Ok((name, addresses_of(index, &all_addresses(handle).await?).0))
}

/// What these messages hold.
fn taken_over(
    model: Model,
    found: &[LinkMessage],
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
    neighbours: &[NeighbourMessage],
) -> Result<Contents> {
    let mut links = Vec::new();
    // What carries frames; a router takes whatever carries packets.
    let carries = |message: &&LinkMessage| match message.header.link_layer_type {
        LinkLayerType::Ether => true,
        LinkLayerType::Loopback => false,
        _ => model == Model::Routed,
    };
    for message in found.iter().filter(carries).filter(|message| !is_own(message)) {
        let mut link = link(message);
        if model == Model::Routed {
            // The guest's device is on no network of frames but the one with the router.
            let [.., high, low] = link.index.to_be_bytes();
            link.mac = [0x02, 0xc0, 0xac, 0, high, low];
        }
        (link.addresses, link.routes) = addresses_of(link.index, addresses);
        if link.addresses.is_empty() {
            continue;
        }
        if let Some(kind) = other_kind(message).filter(|_| model != Model::Routed) {
            return Err(Error::Unsupported { name: link.name, kind });
        }
        link.routes.extend(routes_of(link.index, routes)?);
        link.neighbours = neighbours_of(link.index, neighbours);
        links.push(link);
    }
    if links.len() > NETS_MAX {
        return Err(Error::TooMany { count: links.len() });
    }
    if model != Model::Routed {
        stand_alone(&links, found)?;
    }
    let barred = routes.iter().filter_map(|message| route(message, Way::Barred).transpose()).collect::<Result<_>>()?;
    Ok(Contents { links, barred })
}

/// Whether each link has a hardware address of its own, by which the guest tells them apart, and none stands on another one of them,
/// whose filter would take its frames before they come to it.
fn stand_alone(links: &[Link], found: &[LinkMessage]) -> Result<()> {
    let clash =
        |link: &Link, other: &Link, why| Err(Error::Clash { name: link.name.clone(), other: other.name.clone(), why });
    for (at, link) in links.iter().enumerate() {
        if let Some(other) = links.iter().take(at).find(|other| other.mac == link.mac) {
            return clash(link, other, "has the hardware address of");
        }
        let message = found.iter().find(|message| message.header.index == link.index);
        let below = message.and_then(stands_on);
        if let Some(other) = links.iter().find(|other| Some(other.index) == below) {
            return clash(link, other, "stands on");
        }
    }
    Ok(())
}

/// The link of the same namespace that a link stands on. (The two ends of a veth there stand on one another.)
fn stands_on(message: &LinkMessage) -> Option<u32> {
    let is_elsewhere = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::LinkNetNsId(_));
    if message.attributes.iter().any(is_elsewhere) || kind_of(message) == Some(&InfoKind::Veth) {
        return None;
    }
    message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: kind_of(message).map_or_else(|| "physical".into(), ToString::to_string),
        mac: [0; 6],
        mtu: 1500,
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
        device: None,
    };
    let (mut bus, mut device) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().unwrap_or_default(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::ParentDevBusName(name) => bus = Some(name.clone()),
            LinkAttribute::ParentDevName(name) => device = Some(name.clone()),
            _ => {}
        }
    }
    link.device = bus.zip(device);
    link
}

fn infos(message: &LinkMessage) -> &[LinkInfo] {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    infos.map(Vec::as_slice).unwrap_or_default()
}

fn kind_of(message: &LinkMessage) -> Option<&InfoKind> {
    infos(message).iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

/// The kind of a link that is not taken over. Those that are hand on whole Ethernet frames, in both directions, to and from the
/// link's own hardware address.
fn other_kind(message: &LinkMessage) -> Option<String> {
    match kind_of(message) {
        Some(InfoKind::Veth | InfoKind::MacVlan | InfoKind::Vlan) => None,
        // A tap: of those that the kernel calls so only these have frames.
        Some(InfoKind::Tun) => {
            let is_held =
                |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::Carrier(carrier) if *carrier != 0);
            let held = message.attributes.iter().any(is_held);
            (!held).then(|| "tap that no program holds".into())
        }
        Some(InfoKind::IpVlan) => match ipvlan_mode(infos(message)) {
            Some(IpVlanMode::L2) => None,
            // The others have no neighbours, and a guest would look for them in vain.
            _ => Some("ipvlan in a mode other than l2".into()),
        },
        Some(kind) => Some(kind.to_string()),
        // It goes to the machine as what it is.
        None if link(message).device.is_some() => None,
        None => Some("physical".into()),
    }
}

fn ipvlan_mode(infos: &[LinkInfo]) -> Option<IpVlanMode> {
    infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::IpVlan(data)) => data.iter().find_map(|entry| match entry {
            InfoIpVlan::Mode(mode) => Some(*mode),
            _ => None,
        }),
        _ => None,
    })
}

/// The addresses of a link, and the ways to the peers that some of them name.
fn addresses_of(index: u32, messages: &[AddressMessage]) -> (Vec<Address>, Vec<Route>) {
    let (mut addresses, mut routes) = (Vec::new(), Vec::new());
    let own =
        |message: &&AddressMessage| message.header.index == index && message.header.scope == AddressScope::Universe;
    for message in messages.iter().filter(own) {
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
                metric: 0,
                mtu: 0,
                kind: RouteKind::Unicast,
            });
        }
    }
    (addresses, routes)
}

/// Which routes are meant.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// Those through a link.
    Through(u32),
    /// Those that lead nowhere.
    Barred,
}

/// The routes through a link.
fn routes_of(index: u32, messages: &[RouteMessage]) -> Result<Vec<Route>> {
    messages.iter().filter_map(|message| route(message, Way::Through(index)).transpose()).collect()
}

/// A route of the main table that somebody has set, if it is one of those that are meant.
fn route(message: &RouteMessage, way: Way) -> Result<Option<Route>> {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let (mut out, mut destination, mut gateway, mut source) = (None, None, None, None);
    let (mut metric, mut mtu, mut hops, mut is_special) = (0, 0, [].as_slice(), header.tos != 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(link) => out = Some(*link),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Priority(number) => metric = *number,
            RouteAttribute::MultiPath(several) => hops = several.as_slice(),
            RouteAttribute::Metrics(all) => mtu = mtu_of(all),
            RouteAttribute::Via(_) => is_special = true,
            _ => {}
        }
    }
    let is_set = table == u32::from(RouteHeader::RT_TABLE_MAIN)
        && !matches!(header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
    if !is_set {
        return Ok(None);
    }
    let several = |index| hops.iter().any(|hop| hop.interface_index == index);
    let kind = match (header.kind, way) {
        (RouteType::Unicast, Way::Through(index)) if several(index) => {
            return Err(Error::Route("has several next hops at once"));
        }
        (RouteType::Unicast, Way::Through(index)) if out == Some(index) && is_special => {
            return Err(Error::Route("has a next hop of the other version of IP, or a type of service"));
        }
        (RouteType::Unicast, Way::Through(index)) if out == Some(index) => RouteKind::Unicast,
        (RouteType::BlackHole, Way::Barred) => RouteKind::Blackhole,
        (RouteType::Unreachable, Way::Barred) => RouteKind::Unreachable,
        (RouteType::Prohibit, Way::Barred) => RouteKind::Prohibit,
        _ => return Ok(None),
    };
    Ok(Some(Route {
        destination: destination
            .filter(|_| header.destination_prefix_length > 0)
            .map(|ip| Address { ip, prefix: header.destination_prefix_length }),
        gateway,
        source,
        scope: header.scope.into(),
        // The others say how the link is at the moment.
        flags: header.flags.bits() & RouteFlags::Onlink.bits(),
        is_v6: header.address_family == AddressFamily::Inet6,
        metric,
        mtu,
        kind,
    }))
}

fn mtu_of(all: &[RouteMetric]) -> u32 {
    let found = all.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(bytes) => Some(*bytes),
        _ => None,
    });
    found.unwrap_or(0)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// The neighbours of a link that somebody has set.
fn neighbours_of(index: u32, messages: &[NeighbourMessage]) -> Vec<Neighbour> {
    let set = messages
        .iter()
        .filter(|message| message.header.ifindex == index && message.header.state == NeighbourState::Permanent);
    set.filter_map(|message| {
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
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link of a kind, with one address.
    fn given(index: u32, infos: Vec<LinkInfo>) -> (LinkMessage, AddressMessage) {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.link_layer_type = LinkLayerType::Ether;
        link.attributes.push(LinkAttribute::IfName(format!("eth{index}")));
        let [.., high, low] = index.to_be_bytes();
        link.attributes.push(LinkAttribute::Address(vec![2, 0, 0, 0, high, low]));
        if !infos.is_empty() {
            link.attributes.push(LinkAttribute::LinkInfo(infos));
        }
        let mut address = AddressMessage::default();
        (address.header.index, address.header.prefix_len) = (index, 24);
        address.attributes.push(AddressAttribute::Address("10.1.2.3".parse().unwrap()));
        (link, address)
    }

    fn read(links: Vec<(LinkMessage, AddressMessage)>) -> Result<Vec<Link>> {
        let (links, addresses): (Vec<_>, Vec<_>) = links.into_iter().unzip();
        taken_over(Model::TcFilter, &links, &addresses, &[], &[]).map(|contents| contents.links)
    }

    #[test]
    fn links_that_hand_on_frames_are_taken_over() {
        let l2 = LinkInfo::Data(InfoData::IpVlan(vec![InfoIpVlan::Mode(IpVlanMode::L2)]));
        let kinds = [
            vec![LinkInfo::Kind(InfoKind::Veth)],
            vec![LinkInfo::Kind(InfoKind::MacVlan)],
            vec![LinkInfo::Kind(InfoKind::Vlan)],
            vec![LinkInfo::Kind(InfoKind::IpVlan), l2],
        ];
        let links = read(kinds.into_iter().zip(1..).map(|(kind, index)| given(index, kind)).collect()).unwrap();
        assert_eq!(links.iter().map(|link| link.addresses.len()).collect::<Vec<_>>(), [1; 4]);
    }

    #[test]
    fn a_tap_is_taken_over_where_a_program_holds_it() {
        let tap = |carrier| {
            let (mut link, address) = given(2, vec![LinkInfo::Kind(InfoKind::Tun)]);
            link.attributes.push(LinkAttribute::Carrier(carrier));
            read(vec![(link, address)])
        };
        assert_eq!(tap(1).unwrap().len(), 1);
        assert!(tap(0).unwrap_err().to_string().contains("tap that no program holds"));
    }

    #[test]
    fn others_are_refused_by_their_kind() {
        let l3 = LinkInfo::Data(InfoData::IpVlan(vec![InfoIpVlan::Mode(IpVlanMode::L3)]));
        for (infos, kind) in [
            (vec![], "physical"),
            (vec![LinkInfo::Kind(InfoKind::Dummy)], "dummy"),
            (vec![LinkInfo::Kind(InfoKind::MacVtap)], "macvtap"),
            (vec![LinkInfo::Kind(InfoKind::IpVlan), l3], "ipvlan in a mode other than l2"),
        ] {
            let text = read(vec![given(2, infos)]).unwrap_err().to_string();
            assert!(text.contains("eth2") && text.contains(&format!("the kind {kind},")), "{text}");
        }
    }

    #[test]
    fn links_that_are_not_their_own_are_refused_with_the_other() {
        let vlan = || vec![LinkInfo::Kind(InfoKind::Vlan)];
        let (mut twin, address) = given(3, vlan());
        twin.attributes.push(LinkAttribute::Address(vec![2, 0, 0, 0, 0, 2]));
        let text = read(vec![given(2, vlan()), (twin, address)]).unwrap_err().to_string();
        assert!(text.contains("eth3 has the hardware address of eth2"), "{text}");
        let on = |more: Vec<LinkAttribute>| {
            let (mut upper, address) = given(3, vlan());
            upper.attributes.extend([vec![LinkAttribute::Link(2)], more].concat());
            read(vec![given(2, vec![LinkInfo::Kind(InfoKind::Veth)]), (upper, address)])
        };
        let text = on(vec![]).unwrap_err().to_string();
        assert!(text.contains("eth3 stands on eth2"), "{text}");
        assert_eq!(on(vec![LinkAttribute::LinkNetNsId(0)]).unwrap().len(), 2);
    }

    #[test]
    fn a_link_without_an_address_is_nobodys() {
        let (link, _) = given(2, vec![LinkInfo::Kind(InfoKind::Dummy)]);
        assert_eq!(taken_over(Model::TcFilter, &[link], &[], &[], &[]).unwrap(), Contents::default());
    }

    #[test]
    fn more_links_than_a_machine_takes_are_refused() {
        let many = |count| (1..=count).map(|index| given(index, vec![LinkInfo::Kind(InfoKind::Veth)])).collect();
        assert_eq!(read(many(16)).unwrap().len(), 16);
        let text = read(many(300)).unwrap_err().to_string();
        assert!(text.contains("300") && text.contains("16"), "{text}");
    }

    fn way(kind: RouteType, metric: u32, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        (message.header.kind, message.header.address_family) = (kind, AddressFamily::Inet);
        message.attributes = attributes;
        message.attributes.push(RouteAttribute::Priority(metric));
        message
    }

    #[test]
    fn routes_keep_their_metric_mtu_and_kind() {
        let gateway = |ip: &str| RouteAttribute::Gateway(RouteAddress::Inet(ip.parse().unwrap()));
        let mtu = RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300)]);
        let messages = [
            way(RouteType::Unicast, 200, vec![RouteAttribute::Oif(3), gateway("10.0.0.2")]),
            way(RouteType::Unicast, 100, vec![RouteAttribute::Oif(3), gateway("10.0.0.1"), mtu]),
            way(RouteType::BlackHole, 7, vec![]),
            way(RouteType::Local, 0, vec![RouteAttribute::Oif(3)]),
        ];
        let routes = routes_of(3, &messages).unwrap();
        let figures: Vec<_> = routes.iter().map(|route| (route.metric, route.mtu, route.kind)).collect();
        assert_eq!(figures, [(200, 0, RouteKind::Unicast), (100, 1300, RouteKind::Unicast)]);
        assert!(routes_of(4, &messages).unwrap().is_empty());
        let barred = taken_over(Model::TcFilter, &[], &[], &messages, &[]).unwrap().barred;
        assert_eq!(
            barred.iter().map(|route| (route.metric, route.kind)).collect::<Vec<_>>(),
            [(7, RouteKind::Blackhole)]
        );
    }
}

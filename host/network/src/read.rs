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
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};

use crate::namespace::kernel;
use crate::{Address, Error, Link, Neighbour, Result, Route};

/// The scope of what is on a link itself (`RT_SCOPE_LINK`).
const SCOPE_LINK: u8 = 253;

/// The links that a pod takes over: all with an address but loopback.
pub(crate) async fn links(handle: &Handle) -> Result<Vec<Link>> {
    let found: Vec<LinkMessage> =
        handle.link().get().execute().try_collect().await.map_err(kernel("list the links"))?;
    let addresses: Vec<AddressMessage> =
        handle.address().get().execute().try_collect().await.map_err(kernel("list the addresses"))?;
    let mut routes: Vec<RouteMessage> = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut wanted = RouteMessage::default();
        wanted.header.address_family = family;
        let of: Vec<_> = handle.route().get(wanted).execute().try_collect().await.map_err(kernel("list the routes"))?;
        routes.extend(of);
    }
    let neighbours: Vec<NeighbourMessage> =
        handle.neighbours().get().execute().try_collect().await.map_err(kernel("list the neighbours"))?;
    taken_over(&found, &addresses, &routes, &neighbours)
}

/// The links of these messages.
fn taken_over(
    found: &[LinkMessage],
    addresses: &[AddressMessage],
    routes: &[RouteMessage],
    neighbours: &[NeighbourMessage],
) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    for message in found.iter().filter(|message| message.header.link_layer_type == LinkLayerType::Ether) {
        let mut link = link(message);
        (link.addresses, link.routes) = addresses_of(link.index, addresses);
        if link.addresses.is_empty() {
            continue;
        }
        if let Some(kind) = other_kind(message) {
            return Err(Error::Unsupported { name: link.name, kind });
        }
        link.routes.extend(routes_of(link.index, routes)?);
        link.neighbours = neighbours_of(link.index, neighbours);
        links.push(link);
    }
    if links.len() > NETS_MAX {
        return Err(Error::TooMany { count: links.len() });
    }
    Ok(links)
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

/// The kind of a link that is not taken over. Those that are hand on whole Ethernet frames, in both directions, to and from the
/// link's own hardware address.
fn other_kind(message: &LinkMessage) -> Option<String> {
    let infos = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let infos = infos.map(Vec::as_slice).unwrap_or_default();
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    match kind {
        Some(InfoKind::Veth | InfoKind::MacVlan | InfoKind::Vlan) => None,
        Some(InfoKind::IpVlan) => match ipvlan_mode(infos) {
            Some(IpVlanMode::L2) => None,
            // The others have no neighbours, and a guest would look for them in vain.
            _ => Some("ipvlan in a mode other than l2".into()),
        },
        Some(kind) => Some(kind.to_string()),
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
            });
        }
    }
    (addresses, routes)
}

/// The routes through a link, of several to one place the best.
fn routes_of(index: u32, messages: &[RouteMessage]) -> Result<Vec<Route>> {
    let mut routes: Vec<(u32, Route)> = Vec::new();
    for message in messages {
        routes.extend(route(message, index)?);
    }
    // The guest's messages have no metric.
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
        taken_over(&links, &addresses, &[], &[])
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
    fn a_link_without_an_address_is_nobodys() {
        let (link, _) = given(2, vec![LinkInfo::Kind(InfoKind::Dummy)]);
        assert!(taken_over(&[link], &[], &[], &[]).unwrap().is_empty());
    }

    #[test]
    fn more_links_than_a_machine_takes_are_refused() {
        let many = |count| (1..=count).map(|index| given(index, vec![LinkInfo::Kind(InfoKind::Veth)])).collect();
        assert_eq!(read(many(16)).unwrap().len(), 16);
        let text = read(many(300)).unwrap_err().to_string();
        assert!(text.contains("300") && text.contains("16"), "{text}");
    }

    #[test]
    fn of_several_ways_to_a_place_the_best_is_taken() {
        let way = |metric, gateway: &str| {
            let mut message = RouteMessage::default();
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            message.header.kind = RouteType::Unicast;
            message.header.address_family = AddressFamily::Inet;
            message.attributes = vec![
                RouteAttribute::Oif(3),
                RouteAttribute::Priority(metric),
                RouteAttribute::Gateway(RouteAddress::Inet(gateway.parse().unwrap())),
            ];
            message
        };
        let routes = routes_of(3, &[way(200, "10.0.0.2"), way(100, "10.0.0.1")]).unwrap();
        assert_eq!(routes.iter().map(|route| route.gateway).collect::<Vec<_>>(), [Some("10.0.0.1".parse().unwrap())]);
        assert!(routes_of(4, &[way(1, "10.0.0.1")]).unwrap().is_empty());
    }
}

//! From links to what the guest is told.

use std::net::IpAddr;

use coracle_machine::mac_text;
use coracle_protocol::agent::{ARPNeighbors, Routes};
use coracle_protocol::protobuf::MessageField;
use coracle_protocol::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route};

use crate::{Address, Contents, Link, Model, Route as RouteOfLink, routed};

/// The kernel's number for a neighbour that was set by hand (`NUD_PERMANENT`).
const PERMANENT: i32 = 0x80;

/// What the guest is to know of links that are taken over in this way.
#[must_use]
pub fn for_guest(contents: &Contents, model: Model) -> Contents {
    if model == Model::Routed { routed::for_guest(contents) } else { contents.clone() }
}

/// The interface that a link becomes. The guest finds its device by the hardware address.
#[must_use]
pub fn interface(link: &Link) -> Interface {
    Interface {
        device: link.name.clone(),
        name: link.name.clone(),
        IPAddresses: link.addresses.iter().map(|Address { ip, prefix }| address(*ip, &prefix.to_string())).collect(),
        mtu: link.mtu.into(),
        hwAddr: mac_text(link.mac),
        ..Default::default()
    }
}

/// All routes: those without a gateway first, for by them the gateways are reached. Of two to one place with one metric the
/// first counts, as in the kernel.
#[must_use]
pub fn routes(contents: &Contents) -> Routes {
    let through = contents.links.iter().flat_map(|link| link.routes.iter().map(|route| (link.name.as_str(), *route)));
    let barred = contents.barred.iter().map(|route| ("", *route));
    let mut all: Vec<(&str, RouteOfLink)> = Vec::new();
    for (device, route) in through.chain(barred) {
        let place = |route: &RouteOfLink| (route.destination, route.is_v6, route.metric);
        if !all.iter().any(|(_, known)| place(known) == place(&route)) {
            all.push((device, route));
        }
    }
    all.sort_by_key(|(_, route)| route.gateway.is_some());
    let routes = all.into_iter().map(|(device, route)| message(device, &route));
    Routes { Routes: routes.collect(), ..Default::default() }
}

fn message(device: &str, route: &RouteOfLink) -> Route {
    let text = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
    let destination = route.destination.map(|Address { ip, prefix }| format!("{ip}/{prefix}"));
    Route {
        dest: destination.unwrap_or_default(),
        gateway: text(route.gateway),
        device: device.to_owned(),
        source: text(route.source),
        scope: route.scope.into(),
        family: if route.is_v6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
        flags: route.flags,
        mtu: route.mtu,
        metric: route.metric,
        kind: route.kind.number(),
        ..Default::default()
    }
}

/// The neighbours of all links.
#[must_use]
pub fn neighbours(links: &[Link]) -> ARPNeighbors {
    let of = |link: &Link| {
        let device = link.name.clone();
        link.neighbours
            .iter()
            .map(move |neighbour| ARPNeighbor {
                toIPAddress: MessageField::some(address(neighbour.ip, "")),
                device: device.clone(),
                lladdr: mac_text(neighbour.mac),
                state: PERMANENT,
                ..Default::default()
            })
            .collect::<Vec<_>>()
    };
    ARPNeighbors { ARPNeighbors: links.iter().flat_map(of).collect(), ..Default::default() }
}

fn address(ip: IpAddr, mask: &str) -> IPAddress {
    let family = if ip.is_ipv6() { IPFamily::v6 } else { IPFamily::v4 };
    IPAddress { family: family.into(), address: ip.to_string(), mask: mask.to_owned(), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Neighbour, RouteKind};

    fn link() -> Link {
        let route = RouteOfLink::default();
        let near = Address { ip: "169.254.1.1".parse().unwrap(), prefix: 32 };
        Link {
            index: 2,
            name: "eth0".into(),
            kind: "veth".into(),
            mac: [2, 0, 0, 0, 0, 0xab],
            mtu: 1400,
            addresses: vec![
                Address { ip: "10.1.0.5".parse().unwrap(), prefix: 24 },
                Address { ip: "fd00::5".parse().unwrap(), prefix: 64 },
            ],
            routes: vec![
                RouteOfLink { gateway: Some("169.254.1.1".parse().unwrap()), ..route },
                RouteOfLink { destination: Some(near), scope: 253, ..route },
            ],
            neighbours: vec![Neighbour { ip: "169.254.1.1".parse().unwrap(), mac: [0xee; 6] }],
            device: None,
        }
    }

    #[test]
    fn a_link_becomes_an_interface() {
        let interface = interface(&link());
        assert_eq!((interface.hwAddr.as_str(), interface.mtu), ("02:00:00:00:00:ab", 1400));
        let addresses: Vec<String> =
            interface.IPAddresses.iter().map(|ip| format!("{:?} {}/{}", ip.family, ip.address, ip.mask)).collect();
        assert_eq!(addresses, ["v4 10.1.0.5/24", "v6 fd00::5/64"]);
    }

    #[test]
    fn gateways_come_after_the_ways_to_them() {
        let routes = routes(&Contents { links: vec![link()], barred: vec![] }).Routes;
        let texts: Vec<(&str, &str)> =
            routes.iter().map(|route| (route.dest.as_str(), route.gateway.as_str())).collect();
        assert_eq!(texts, [("169.254.1.1/32", ""), ("", "169.254.1.1")]);
        assert_eq!(routes[0].scope, 253);
        let neighbours = neighbours(&[link()]).ARPNeighbors;
        assert_eq!((neighbours[0].lladdr.as_str(), neighbours[0].device.as_str()), ("ee:ee:ee:ee:ee:ee", "eth0"));
    }

    #[test]
    fn metrics_tell_ways_to_one_place_apart() {
        let mut first = link();
        let way = |gateway: &str, metric| RouteOfLink {
            gateway: Some(gateway.parse().unwrap()),
            metric,
            ..RouteOfLink::default()
        };
        first.routes = vec![way("10.1.0.1", 0), way("10.1.0.2", 5)];
        let second =
            Link { name: "eth1".into(), routes: vec![way("10.2.0.1", 5), way("10.2.0.2", 9)], ..first.clone() };
        let barred = vec![RouteOfLink { kind: RouteKind::Prohibit, metric: 77, ..RouteOfLink::default() }];
        let routes = routes(&Contents { links: vec![first, second], barred }).Routes;
        let texts: Vec<_> = routes
            .iter()
            .map(|route| (route.gateway.as_str(), route.device.as_str(), route.metric, route.kind))
            .collect();
        let wanted =
            [("", "", 77, 8), ("10.1.0.1", "eth0", 0, 1), ("10.1.0.2", "eth0", 5, 1), ("10.2.0.2", "eth1", 9, 1)];
        assert_eq!(texts, wanted);
    }

    /// Numbers without a pattern, the same each time.
    fn numbers() -> impl FnMut(u64) -> u64 {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        move |below| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        }
    }

    #[test]
    fn whatever_the_routes_each_place_is_led_to_once_and_gateways_come_last() {
        let mut number = numbers();
        let places: Vec<Option<Address>> = ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "fd00::/64"]
            .iter()
            .map(|text| text.split_once('/').unwrap())
            .map(|(ip, prefix)| Some(Address { ip: ip.parse().unwrap(), prefix: prefix.parse().unwrap() }))
            .chain([None])
            .collect();
        for _ in 0..3000 {
            let mut route = |kind| {
                let destination = places[usize::try_from(number(5)).unwrap()];
                let is_v6 = destination.map_or(number(2) == 0, |place| place.ip.is_ipv6());
                let gateway = if is_v6 { "fd00::1" } else { "10.0.0.1" };
                let gateway = (number(2) == 0 && kind == RouteKind::Unicast).then(|| gateway.parse().unwrap());
                let metric = u32::try_from(number(3)).unwrap();
                RouteOfLink { destination, is_v6, gateway, metric, kind, ..RouteOfLink::default() }
            };
            let mut some = |kind| (0..5).map(|_| route(kind)).collect::<Vec<_>>();
            let links = vec![
                Link { routes: some(RouteKind::Unicast), ..link() },
                Link { name: "eth1".into(), routes: some(RouteKind::Unicast), ..link() },
            ];
            let contents = Contents { links, barred: some(RouteKind::Blackhole) };
            let told = routes(&contents).Routes;
            let place = |route: &Route| (route.dest.clone(), route.family.value(), route.metric);
            let mut places: Vec<_> = told.iter().map(place).collect();
            places.sort();
            let count = places.len();
            places.dedup();
            assert_eq!(places.len(), count, "one way to each place by each metric: {told:?}");
            let all = contents.links.iter().flat_map(|link| &link.routes).chain(&contents.barred);
            assert!(
                all.clone().all(|own| {
                    let wanted = message("", own);
                    told.iter().any(|route| place(route) == place(&wanted))
                }),
                "no place is left out"
            );
            let first_gateway = told.iter().position(|route| !route.gateway.is_empty()).unwrap_or(told.len());
            assert!(told.iter().skip(first_gateway).all(|route| !route.gateway.is_empty()));
            assert!(
                told.iter().all(|route| route.device.is_empty() == (route.kind != 1)),
                "what leads nowhere has no link"
            );
        }
    }
}

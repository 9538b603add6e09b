//! From links to what the guest is told.

use std::net::IpAddr;

use coracle_machine::mac_text;
use coracle_protocol::agent::{ARPNeighbors, Routes};
use coracle_protocol::protobuf::MessageField;
use coracle_protocol::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route};

use crate::{Address, Link};

/// The kernel's number for a neighbour that was set by hand (`NUD_PERMANENT`).
const PERMANENT: i32 = 0x80;

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

/// The routes of all links: those without a gateway first, for by them the gateways are reached.
#[must_use]
pub fn routes(links: &[Link]) -> Routes {
    let mut all: Vec<(bool, Route)> = Vec::new();
    for link in links {
        for route in &link.routes {
            let text = |ip: Option<IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
            let destination = route.destination.map(|Address { ip, prefix }| format!("{ip}/{prefix}"));
            let message = Route {
                dest: destination.unwrap_or_default(),
                gateway: text(route.gateway),
                device: link.name.clone(),
                source: text(route.source),
                scope: route.scope.into(),
                family: if route.is_v6 { IPFamily::v6 } else { IPFamily::v4 }.into(),
                flags: route.flags,
                ..Default::default()
            };
            all.push((route.gateway.is_some(), message));
        }
    }
    all.sort_by_key(|(by_gateway, _)| *by_gateway);
    Routes { Routes: all.into_iter().map(|(_, route)| route).collect(), ..Default::default() }
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
    use crate::{Neighbour, Route as LinkRoute};

    fn link() -> Link {
        let route = LinkRoute { destination: None, gateway: None, source: None, scope: 0, flags: 0, is_v6: false };
        let near = Address { ip: "169.254.1.1".parse().unwrap(), prefix: 32 };
        Link {
            index: 2,
            name: "eth0".into(),
            mac: [2, 0, 0, 0, 0, 0xab],
            mtu: 1400,
            addresses: vec![
                Address { ip: "10.1.0.5".parse().unwrap(), prefix: 24 },
                Address { ip: "fd00::5".parse().unwrap(), prefix: 64 },
            ],
            routes: vec![
                LinkRoute { gateway: Some("169.254.1.1".parse().unwrap()), ..route },
                LinkRoute { destination: Some(near), scope: 253, ..route },
            ],
            neighbours: vec![Neighbour { ip: "169.254.1.1".parse().unwrap(), mac: [0xee; 6] }],
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
        let routes = routes(&[link()]).Routes;
        let texts: Vec<(&str, &str)> =
            routes.iter().map(|route| (route.dest.as_str(), route.gateway.as_str())).collect();
        assert_eq!(texts, [("169.254.1.1/32", ""), ("", "169.254.1.1")]);
        assert_eq!(routes[0].scope, 253);
        let neighbours = neighbours(&[link()]).ARPNeighbors;
        assert_eq!((neighbours[0].lladdr.as_str(), neighbours[0].device.as_str()), ("ee:ee:ee:ee:ee:ee", "eth0"));
    }
}

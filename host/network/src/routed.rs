//! The model `routed`: the namespace is a router between a link and a tap. The namespace answers whoever asks on the link for its
//! addresses, and sends what is for them to the guest.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::neighbour::NeighbourFlags;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

use crate::macvtap::give_v6;
use crate::namespace::kernel;
use crate::switches;
use crate::{Address, Contents, Link, Result, Route, RouteKind};

/// The router as the guest knows it, on every link: addresses that reach no further than a link (RFC 3927, RFC 4291).
pub(crate) const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
pub(crate) const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The kernel's table for the namespace's own addresses, and that for the rest (`RT_TABLE_LOCAL`, `RT_TABLE_MAIN`).
const LOCAL: u32 = 255;
const MAIN: u32 = 254;

/// `RTNH_F_ONLINK`.
const ONLINK: u32 = 4;

/// Lets a tap bring packets from addresses that the namespace has elsewhere.
pub(crate) fn accept_own(tap: &str) -> std::io::Result<()> {
    switches::set(&format!("/proc/sys/net/ipv4/conf/{tap}/accept_local"), "1")
}

/// Sends what is for the link's addresses to the tap, which gets the router's addresses.
pub(crate) async fn join(handle: &Handle, link: &Link, tap: u32) -> Result<()> {
    let step = |what: &str| kernel(format!("{what} the tap of {}", link.name));
    let has = |is_v6: bool| link.addresses.iter().any(|address| address.ip.is_ipv6() == is_v6);
    for (router, bits) in [(IpAddr::V4(ROUTER_V4), 32), (IpAddr::V6(ROUTER_V6), 64)] {
        if has(router.is_ipv6()) {
            let mut request = handle.address().add(tap, router, bits);
            if router.is_ipv6() {
                // Nobody else can have it there, and until the kernel had found that out nobody could ask for it.
                request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            request.execute().await.map_err(step("give an address to"))?;
        }
    }
    for address in &link.addresses {
        let ip = address.ip;
        let way = to_host(ip, tap, MAIN, RouteType::Unicast, RouteScope::Link);
        handle.route().add(way).execute().await.map_err(step("lead an address to"))?;
        if ip.is_ipv4() {
            handle.route().del(own(ip, link.index)).execute().await.map_err(step("take an address for"))?;
        } else {
            // The kernel would ask for others from it, and what they answer would go to the guest.
            let own = handle.address().add(link.index, ip, address.prefix).message_mut().clone();
            handle.address().del(own).execute().await.map_err(step("take an address for"))?;
            // With it went the way to its network.
            let around = around(*address, link.index);
            handle.route().add(around).execute().await.map_err(step("lead to the network of"))?;
        }
        let proxy = handle.neighbours().add(link.index, ip).flags(NeighbourFlags::Proxy);
        proxy.execute().await.map_err(step("answer for an address of"))?;
    }
    Ok(())
}

/// Undoes [`join`] at the link: its addresses are the namespace's again. What leads to the tap goes with it.
pub(crate) async fn undo(handle: &Handle, link: u32, v4: &[Address], v6: &[Address]) {
    let failed = |what: &str, ip: IpAddr, error: rtnetlink::Error| log::debug!("{what} {ip} of link {link}: {error}");
    for Address { ip, .. } in v4.iter().chain(v6) {
        let proxy = handle.neighbours().add(link, *ip).flags(NeighbourFlags::Proxy).message_mut().clone();
        if let Err(error) = handle.neighbours().del(proxy).execute().await {
            failed("the namespace goes on answering for", *ip, error);
        }
    }
    for Address { ip, .. } in v4 {
        if let Err(error) = handle.route().add(own(*ip, link)).replace().execute().await {
            failed("the namespace does not have again", *ip, error);
        }
    }
    give_v6(handle, link, v6).await;
}

/// The way to the network of an address of IPv6, as the kernel makes it.
fn around(address: Address, link: u32) -> RouteMessage {
    let Address { ip: IpAddr::V6(ip), prefix } = network(address) else { return RouteMessage::default() };
    RouteMessageBuilder::<Ipv6Addr>::new()
        .destination_prefix(ip, prefix)
        .output_interface(link)
        .priority(256)
        .protocol(RouteProtocol::Kernel)
        .build()
}

/// The kernel's own entry for an address of the namespace's, of IPv4.
fn own(ip: IpAddr, link: u32) -> RouteMessage {
    let mut entry = to_host(ip, link, LOCAL, RouteType::Local, RouteScope::Host);
    entry.attributes.push(RouteAttribute::PrefSource(ip.into()));
    entry
}

fn to_host(ip: IpAddr, link: u32, table: u32, kind: RouteType, scope: RouteScope) -> RouteMessage {
    match ip {
        IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(ip, 32)
            .output_interface(link)
            .table_id(table)
            .kind(kind)
            .scope(scope)
            .protocol(RouteProtocol::Kernel)
            .build(),
        // Of IPv6 the scope is not told.
        IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(ip, 128)
            .output_interface(link)
            .table_id(table)
            .kind(kind)
            .protocol(RouteProtocol::Kernel)
            .build(),
    }
}

/// What the guest is told of: the addresses alone, and every way by the router.
pub(crate) fn for_guest(contents: &Contents) -> Contents {
    let links = contents.links.iter().map(|link| {
        let around =
            link.addresses.iter().filter(|address| address.prefix < host_bits(address.ip)).map(|address| Route {
                destination: Some(network(*address)),
                source: Some(address.ip),
                is_v6: address.ip.is_ipv6(),
                ..Route::default()
            });
        let routes = around.chain(link.routes.iter().copied()).filter(|route| route.kind == RouteKind::Unicast);
        let by_router = routes.map(|route| Route {
            gateway: Some(if route.is_v6 { ROUTER_V6.into() } else { ROUTER_V4.into() }),
            flags: route.flags | if route.is_v6 { 0 } else { ONLINK },
            scope: 0,
            ..route
        });
        Link {
            addresses: link.addresses.iter().map(|one| Address { ip: one.ip, prefix: host_bits(one.ip) }).collect(),
            routes: by_router.collect(),
            neighbours: Vec::new(),
            ..link.clone()
        }
    });
    Contents { links: links.collect(), barred: contents.barred.clone() }
}

fn host_bits(ip: IpAddr) -> u8 {
    if ip.is_ipv6() { 128 } else { 32 }
}

/// The network of an address.
fn network(address: Address) -> Address {
    let Address { ip, prefix } = address;
    let ip = match ip {
        IpAddr::V4(ip) => {
            let kept = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
            Ipv4Addr::from_bits(ip.to_bits() & kept).into()
        }
        IpAddr::V6(ip) => {
            let kept = u128::MAX.checked_shl(128_u32.saturating_sub(prefix.into())).unwrap_or(0);
            Ipv6Addr::from_bits(ip.to_bits() & kept).into()
        }
    };
    Address { ip, prefix }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        let (ip, prefix) = text.split_once('/').unwrap();
        Address { ip: ip.parse().unwrap(), prefix: prefix.parse().unwrap() }
    }

    #[test]
    fn every_way_of_the_guest_is_by_the_router() {
        let default = |gateway: &str| Route {
            gateway: Some(gateway.parse().unwrap()),
            is_v6: gateway.contains(':'),
            metric: 5,
            mtu: 1300,
            ..Route::default()
        };
        let link = Link {
            index: 3,
            name: "eth0".into(),
            kind: "ipvlan".into(),
            mac: [2; 6],
            mtu: 1400,
            addresses: ["10.1.2.3/16", "fd00:1::9/64", "10.9.9.9/32"].map(address).to_vec(),
            routes: vec![default("10.1.0.1"), default("fd00:1::1")],
            neighbours: Vec::new(),
            device: None,
        };
        let told = for_guest(&Contents { links: vec![link], barred: Vec::new() });
        let link = &told.links[0];
        let text = |one: &Address| format!("{}/{}", one.ip, one.prefix);
        assert_eq!(
            link.addresses.iter().map(text).collect::<Vec<_>>(),
            ["10.1.2.3/32", "fd00:1::9/128", "10.9.9.9/32"]
        );
        let routes: Vec<_> = link
            .routes
            .iter()
            .map(|route| {
                assert_eq!(route.flags == ONLINK, !route.is_v6);
                let to = route.destination.as_ref().map_or("default".to_owned(), text);
                format!("{to} via {} metric {} mtu {}", route.gateway.unwrap(), route.metric, route.mtu)
            })
            .collect();
        assert_eq!(
            routes,
            [
                "10.1.0.0/16 via 169.254.1.1 metric 0 mtu 0",
                "fd00:1::/64 via fe80::1 metric 0 mtu 0",
                "default via 169.254.1.1 metric 5 mtu 1300",
                "default via fe80::1 metric 5 mtu 1300",
            ]
        );
        assert_eq!(network(address("10.1.2.3/0")), address("0.0.0.0/0"));
        assert_eq!(network(address("fd00::1/0")), address("::/0"));
    }
}

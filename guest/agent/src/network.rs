//! UpdateInterface, UpdateRoutes, AddARPNeighbors, ListInterfaces, ListRoutes: the guest's network.

use std::net::IpAddr;
use std::sync::Arc;

use coracle_protocol::agent::{
    AddARPNeighborsRequest, Interfaces, ListInterfacesRequest, ListRoutesRequest, Routes, UpdateInterfaceRequest,
    UpdateRoutesRequest,
};
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use coracle_protocol::types::{ARPNeighbor, IPAddress, IPFamily, Interface, Route};

use crate::kernel_events::await_device;
use crate::netlink::{self, Body, Netlink, attributes, family, family_of, ip, number};
use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result};

/// `IFF_UP`.
const UP: u32 = 1;
/// Bytes of `ifinfomsg`, `ifaddrmsg` and `rtmsg`.
const LINK_BYTES: usize = 16;
const ADDRESS_BYTES: usize = 8;
const ROUTE_BYTES: usize = 12;
/// `IFLA_ADDRESS`, `IFLA_IFNAME`, `IFLA_MTU`.
const LINK_MAC: u16 = 1;
const LINK_NAME: u16 = 3;
const LINK_MTU: u16 = 4;
/// `IFA_ADDRESS`, `IFA_LOCAL`, `IFA_FLAGS`.
const ADDRESS_PEER: u16 = 1;
const ADDRESS_LOCAL: u16 = 2;
const ADDRESS_FLAGS: u16 = 8;
/// `IFA_F_NODAD`: the address was given by somebody who knows that it is free.
const NO_DETECTION: u32 = 0x02;
/// `RTA_DST`, `RTA_OIF`, `RTA_GATEWAY`, `RTA_PRIORITY`, `RTA_PREFSRC`, `RTA_METRICS`, and `RTAX_MTU` in the last.
const ROUTE_DESTINATION: u16 = 1;
const ROUTE_LINK: u16 = 4;
const ROUTE_GATEWAY: u16 = 5;
const ROUTE_METRIC: u16 = 6;
const ROUTE_SOURCE: u16 = 7;
const ROUTE_METRICS: u16 = 8;
const METRIC_MTU: u16 = 2;
/// The main table, routes that somebody has set, plain routes, and those that lead nowhere: `RTN_BLACKHOLE`, `RTN_UNREACHABLE`,
/// `RTN_PROHIBIT`.
const TABLE_MAIN: u8 = 254;
const PROTOCOL_STATIC: u8 = 4;
const TYPE_UNICAST: u8 = 1;
const TYPES_BARRED: std::ops::RangeInclusive<u8> = 6..=8;
/// `NDA_DST`, `NDA_LLADDR`.
const NEIGHBOUR_IP: u16 = 1;
const NEIGHBOUR_MAC: u16 = 2;

/// A link of the guest.
struct Link {
    index: i32,
    name: String,
    mac: Vec<u8>,
    mtu: u32,
}

/// Runs `work` on a socket, on a thread that may wait.
async fn with_netlink<T: Send + 'static>(work: impl FnOnce(&mut Netlink) -> Result<T> + Send + 'static) -> Result<T> {
    let work = move || {
        let mut netlink = Netlink::new().map_err(Error::system("open netlink"))?;
        work(&mut netlink)
    };
    on_thread(work).await
}

/// Gives the link with the interface's hardware address its name, MTU and addresses, and starts it.
pub(crate) async fn update_interface(_: &Arc<Agent>, request: UpdateInterfaceRequest) -> Result<Interface> {
    let interface =
        request.interface.into_option().ok_or_else(|| Error::Invalid("UpdateInterface without an interface".into()))?;
    let mac = parse_mac(&interface.hwAddr)?;
    let mut addresses = Vec::new();
    for address in &interface.IPAddresses {
        let prefix = address.mask.parse::<u8>().map_err(|_| Error::Invalid(format!("{} is no mask", address.mask)))?;
        addresses.push((parse_ip(&address.address)?, prefix));
    }
    let mtu = u32::try_from(interface.mtu).map_err(|_| Error::Invalid("the MTU is out of range".into()))?;
    let name = interface.name.clone();
    if name.is_empty() || name.len() > 15 || name.contains(['/', '\0', ' ']) {
        return Err(Error::Invalid(format!("{name:?} is no name for an interface")));
    }
    with_netlink(move |netlink| {
        let (link, others) = await_device(|| {
            let mut all = links(netlink)?;
            let place = all.iter().position(|link| link.mac == mac);
            let place = place.ok_or_else(|| Error::NotFound(format!("the interface {}", interface.hwAddr)))?;
            Ok((all.swap_remove(place), all))
        })?;
        if let Some(other) = others.iter().find(|other| other.name == name) {
            // Its own name comes with its own request.
            set_link(netlink, other.index, &[(LINK_NAME, format!("was-{}\0", other.index).as_bytes())], 0)?;
        }
        let mtu_bytes = mtu.to_ne_bytes();
        let name_bytes = format!("{name}\0");
        let mut changes: Vec<(u16, &[u8])> = vec![(LINK_NAME, name_bytes.as_bytes())];
        if mtu > 0 {
            changes.push((LINK_MTU, &mtu_bytes));
        }
        set_link(netlink, link.index, &changes, 0)?;
        // Those of IPv4 come first, so that the link tells of them when it starts: whoever is at its other end then knows where the
        // guest is, before it has said anything (a server of a user's network knows it by nothing else).
        let (v4, v6): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|(ip, _)| ip.is_ipv4());
        for (ip, prefix) in v4 {
            add_address(netlink, link.index, ip, prefix)?;
        }
        let told = std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/arp_notify"), "1");
        told.map_err(Error::system(format!("let {name} tell of its addresses")))?;
        set_link(netlink, link.index, &[], UP)?;
        for (ip, prefix) in v6 {
            add_address(netlink, link.index, ip, prefix)?;
        }
        Ok(interface)
    })
    .await
}

/// Replaces the routes that somebody has set by those of the request, in its order.
pub(crate) async fn update_routes(_: &Arc<Agent>, request: UpdateRoutesRequest) -> Result<Routes> {
    let routes = request.routes.into_option().unwrap_or_default();
    with_netlink(move |netlink| {
        let all = links(netlink)?;
        for body in set_routes(netlink)? {
            netlink.change(netlink::DELETE_ROUTE, 0, &Body::new(&[&body])).map_err(Error::system("delete a route"))?;
        }
        for route in &routes.Routes {
            add_route(netlink, &all, route)?;
        }
        Ok(routes)
    })
    .await
}

/// Adds neighbours.
pub(crate) async fn add_neighbours(_: &Arc<Agent>, request: AddARPNeighborsRequest) -> Result<Empty> {
    let neighbours = request.neighbors.into_option().unwrap_or_default().ARPNeighbors;
    with_netlink(move |netlink| {
        let all = links(netlink)?;
        neighbours.iter().try_for_each(|neighbour| add_neighbour(netlink, &all, neighbour))
    })
    .await?;
    Ok(Empty::new())
}

/// Lists the links but loopback, with their addresses.
pub(crate) async fn list_interfaces(_: &Arc<Agent>, _: ListInterfacesRequest) -> Result<Interfaces> {
    let interfaces = with_netlink(|netlink| {
        let mut interfaces = Vec::new();
        for link in links(netlink)?.into_iter().filter(|link| link.name != "lo") {
            interfaces.push(Interface {
                device: link.name.clone(),
                IPAddresses: addresses(netlink, link.index)?,
                name: link.name,
                mtu: link.mtu.into(),
                hwAddr: link.mac.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":"),
                ..Default::default()
            });
        }
        Ok(interfaces)
    });
    Ok(Interfaces { Interfaces: interfaces.await?, ..Default::default() })
}

/// Lists the routes that somebody has set.
pub(crate) async fn list_routes(_: &Arc<Agent>, _: ListRoutesRequest) -> Result<Routes> {
    let routes = with_netlink(|netlink| {
        let all = links(netlink)?;
        Ok(set_routes(netlink)?.iter().map(|body| to_route(body, &all)).collect())
    });
    Ok(Routes { Routes: routes.await?, ..Default::default() })
}

fn links(netlink: &mut Netlink) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    let each = |body: &[u8]| {
        let mut link = Link { index: link_index(body).unwrap_or(0), name: String::new(), mac: Vec::new(), mtu: 0 };
        for (kind, value) in attributes(body, LINK_BYTES) {
            match kind {
                LINK_MAC => link.mac = value.to_vec(),
                LINK_NAME => link.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
                LINK_MTU => link.mtu = number(value),
                _ => {}
            }
        }
        links.push(link);
    };
    netlink.list(netlink::GET_LINK, &Body::new(&[&[0; LINK_BYTES]]), each).map_err(Error::system("list links"))?;
    Ok(links)
}

/// The number of the link that an `ifinfomsg` or `ifaddrmsg` is about.
fn link_index(body: &[u8]) -> Option<i32> {
    body.get(4..8)?.try_into().ok().map(i32::from_ne_bytes)
}

fn index_of(all: &[Link], name: &str) -> Result<i32> {
    let found = all.iter().find(|link| link.name == name);
    found.map(|link| link.index).ok_or_else(|| Error::NotFound(format!("the interface {name}")))
}

fn set_link(netlink: &mut Netlink, index: i32, changes: &[(u16, &[u8])], flags: u32) -> Result<()> {
    let header = [&[0; 4][..], &index.to_ne_bytes(), &flags.to_ne_bytes(), &flags.to_ne_bytes()];
    let body = changes.iter().fold(Body::new(&header), |body, (kind, value)| body.with(*kind, value));
    netlink.change(netlink::NEW_LINK, 0, &body).map_err(Error::system(format!("set the link {index}")))
}

fn add_address(netlink: &mut Netlink, index: i32, ip: IpAddr, prefix: u8) -> Result<()> {
    let body = Body::new(&[&[family(ip), prefix, 0, 0], &index.to_ne_bytes()])
        .with_ip(ADDRESS_LOCAL, ip)
        .with_ip(ADDRESS_PEER, ip)
        .with(ADDRESS_FLAGS, &NO_DETECTION.to_ne_bytes());
    let step = Error::system(format!("add the address {ip}/{prefix}"));
    netlink.change(netlink::NEW_ADDRESS, netlink::REPLACE, &body).map_err(step)
}

fn addresses(netlink: &mut Netlink, index: i32) -> Result<Vec<IPAddress>> {
    let mut addresses = Vec::new();
    let each = |body: &[u8]| {
        let prefix = body.get(1).copied().unwrap_or(0);
        let found =
            attributes(body, ADDRESS_BYTES).find(|(kind, _)| *kind == ADDRESS_PEER).and_then(|(_, ip_)| ip(ip_));
        if let Some(address) = found.filter(|_| link_index(body) == Some(index)) {
            let family = if address.is_ipv6() { IPFamily::v6 } else { IPFamily::v4 };
            let (address, mask) = (address.to_string(), prefix.to_string());
            addresses.push(IPAddress { family: family.into(), address, mask, ..Default::default() });
        }
    };
    let body = Body::new(&[&[0; ADDRESS_BYTES]]);
    netlink.list(netlink::GET_ADDRESS, &body, each).map_err(Error::system("list addresses"))?;
    Ok(addresses)
}

/// The messages of all routes of the main table that came with no address and no advertisement.
fn set_routes(netlink: &mut Netlink) -> Result<Vec<Vec<u8>>> {
    let mut routes = Vec::new();
    let each = |body: &[u8]| {
        if let [_, _, _, _, TABLE_MAIN, PROTOCOL_STATIC, _, kind, ..] = body
            && (*kind == TYPE_UNICAST || TYPES_BARRED.contains(kind))
        {
            routes.push(body.to_vec());
        }
    };
    netlink.list(netlink::GET_ROUTE, &Body::new(&[&[0; ROUTE_BYTES]]), each).map_err(Error::system("list routes"))?;
    Ok(routes)
}

fn add_route(netlink: &mut Netlink, all: &[Link], route: &Route) -> Result<()> {
    let is_v6 = route.family.enum_value_or_default() == IPFamily::v6;
    let destination = match route.dest.as_str() {
        "" => None,
        text => {
            let (address, prefix) = text.split_once('/').unwrap_or((text, if is_v6 { "128" } else { "32" }));
            let prefix = prefix.parse::<u8>().map_err(|_| Error::Invalid(format!("{text} is no destination")))?;
            Some((parse_ip(address)?, prefix))
        }
    };
    let scope = u8::try_from(route.scope).map_err(|_| Error::Invalid("the scope is out of range".into()))?;
    let prefix = destination.map_or(0, |(_, prefix)| prefix);
    let kind = match u8::try_from(route.kind) {
        Ok(0 | TYPE_UNICAST) => TYPE_UNICAST,
        Ok(kind) if TYPES_BARRED.contains(&kind) => kind,
        _ => return Err(Error::Unsupported(format!("a route of the kind {}", route.kind))),
    };
    let kinds = [family_of(is_v6), prefix, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, scope, kind];
    let mut body = Body::new(&[&kinds, &route.flags.to_ne_bytes()]);
    if let Some((ip, _)) = destination {
        body = body.with_ip(ROUTE_DESTINATION, ip);
    }
    for (kind, text) in [(ROUTE_GATEWAY, &route.gateway), (ROUTE_SOURCE, &route.source)] {
        if !text.is_empty() {
            body = body.with_ip(kind, parse_ip(text)?);
        }
    }
    if route.metric > 0 {
        body = body.with(ROUTE_METRIC, &route.metric.to_ne_bytes());
    }
    if route.mtu > 0 {
        let mtu = Body::new(&[]).with(METRIC_MTU, &route.mtu.to_ne_bytes());
        body = body.with(ROUTE_METRICS, mtu.bytes());
    }
    if kind == TYPE_UNICAST {
        body = body.with(ROUTE_LINK, &index_of(all, &route.device)?.to_ne_bytes());
    }
    let step = Error::system(format!("add the route to {:?} by {:?}", route.dest, route.gateway));
    netlink.change(netlink::NEW_ROUTE, netlink::REPLACE, &body).map_err(step)
}

fn to_route(body: &[u8], all: &[Link]) -> Route {
    let byte = |at: usize| body.get(at).copied().unwrap_or(0);
    let mut route = Route { scope: byte(6).into(), kind: byte(7).into(), ..Default::default() };
    let is_v6 = byte(0) == family_of(true);
    route.family = if is_v6 { IPFamily::v6 } else { IPFamily::v4 }.into();
    for (kind, value) in attributes(body, ROUTE_BYTES) {
        let text = || ip(value).map(|ip| ip.to_string()).unwrap_or_default();
        match kind {
            ROUTE_METRIC => route.metric = number(value),
            ROUTE_METRICS => {
                let mtu = attributes(value, 0).find(|(kind, _)| *kind == METRIC_MTU);
                route.mtu = mtu.map_or(0, |(_, value)| number(value));
            }
            ROUTE_DESTINATION => route.dest = format!("{}/{}", text(), byte(1)),
            ROUTE_GATEWAY => route.gateway = text(),
            ROUTE_SOURCE => route.source = text(),
            ROUTE_LINK => {
                let index = value.first_chunk().map_or(0, |bytes| i32::from_ne_bytes(*bytes));
                route.device =
                    all.iter().find(|link| link.index == index).map(|link| link.name.clone()).unwrap_or_default();
            }
            _ => {}
        }
    }
    route
}

fn add_neighbour(netlink: &mut Netlink, all: &[Link], neighbour: &ARPNeighbor) -> Result<()> {
    let ip = parse_ip(&neighbour.toIPAddress.address)?;
    let mac = parse_mac(&neighbour.lladdr)?;
    let index = index_of(all, &neighbour.device)?;
    let state = u16::try_from(neighbour.state).map_err(|_| Error::Invalid("the state is out of range".into()))?;
    let flags = u8::try_from(neighbour.flags).map_err(|_| Error::Invalid("the flags are out of range".into()))?;
    let body = Body::new(&[&[family(ip), 0, 0, 0], &index.to_ne_bytes(), &state.to_ne_bytes(), &[flags, 0]])
        .with_ip(NEIGHBOUR_IP, ip)
        .with(NEIGHBOUR_MAC, &mac);
    let step = Error::system(format!("add the neighbour {ip}"));
    netlink.change(netlink::NEW_NEIGHBOUR, netlink::REPLACE, &body).map_err(step)
}

fn parse_ip(text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| Error::Invalid(format!("{text:?} is no address")))
}

fn parse_mac(text: &str) -> Result<Vec<u8>> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes.filter(|bytes| bytes.len() == 6).ok_or_else(|| Error::Invalid(format!("{text:?} is no hardware address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_checked() {
        assert_eq!(parse_mac("02:00:00:00:00:Ff").unwrap(), [2, 0, 0, 0, 0, 255]);
        for bad in ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "x2:00:00:00:00:00", "0200:00:00:00:00:0"] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
        assert!(parse_ip("10.0.0.256").is_err() && parse_ip("fd00::1").is_ok());
    }

    #[test]
    fn a_route_is_read_back() {
        let all = [Link { index: 7, name: "eth0".into(), mac: vec![], mtu: 0 }];
        let mut message = vec![family_of(false), 16, 0, 0, TABLE_MAIN, PROTOCOL_STATIC, 253, TYPE_UNICAST, 0, 0, 0, 0];
        for (kind, value) in [(ROUTE_DESTINATION, [10, 9, 0, 0]), (ROUTE_LINK, 7_i32.to_ne_bytes())] {
            message.extend(8_u16.to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(value);
        }
        let mtu = Body::new(&[]).with(METRIC_MTU, &1300_u32.to_ne_bytes());
        let more = Body::new(&[]).with(ROUTE_METRIC, &7_u32.to_ne_bytes()).with(ROUTE_METRICS, mtu.bytes());
        message.extend(more.bytes());
        let route = to_route(&message, &all);
        assert_eq!((route.dest.as_str(), route.device.as_str(), route.scope), ("10.9.0.0/16", "eth0", 253));
        assert_eq!((route.metric, route.mtu, route.kind), (7, 1300, 1));
    }
}

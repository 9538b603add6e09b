//! A network for who may make none: what the guest sends is done for it by a program that runs as a user of the host, passt or the
//! monitor itself. No link of the host is made, and none is touched.
//!
//! ```text
//! guest, 10.0.2.15 ── virtio-net ── frames ──▶ passt or the monitor ──▶ sockets of the host's user
//! ```

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};

use coracle_machine::Forward;

use crate::{Address, Contents, Link, Route};

/// The guest's hardware address. There is one guest on each such network.
pub const MAC: [u8; 6] = [0x02, 0, 0, 0, 0x02, 0x0f];

/// Addresses that QEMU's own network has where nobody gives others; passt is given the same.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const NAMES: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const PREFIX: u8 = 24;

/// The guest's end of it.
#[must_use]
pub fn contents() -> Contents {
    let route = Route { gateway: Some(GATEWAY.into()), ..Route::default() };
    let link = Link {
        index: 0,
        name: "eth0".into(),
        kind: String::new(),
        device: None,
        mac: MAC,
        mtu: 1500,
        addresses: vec![Address { ip: GUEST.into(), prefix: PREFIX }],
        routes: vec![route],
        neighbours: Vec::new(),
    };
    Contents { links: vec![link], barred: Vec::new() }
}

/// passt's arguments (passt(1)); it finds its end of the connection at the descriptor `fd`.
#[must_use]
pub fn passt(fd: i32, forwards: &[Forward]) -> Vec<OsString> {
    let mut words: Vec<String> = ["--foreground", "--quiet", "--ipv4-only", "--fd"].map(Into::into).into();
    words.push(fd.to_string());
    for (option, value) in [
        ("--address", GUEST.to_string()),
        ("--netmask", PREFIX.to_string()),
        ("--gateway", GATEWAY.to_string()),
        ("--dns-forward", NAMES.to_string()),
    ] {
        words.extend([option.to_owned(), value]);
    }
    // The gateway is not the host's loopback, and nobody of this guest's asks for an address.
    words.extend(["--no-map-gw", "--no-dhcp"].map(Into::into));
    for (option, is_udp) in [("--tcp-ports", false), ("--udp-ports", true)] {
        let own: Vec<&Forward> = forwards.iter().filter(|forward| forward.is_udp == is_udp).collect();
        if own.is_empty() {
            words.extend([option.to_owned(), "none".into()]);
        }
        for Forward { host, guest, .. } in own {
            let port = host.port();
            let at = match host.ip() {
                IpAddr::V4(Ipv4Addr::UNSPECIFIED) => String::new(),
                ip => format!("{ip}/"),
            };
            words.extend([option.to_owned(), format!("{at}{port}:{guest}")]);
        }
    }
    words.into_iter().map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_reaches_the_gateway() {
        let contents = contents();
        let (link, route) = (&contents.links[0], contents.links[0].routes[0]);
        assert_eq!(crate::plan::interface(link).hwAddr, "02:00:00:00:02:0f");
        assert_eq!(route.gateway, Some(GATEWAY.into()));
        assert_eq!(link.addresses[0].ip, IpAddr::from(GUEST));
    }

    #[test]
    fn ports_are_passts_own_way_and_no_others_are_open() {
        let forward = |is_udp, host: &str, guest| Forward { is_udp, host: host.parse().unwrap(), guest };
        let words = |forwards: &[Forward]| {
            let words = passt(3, forwards);
            words.iter().map(|word| word.to_str().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
        };
        assert!(words(&[]).ends_with("--no-map-gw --no-dhcp --tcp-ports none --udp-ports none"));
        let all = words(&[forward(false, "0.0.0.0:8080", 80), forward(false, "127.0.0.1:9000", 90)]);
        assert!(all.ends_with("--tcp-ports 8080:80 --tcp-ports 127.0.0.1/9000:90 --udp-ports none"), "{all}");
        assert!(words(&[forward(true, "0.0.0.0:53", 5353)]).ends_with("--tcp-ports none --udp-ports 53:5353"));
    }
}

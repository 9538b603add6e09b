//! The network of an ordinary user's container, as the container sees it. The addresses are those of QEMU's own network, which passt
//! is given, too.

use std::net::{IpAddr, Ipv4Addr};

use coracle_cni::{Port, Protocol};

/// The container's address, and where it asks for names.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub(crate) const NAMES: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

/// A port as the setting `network.user_ports` has it: `ADDRESS:PORT:PORT/tcp`.
pub(crate) fn forward(port: &Port) -> String {
    let address = port.host_ip.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let host = std::net::SocketAddr::new(address, port.host_port);
    let protocol = if port.protocol == Protocol::Udp { "udp" } else { "tcp" };
    format!("{host}:{}/{protocol}", port.container_port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_as_the_setting_has_them() {
        let text = |port: &str| forward(&port.parse().unwrap());
        assert_eq!(text("8080:80"), "0.0.0.0:8080:80/tcp");
        assert_eq!(text("127.0.0.1:53:5353/udp"), "127.0.0.1:53:5353/udp");
        assert_eq!(text("[::1]:1:2"), "[::1]:1:2/tcp");
    }
}

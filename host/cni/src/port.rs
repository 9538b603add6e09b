//! A port of the host that leads to one of a container.

use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port as CNI's capability `portMappings` has it, and as people write it: `[ADDRESS:]HOST:CONTAINER[/udp]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// The host's.
    pub host_port: u16,
    /// The container's.
    pub container_port: u16,
    /// The protocol.
    pub protocol: Protocol,
    /// The host's address; all of them where there is none.
    #[serde(rename = "hostIP", skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("{text:?}: give [ADDRESS:]HOST:CONTAINER, and /udp behind it where it is not TCP");
        let (rest, protocol) = match text.split_once('/') {
            None => (text, Protocol::Tcp),
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some(_) => return Err(expected()),
        };
        let (rest, container) = rest.rsplit_once(':').ok_or_else(expected)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (Some(address.parse().map_err(|_| expected())?), host)
            }
        };
        let number = |text: &str| text.parse().ok().filter(|number| *number > 0).ok_or_else(expected);
        Ok(Self { host_port: number(host)?, container_port: number(container)?, protocol, host_ip: address })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_as_people_write_them() {
        let port: Port = "8080:80".parse().unwrap();
        assert_eq!((port.host_port, port.container_port, port.protocol, port.host_ip), (8080, 80, Protocol::Tcp, None));
        let port: Port = "127.0.0.1:53:5353/udp".parse().unwrap();
        assert_eq!((port.host_port, port.protocol), (53, Protocol::Udp));
        assert_eq!(port.host_ip, Some("127.0.0.1".parse().unwrap()));
        assert_eq!("[::1]:1:2".parse::<Port>().unwrap().host_ip, Some("::1".parse().unwrap()));
        for bad in ["", "80", "0:80", "80:0", "80:x", "80:70000", "a:80:80", "80:80/sctp", ":80", "80:"] {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_as_plugins_read_them() {
        let json = serde_json::to_value("127.0.0.1:53:5353/udp".parse::<Port>().unwrap()).unwrap();
        let expected = serde_json::json!(
            { "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "127.0.0.1" });
        assert_eq!(json, expected);
    }
}

//! What a namespace holds, in plain terms.

use std::net::IpAddr;

/// A link with addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind, as the kernel calls it: `veth`.
    pub kind: String,
    /// Its hardware address, or one that was made up for it: the guest's.
    pub mac: [u8; 6],
    /// Its largest packet, in bytes.
    pub mtu: u32,
    /// Its addresses, but those that a kernel gives itself.
    pub addresses: Vec<Address>,
    /// Routes through it, but those that come with its addresses; those to a gateway last.
    pub routes: Vec<Route>,
    /// Neighbours that somebody has set.
    pub neighbours: Vec<Neighbour>,
    /// The device that it is, where it is one of the host's: the name of its bus, and its own there.
    pub device: Option<(String, String)>,
}

/// An address and its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of the network.
    pub prefix: u8,
}

/// A route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Route {
    /// Where it leads: the network of this address. None: everywhere.
    pub destination: Option<Address>,
    /// By whom.
    pub gateway: Option<IpAddr>,
    /// The address that packets are sent from.
    pub source: Option<IpAddr>,
    /// The kernel's number for how far it reaches (rtnetlink(7), `rtm_scope`).
    pub scope: u8,
    /// The kernel's flags (`RTNH_F_ONLINK` and others).
    pub flags: u32,
    /// Whether it is of IP version 6.
    pub is_v6: bool,
    /// Which of several to one place counts: the lowest.
    pub metric: u32,
    /// The largest packet on it, in bytes; 0 is the link's.
    pub mtu: u32,
    /// What it does with a packet.
    pub kind: RouteKind,
}

/// What a route does with a packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RouteKind {
    /// It sends it on.
    #[default]
    Unicast,
    /// It drops it.
    Blackhole,
    /// It says that nobody is there.
    Unreachable,
    /// It says that it is forbidden.
    Prohibit,
}

impl RouteKind {
    /// The kernel's number (rtnetlink(7), `rtm_type`).
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Unicast => 1,
            Self::Blackhole => 6,
            Self::Unreachable => 7,
            Self::Prohibit => 8,
        }
    }
}

/// What a pod takes over of its namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The links with addresses, but loopback.
    pub links: Vec<Link>,
    /// Routes that lead nowhere.
    pub barred: Vec<Route>,
}

/// A neighbour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// Its address.
    pub ip: IpAddr,
    /// Its hardware address.
    pub mac: [u8; 6],
}

//! How a link of the namespace and a device of the machine are one another's wire.

use coracle_vfio::Rebind;

use crate::{Address, Link};

/// A way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Model {
    /// A filter sends on each frame, in both directions, between the link and a tap.
    #[default]
    TcFilter,
    /// The machine's device is a macvtap on the link, with the link's hardware address; the link has another one meanwhile.
    Macvtap,
    /// The namespace is a router between the link and a tap (IP alone): whatever the link is.
    Routed,
    /// The links are left alone, and the guest has none.
    None,
}

impl Model {
    /// Its name, in settings and where links are noted.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TcFilter => "tcfilter",
            Self::Macvtap => "macvtap",
            Self::Routed => "routed",
            Self::None => "none",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::TcFilter, Self::Macvtap, Self::Routed, Self::None].into_iter().find(|model| model.name() == name)
    }
}

/// How links are taken over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// The way.
    pub model: Model,
    /// The most that goes to the guest by each link, in bits a second.
    pub to_guest: Option<u64>,
    /// The most that comes from it.
    pub from_guest: Option<u64>,
    /// How many pairs of queues each link has: so many processors of the guest send and receive at once. 0 is one.
    pub queues: u16,
}

/// What it takes to give a link back. It is noted before the link is touched, for whoever has to do it where this process can't.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The link's number in its namespace.
    pub index: u32,
    /// The way in which it was taken.
    pub model: Model,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Addresses of IPv6 that the link has not meanwhile, for the namespace would answer for them: they are its again afterwards.
    pub v6: Vec<Address>,
    /// How the namespace's switches were.
    pub switches: Switches,
    /// Whether what comes from the guest is limited.
    pub is_limited: bool,
    /// The PCI device that it is, where the machine has that itself.
    pub function: Option<Function>,
}

/// A link that is a device of the host's, and goes to the machine as such.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// The device, and its driver.
    pub rebind: Rebind,
    /// The link's name.
    pub name: String,
}

/// Switches of a namespace that make a router of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Switches {
    /// Whether it hands on packets of IPv4.
    pub forwards_v4: bool,
    /// The same of IPv6.
    pub forwards_v6: bool,
    /// Whether it answers for others' addresses of IPv6 on the link.
    pub answers_v6: bool,
    /// Whether it answers on the link for no address of IPv4, though it has them.
    pub is_silent_v4: bool,
}

/// How a device's word begins in a line.
const FUNCTION: &str = "pci=";

impl Hold {
    /// For a link that is taken over so, in a namespace whose switches are these.
    #[must_use]
    pub fn of(link: &Link, options: &Options, switches: Switches) -> Self {
        let v6 = link.addresses.iter().filter(|address| address.ip.is_ipv6() && options.model == Model::Routed);
        Self {
            index: link.index,
            model: options.model,
            mac: link.mac,
            v6: v6.copied().collect(),
            switches,
            is_limited: options.from_guest.is_some(),
            function: None,
        }
    }

    /// As a line of text.
    #[must_use]
    pub fn line(&self) -> String {
        let Switches { forwards_v4, forwards_v6, answers_v6, is_silent_v4 } = self.switches;
        let flags = [forwards_v4, forwards_v6, answers_v6, is_silent_v4, self.is_limited]
            .map(|flag| if flag { '1' } else { '0' });
        let mut words = vec![self.index.to_string(), self.model.name().to_owned(), coracle_machine::mac_text(self.mac)];
        words.push(flags.iter().collect());
        if let Some(Function { rebind: Rebind { address, driver }, name }) = &self.function {
            // A link's name has no slash and no blank, and a driver's no comma.
            words.push(format!("{FUNCTION}{address},{},{name}", driver.as_deref().unwrap_or_default()));
        }
        words.extend(self.v6.iter().map(|address| format!("{}/{}", address.ip, address.prefix)));
        words.join(" ")
    }

    /// From its line; `None` where it is none.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let index = words.next()?.parse().ok()?;
        let model = Model::of(words.next()?)?;
        let mut mac = [0; 6];
        let mut parts = words.next()?.split(':');
        for byte in &mut mac {
            *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
        }
        let mut flags = words.next()?.chars().map(|flag| flag == '1');
        let mut flag = || flags.next();
        let [forwards_v4, forwards_v6, answers_v6, is_silent_v4] = [flag()?, flag()?, flag()?, flag()?];
        let switches = Switches { forwards_v4, forwards_v6, answers_v6, is_silent_v4 };
        let is_limited = flag()?;
        let mut words = words.peekable();
        let function = match words.next_if(|word| word.starts_with(FUNCTION)) {
            Some(word) => {
                let mut parts = word.strip_prefix(FUNCTION)?.splitn(3, ',');
                let address = parts.next()?.parse().ok()?;
                let driver = Some(parts.next()?.to_owned()).filter(|driver| !driver.is_empty());
                Some(Function { rebind: Rebind { address, driver }, name: parts.next()?.to_owned() })
            }
            None => None,
        };
        let address = |word: &str| {
            let (ip, prefix) = word.split_once('/')?;
            Some(Address { ip: ip.parse().ok()?, prefix: prefix.parse().ok()? })
        };
        Some(Self { index, model, mac, v6: words.map(address).collect::<Option<_>>()?, switches, is_limited, function })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_noted_is_read_again() {
        for model in [Model::TcFilter, Model::Macvtap, Model::Routed, Model::None] {
            let v6 = ["fd00::2", "fd01::2"].map(|ip| Address { ip: ip.parse().unwrap(), prefix: 64 }).to_vec();
            let switches = Switches { forwards_v4: true, answers_v6: true, ..Switches::default() };
            let rebind = Rebind { address: "0000:03:10.2".parse().unwrap(), driver: None };
            let function =
                Function { rebind: Rebind { driver: Some("igbvf".into()), ..rebind }, name: "net1,x".into() };
            let hold = Hold {
                index: 7,
                model,
                mac: [2, 0, 0xfe, 0, 1, 9],
                v6,
                switches,
                is_limited: true,
                function: Some(function),
            };
            assert_eq!(Hold::parse(&Hold { function: None, ..hold.clone() }.line()).unwrap().function, None);
            assert_eq!(Hold::parse(&Hold { v6: vec![], ..hold.clone() }.line()).unwrap().v6, []);
            assert_eq!(Hold::parse(&hold.line()), Some(hold));
        }
        for line in [
            "",
            "7",
            "x tcfilter 02:00:00:00:00:01 00000",
            "7 other 02:00:00:00:00:01 00000",
            "7 routed 02:00",
            "7 routed 02:00:00:00:00:01 00",
        ] {
            assert_eq!(Hold::parse(line), None, "{line}");
        }
    }
}

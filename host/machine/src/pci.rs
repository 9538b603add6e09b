//! Where a PCI function is.

use std::fmt;
use std::str::FromStr;

/// The address of a PCI function: domain, bus, device and function, in hexadecimal: `0000:01:00.0` (PCI Local Bus 3.0, 3.2.2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// The domain.
    pub domain: u32,
    /// The bus.
    pub bus: u8,
    /// The device on it: 0 to 31.
    pub device: u8,
    /// Its function: 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function)
    }
}

/// What is no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no PCI address, which is such as 0000:01:00.0")]
pub struct NoAddress;

impl FromStr for PciAddress {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let digits = |text: &str, least: usize, most: usize| {
            let plain = (least..=most).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit());
            if plain { u32::from_str_radix(text, 16).map_err(|_| NoAddress) } else { Err(NoAddress) }
        };
        let (rest, function) = text.split_once('.').ok_or(NoAddress)?;
        let mut parts = rest.split(':');
        let mut part = || parts.next().ok_or(NoAddress);
        let (domain, bus, device) = (digits(part()?, 4, 8)?, digits(part()?, 2, 2)?, digits(part()?, 2, 2)?);
        let function = digits(function, 1, 1)?;
        if parts.next().is_some() || device > 31 || function > 7 {
            return Err(NoAddress);
        }
        let byte = |number: u32| u8::try_from(number).map_err(|_| NoAddress);
        Ok(Self { domain, bus: byte(bus)?, device: byte(device)?, function: byte(function)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_shown() {
        for text in ["0000:01:00.0", "0000:ff:1f.7", "10000:02:03.1"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "01:00.0",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:01:00",
            "0000:1:00.0",
            "0000:01:00.0.0",
            "+000:01:00.0",
            "0000:01:00:0.0",
        ] {
            assert_eq!(text.parse::<PciAddress>(), Err(NoAddress), "{text}");
        }
    }
}

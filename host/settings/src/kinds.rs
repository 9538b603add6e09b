//! The types that settings have: how a value is read, shown and described.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::{Value as Json, json};
use toml::de::DeValue;

/// A value as somebody has given it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Given {
    /// A text.
    Text(String),
    /// A text that stands for whatever it can be read as: that of an annotation.
    Bare(String),
    /// A whole number.
    Number(i64),
    /// A truth value.
    Flag(bool),
    /// A list of texts.
    Texts(Vec<String>),
    /// Anything else.
    Other,
}

impl Given {
    /// A value of a file.
    pub(crate) fn of(value: &DeValue<'_>) -> Self {
        let text = |value: &DeValue<'_>| value.as_str().map(str::to_owned);
        match value {
            DeValue::String(_) => text(value).map_or(Self::Other, Self::Text),
            DeValue::Integer(number) => {
                i64::from_str_radix(number.as_str(), number.radix()).map_or(Self::Other, Self::Number)
            }
            DeValue::Boolean(flag) => Self::Flag(*flag),
            DeValue::Array(items) => {
                let texts: Option<_> = items.iter().map(|item| text(item.get_ref())).collect();
                texts.map_or(Self::Other, Self::Texts)
            }
            _ => Self::Other,
        }
    }

    pub(crate) fn text(&self) -> Option<&str> {
        if let Self::Text(text) | Self::Bare(text) = self { Some(text) } else { None }
    }

    fn number(&self) -> Option<i64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Bare(text) => text.parse().ok(),
            _ => None,
        }
    }

    fn flag(&self) -> Option<bool> {
        match self {
            Self::Flag(flag) => Some(*flag),
            Self::Bare(text) => text.parse().ok(),
            _ => None,
        }
    }
}

/// What may run a machine's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// KVM, and nothing else.
    Kvm,
    /// KVM where it works, else emulation, which is no security boundary.
    Any,
    /// Emulation always.
    Emulation,
}

/// The machine monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    /// QEMU.
    Qemu,
    /// The built-in one, which needs KVM.
    Builtin,
    /// The built-in one where KVM works, else QEMU.
    Auto,
}

/// What the root of a container of `coracle run` is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rootfs {
    /// Disks of the machine: the image's layers, and one to write to.
    Erofs,
    /// A folder of the host's, shared with the machine.
    Virtiofs,
}

/// How links of a pod's network namespace and the guest's are one another's wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkModel {
    /// By a filter that sends on each frame.
    TcFilter,
    /// By macvtap devices.
    Macvtap,
    /// By a router, for IP alone.
    Routed,
    /// Not at all.
    None,
}

/// How a guest has files of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedFs {
    /// It sees them.
    VirtioFs,
    /// It has copies.
    None,
}

/// What an image's layers are to a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layers {
    /// Disks.
    Disk,
    /// Memory, where it can have that.
    Memory,
}

/// What kubelet's `emptyDir` volumes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmptyDir {
    /// Folders of the host.
    Folder,
    /// Disks of the guest.
    Disk,
}

/// How lines of the log are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `key=value` by spaces.
    Text,
    /// An object of JSON a line.
    Json,
    /// To systemd's journal.
    Journal,
}

/// Where a collector takes traces: its address, and what its paths begin with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collector(pub Option<(SocketAddr, String)>);

impl Kind for Collector {
    const EXPECTED: &'static str = "http://ADDRESS:PORT with a number for an address, \"\" for none";
    fn read(value: &Given) -> Option<Self> {
        let text = value.text()?;
        if text.is_empty() {
            return Some(Self(None));
        }
        let rest = text.strip_prefix("http://")?;
        let (address, path) =
            rest.split_once('/').map_or((rest, ""), |(address, path)| (address, path.trim_end_matches('/')));
        let path = if path.is_empty() { String::new() } else { format!("/{path}") };
        path.bytes().all(|byte| byte.is_ascii_graphic()).then_some(())?;
        Some(Self(Some((address.parse().ok()?, path))))
    }
    fn show(&self) -> String {
        let text = self.0.as_ref().map(|(address, path)| format!("http://{address}{path}"));
        format!("{:?}", text.unwrap_or_default())
    }
    fn schema() -> Json {
        json!({ "type": "string", "pattern": "^(http://[0-9a-fA-F.:\\[\\]]+:[0-9]+(/[!-~]*)?)?$" })
    }
}

/// A limit; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(pub Option<u64>);

/// Pairs of queues of a network link; none: as many as there are processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queues(pub Option<u16>);

impl Kind for Queues {
    const EXPECTED: &'static str = "a whole number from 1 to 8, or 0 for as many as the machine has processors";
    fn read(value: &Given) -> Option<Self> {
        let number: u16 = value.number()?.try_into().ok()?;
        (number <= 8).then_some(Self(Some(number).filter(|number| *number > 0)))
    }
    fn show(&self) -> String {
        self.0.unwrap_or(0).to_string()
    }
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 0, "maximum": 8 })
    }
}

/// Numbers, as the kernel writes lists of processors (cpuset(7), "List format"): `0-3,8`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numbers(pub Vec<u32>);

/// The most of such a list.
const NUMBERS_MAX: u32 = 1024;

impl Kind for Numbers {
    const EXPECTED: &'static str = "a list of numbers such as \"0-3,8\", \"\" for any";
    fn read(value: &Given) -> Option<Self> {
        let mut all = Vec::new();
        for part in value.text()?.split(',').filter(|part| !part.is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            if first > last || last >= NUMBERS_MAX {
                return None;
            }
            all.extend(first..=last);
        }
        all.sort_unstable();
        all.dedup();
        Some(Self(all))
    }
    fn show(&self) -> String {
        format!("{:?}", self.0.iter().map(u32::to_string).collect::<Vec<_>>().join(","))
    }
    fn schema() -> Json {
        json!({ "type": "string", "pattern": "^([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?$" })
    }
}

impl Kind for Limit {
    const EXPECTED: &'static str = "a whole number, 0 for none";
    fn read(value: &Given) -> Option<Self> {
        let number: u64 = value.number()?.try_into().ok()?;
        Some(Self(Some(number).filter(|number| *number > 0)))
    }
    fn show(&self) -> String {
        self.0.unwrap_or(0).to_string()
    }
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 0 })
    }
}

/// The machine type of QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MachineType {
    /// A PC with PCI Express.
    Q35,
    /// A small machine without PCI.
    Microvm,
}

/// A type that a setting can have.
pub(crate) trait Kind: Sized {
    /// What is expected, for error texts.
    const EXPECTED: &'static str;
    /// Reads a value.
    fn read(value: &Given) -> Option<Self>;
    /// The value as TOML.
    fn show(&self) -> String;
    /// What JSON Schema says of it (2020-12).
    fn schema() -> Json;
}

impl Kind for PathBuf {
    const EXPECTED: &'static str = "an absolute path";
    fn read(value: &Given) -> Option<Self> {
        value.text().map(Self::from).filter(|path| path.is_absolute())
    }
    fn show(&self) -> String {
        format!("{:?}", self.display().to_string())
    }
    fn schema() -> Json {
        json!({ "type": "string", "pattern": "^/" })
    }
}

impl Kind for u32 {
    const EXPECTED: &'static str = "a whole number above 0";
    fn read(value: &Given) -> Option<Self> {
        value.number().and_then(|number| number.try_into().ok()).filter(|number| *number > 0)
    }
    fn show(&self) -> String {
        self.to_string()
    }
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 1, "maximum": u32::MAX })
    }
}

impl Kind for u64 {
    const EXPECTED: &'static str = "a whole number above 0";
    fn read(value: &Given) -> Option<Self> {
        value.number().and_then(|number| number.try_into().ok()).filter(|number| *number > 0)
    }
    fn show(&self) -> String {
        self.to_string()
    }
    fn schema() -> Json {
        json!({ "type": "integer", "minimum": 1 })
    }
}

impl Kind for bool {
    const EXPECTED: &'static str = "true or false";
    fn read(value: &Given) -> Option<Self> {
        value.flag()
    }
    fn show(&self) -> String {
        self.to_string()
    }
    fn schema() -> Json {
        json!({ "type": "boolean" })
    }
}

impl Kind for String {
    const EXPECTED: &'static str = "a text";
    fn read(value: &Given) -> Option<Self> {
        value.text().map(str::to_owned)
    }
    fn show(&self) -> String {
        format!("{self:?}")
    }
    fn schema() -> Json {
        json!({ "type": "string" })
    }
}

impl Kind for Vec<String> {
    const EXPECTED: &'static str = "a list of texts";
    fn read(value: &Given) -> Option<Self> {
        if let Given::Texts(texts) = value { Some(texts.clone()) } else { None }
    }
    fn show(&self) -> String {
        format!("{self:?}")
    }
    fn schema() -> Json {
        json!({ "type": "array", "items": { "type": "string" } })
    }
}

/// Gives an enumeration its words.
macro_rules! words {
    ($type:ident, $expected:literal, $($word:literal = $variant:ident),*) => {
        impl Kind for $type {
            const EXPECTED: &'static str = $expected;
            fn read(value: &Given) -> Option<Self> {
                match value.text()? {
                    $($word => Some(Self::$variant),)*
                    _ => None,
                }
            }
            fn show(&self) -> String {
                match self {
                    $(Self::$variant => format!("{:?}", $word),)*
                }
            }
            fn schema() -> Json {
                json!({ "enum": [$($word),*] })
            }
        }
    };
}

words!(Accelerator, "one of \"kvm\", \"any\", \"emulation\"", "kvm" = Kvm, "any" = Any, "emulation" = Emulation);
words!(Monitor, "one of \"qemu\", \"builtin\", \"auto\"", "qemu" = Qemu, "builtin" = Builtin, "auto" = Auto);
words!(Rootfs, "one of \"erofs\", \"virtiofs\"", "erofs" = Erofs, "virtiofs" = Virtiofs);
words!(
    NetworkModel,
    "one of \"tcfilter\", \"macvtap\", \"routed\", \"none\"",
    "tcfilter" = TcFilter,
    "macvtap" = Macvtap,
    "routed" = Routed,
    "none" = None
);
words!(SharedFs, "one of \"virtio-fs\", \"none\"", "virtio-fs" = VirtioFs, "none" = None);
words!(LogFormat, "one of \"text\", \"json\", \"journal\"", "text" = Text, "json" = Json, "journal" = Journal);
words!(Layers, "one of \"disk\", \"memory\"", "disk" = Disk, "memory" = Memory);
words!(EmptyDir, "one of \"folder\", \"disk\"", "folder" = Folder, "disk" = Disk);
words!(MachineType, "one of \"q35\", \"microvm\"", "q35" = Q35, "microvm" = Microvm);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_is_an_address() {
        let read = |text: &str| Collector::read(&Given::Text(text.into()));
        for (text, shown) in [
            ("http://127.0.0.1:4318", "http://127.0.0.1:4318"),
            ("http://[::1]:4318/a/b/", "http://[::1]:4318/a/b"),
            ("", ""),
        ] {
            assert_eq!(read(text).unwrap().show(), format!("{shown:?}"));
        }
        for wrong in
            ["https://127.0.0.1:4318", "http://localhost:4318", "http://127.0.0.1", "http://127.0.0.1:1/a b", "x"]
        {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}

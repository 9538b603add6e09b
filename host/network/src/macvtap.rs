//! The model `macvtap`: a device on the link whose other end is a descriptor (Linux: drivers/net/macvtap.c).

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags};
use rtnetlink::packet_route::link::MacVtapMode;
use rtnetlink::{Handle, LinkMacVtap, LinkUnspec};

use crate::namespace::kernel;
use crate::{Address, Error, Hold, Link, Result};

/// Makes the macvtap `name` on the link, with the link's hardware address; the link has another one from then on, and none of its
/// addresses of IPv6, `v6`: the namespace would answer for them. (For those of IPv4 it is silenced.)
pub(crate) async fn make(handle: &Handle, link: &Link, v6: &[Address], name: &str) -> Result<()> {
    for Address { ip, prefix } in v6 {
        let own = handle.address().add(link.index, *ip, *prefix).message_mut().clone();
        handle.address().del(own).execute().await.map_err(kernel(format!("take {ip} from {}", link.name)))?;
    }
    // No two devices of one parent have one address. The second bit says that it was made up.
    let [_, rest @ ..] = link.mac;
    let other = [link.mac[0] ^ 0x40 | 2, rest[0], rest[1], rest[2], rest[3] ^ 0xc0, rest[4]];
    set_mac(handle, link.index, other).await.map_err(kernel(format!("give {} another hardware address", link.name)))?;
    let device = LinkMacVtap::new(name, link.index, MacVtapMode::Bridge).address(link.mac.to_vec()).mtu(link.mtu);
    // Which groups the guest has joined the macvtap does not know, and IPv6 finds a neighbour by one.
    let device = device.allmulticast(true).up();
    let made = handle.link().add(device.build()).execute().await;
    made.map_err(kernel(format!("make the macvtap {name} on {}", link.name)))
}

/// Gives a link addresses of IPv6 that it had before.
pub(crate) async fn give_v6(handle: &Handle, link: u32, addresses: &[Address]) {
    for Address { ip, prefix } in addresses {
        let mut request = handle.address().add(link, *ip, *prefix);
        // They were the namespace's, and nobody else's.
        request.message_mut().attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        if let Err(error) = request.execute().await {
            log::debug!("the link {link} does not have {ip} again: {error}");
        }
    }
}

async fn set_mac(handle: &Handle, index: u32, mac: [u8; 6]) -> std::result::Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(index).address(mac.to_vec()).build()).execute().await
}

/// Undoes [`make`]: takes the macvtap away, whose number this is where it is there, and gives the link its addresses back.
pub(crate) async fn undo(handle: &Handle, hold: &Hold, macvtap: Option<u32>) {
    let Hold { index, mac, .. } = *hold;
    if let Some(macvtap) = macvtap
        && let Err(error) = handle.link().del(macvtap).execute().await
    {
        log::debug!("the macvtap of link {index} stays: {error}");
    }
    if let Err(error) = set_mac(handle, index, mac).await {
        log::debug!("the link {index} keeps another hardware address: {error}");
    }
    give_v6(handle, index, &hold.v6).await;
}

/// Opens the macvtap `name` of the calling thread's network namespace, once for each of its queues. The thread gets a mount namespace of
/// its own: a network namespace's devices are told only by a sysfs that was mounted in it.
pub(crate) fn open(name: &str, queues: u16) -> std::io::Result<Vec<OwnedFd>> {
    use rustix::fs::{FileType, Mode, OFlags};
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let folder = tempfile::tempdir()?;
    let sys = folder.path().join("sys");
    std::fs::create_dir(&sys)?;
    mount(Some("sysfs"), &sys, Some("sysfs"), MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC, none)?;
    let opened = number(&sys, name).and_then(|(major, minor)| {
        let node = folder.path().join("tap");
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(rustix::fs::CWD, &node, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, device)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        (0..queues.max(1)).map(|_| Ok(rustix::fs::open(&node, flags, Mode::empty())?)).collect()
    });
    nix::mount::umount2(&sys, nix::mount::MntFlags::MNT_DETACH)?;
    opened
}

/// The number of a macvtap's device.
fn number(sys: &Path, name: &str) -> std::io::Result<(u32, u32)> {
    let folder = sys.join("class/net").join(name);
    let taps = std::fs::read_dir(folder.join("macvtap"))?.flatten();
    let tap = taps.map(|entry| entry.path()).find(|path| path.join("dev").exists());
    let missing = || std::io::Error::other(format!("the kernel has no device for {name}"));
    let text = std::fs::read_to_string(tap.ok_or_else(missing)?.join("dev"))?;
    let parts = text.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    parts.ok_or_else(missing)
}

/// Whether a macvtap can stand on a link of this kind: one of macvlan or ipvlan would be on what that stands on.
///
/// # Errors
/// [`Error::Model`].
pub(crate) fn check(link: &Link) -> Result<()> {
    if matches!(link.kind.as_str(), "veth" | "vlan") {
        return Ok(());
    }
    Err(Error::Model { name: link.name.clone(), kind: link.kind.clone(), model: "macvtap" })
}

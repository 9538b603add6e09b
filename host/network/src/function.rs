//! Links that are PCI devices of the host's: the machine has the device itself, and the link is gone meanwhile.

use std::os::fd::AsRawFd;
use std::path::Path;

use coracle_machine::mac_text;
use coracle_vfio::{Host, Write};
use rtnetlink::{Handle, LinkUnspec};

use crate::model::{Function, Hold};
use crate::{Error, Link, Result};

/// What it takes to give the device of a link back; `None` for a link that is no device.
///
/// # Errors
/// [`Error::Function`] where it is one that can't be handed over: it is no PCI device, the host has no IOMMU for it or not the driver,
/// or something else of the host's would go with it.
pub(crate) fn of(link: &Link) -> Result<Option<Function>> {
    let Some((bus, name)) = &link.device else { return Ok(None) };
    let host = Host::default();
    let failed = |why: String| Error::Function { name: link.name.clone(), why };
    let address =
        host.function_of(bus, name).ok_or_else(|| failed(format!("{bus} {name} is no PCI device of its own")))?;
    if !host.has_driver() {
        return Err(failed("the host has no driver vfio-pci: load it (`modprobe vfio-pci`)".into()));
    }
    // Those of the host's own namespace: the link itself is elsewhere.
    if let Some(other) = host.links(&address).first() {
        return Err(failed(format!("the link {other} of the host is the same device")));
    }
    let rebind = host.rebind(&address).map_err(|error| failed(error.to_string()))?;
    Ok(Some(Function { rebind, name: link.name.clone() }))
}

/// Takes the device from its driver.
///
/// # Errors
/// [`Error::Function`]; then it has to be given back.
pub(crate) fn hand_over(function: &Function) -> Result<()> {
    let host = Host::default();
    let failed = |why: String| Error::Function { name: function.name.clone(), why };
    write(&host.hand_over(&function.rebind)).map_err(|error| failed(error.to_string()))?;
    if host.is_handed_over(&function.rebind.address) {
        return Ok(());
    }
    Err(failed("the host's driver vfio-pci does not take it".into()))
}

/// Gives the device to its driver again. It may wait for whoever has it open.
pub(crate) fn take_back(function: &Function) {
    if let Err(error) = write(&Host::default().take_back(&function.rebind)) {
        log::warn!("the PCI device {} is not its driver's again: {error}", function.rebind.address);
    }
}

/// Gives the link of a device that its driver has again to the namespace, with its name there.
pub(crate) async fn give_link_back(hold: &Hold, function: &Function, namespace: &impl AsRawFd) {
    let address = function.rebind.address;
    // A device may have several.
    let of_its_mac = |name: &String| {
        let text = std::fs::read_to_string(Path::new(LINKS).join(name).join("address"));
        text.is_ok_and(|text| text.trim() == mac_text(hold.mac))
    };
    let found = Host::default().links(&address);
    let Some(name) = found.iter().find(|name| of_its_mac(name)).or(found.first()) else {
        log::warn!("the PCI device {address} has no network link again");
        return;
    };
    if let Err(error) = move_link(name, namespace, &function.name).await {
        log::warn!("the network link {name} of the PCI device {address} stays in the host's namespace: {error}");
    }
}

/// Where the kernel shows the links of this process's namespace.
const LINKS: &str = "/sys/class/net";

/// Moves a link of this process's namespace to another one, under another name: there may be one of its own name there.
async fn move_link(
    found: &str,
    namespace: &impl AsRawFd,
    name: &str,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let index = std::fs::read_to_string(Path::new(LINKS).join(found).join("ifindex"))?.trim().parse()?;
    let (connection, here, _): (_, Handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    let away = LinkUnspec::new_with_index(index).down().setns_by_fd(namespace.as_raw_fd()).name(name.to_owned());
    Ok(here.link().set(away.build()).execute().await?)
}

/// Writes all, in order; the first failure is told, and does not keep the rest from being written.
fn write(writes: &[Write]) -> std::io::Result<()> {
    let mut outcome = Ok(());
    for Write { path, text } in writes {
        let written = std::fs::write(path, text);
        let written = written.map_err(|error| std::io::Error::other(format!("write {}: {error}", path.display())));
        outcome = outcome.and(written);
    }
    outcome
}

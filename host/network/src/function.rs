//! Links that are PCI devices of the host's: the machine has the device itself, and the link is gone meanwhile.

use std::os::fd::AsRawFd;

use coracle_vfio::{Host, Write};
use futures::TryStreamExt;
use rtnetlink::{Handle, LinkUnspec};

use crate::model::Function;
use crate::{Error, Link, Result};

/// What it takes to give the device of a link back.
///
/// # Errors
/// [`Error::Function`] where the host has no IOMMU for it, or shares it with another device of the host's.
pub(crate) fn of(link: &Link) -> Result<Option<Function>> {
    let Some((bus, name)) = &link.device else { return Ok(None) };
    let host = Host::default();
    let failed = |why: String| Error::Function { name: link.name.clone(), why };
    let address = host.function_of(bus, name).ok_or_else(|| failed(format!("{bus} {name} is no PCI device")))?;
    let rebind = host.rebind(&address).map_err(|error| failed(error.to_string()))?;
    Ok(Some(Function { rebind, name: link.name.clone() }))
}

/// Takes the device from its driver.
///
/// # Errors
/// [`Error::Function`]; then its driver may have it again.
pub(crate) fn hand_over(function: &Function) -> Result<()> {
    let host = Host::default();
    let written = write(&host.hand_over(&function.rebind));
    if written.is_ok() && host.is_handed_over(&function.rebind.address) {
        return Ok(());
    }
    let why = match written {
        Err(error) => error.to_string(),
        Ok(()) => "the host's driver vfio-pci does not take it: load it (`modprobe vfio-pci`)".into(),
    };
    if let Err(error) = write(&host.take_back(&function.rebind)) {
        log::debug!("the PCI device {} is on no driver: {error}", function.rebind.address);
    }
    Err(Error::Function { name: function.name.clone(), why })
}

/// Gives the device to its driver again, and its link to the namespace, by its name there. `inside` speaks of the namespace.
pub(crate) async fn give_back(function: &Function, namespace: &impl AsRawFd, inside: &Handle) {
    let host = Host::default();
    let address = function.rebind.address;
    if let Err(error) = write(&host.take_back(&function.rebind)) {
        log::warn!("the PCI device {address} is not its driver's again: {error}");
        return;
    }
    let Some(found) = host.links(&address).into_iter().next() else {
        log::warn!("the PCI device {address} has no network link again");
        return;
    };
    if let Err(error) = move_link(&found, namespace, inside, &function.name).await {
        log::warn!("the network link {found} of the PCI device {address} stays in the host's namespace: {error}");
    }
}

/// Moves a link of this process's namespace to another one, and names it.
async fn move_link(
    found: &str,
    namespace: &impl AsRawFd,
    inside: &Handle,
    name: &str,
) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let (connection, here, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    let find = async |handle: &Handle, name: &str| {
        let message = handle.link().get().match_name(name.to_owned()).execute().try_next().await?;
        Ok::<_, rtnetlink::Error>(message.map_or(0, |message| message.header.index))
    };
    let index = find(&here, found).await?;
    let away = LinkUnspec::new_with_index(index).down().setns_by_fd(namespace.as_raw_fd()).build();
    here.link().set(away).execute().await?;
    let index = find(inside, found).await?;
    inside.link().set(LinkUnspec::new_with_index(index).name(name.to_owned()).build()).execute().await?;
    Ok(inside.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await?)
}

fn write(writes: &[Write]) -> std::io::Result<()> {
    for Write { path, text } in writes {
        std::fs::write(path, text)
            .map_err(|error| std::io::Error::other(format!("write {}: {error}", path.display())))?;
    }
    Ok(())
}

//! The model `tcfilter`: what arrives at a link goes on as if the tap had sent it, and the other way round.

use rtnetlink::Handle;
use rtnetlink::packet_route::tc::TcHandle;

use crate::Result;
use crate::namespace::kernel;

/// The ingress qdisc as a parent of filters (`TC_H_INGRESS`).
const INGRESS: u32 = 0xffff_0000;
/// Every protocol (`ETH_P_ALL`), in network byte order.
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

/// Lets a link and a tap be one another's wire. Where that fails the link is as it was; the tap is its descriptor's.
pub(crate) async fn join(handle: &Handle, link: u32, tap: u32) -> Result<()> {
    add_ingress(handle, link).await?;
    let joined = async {
        add_ingress(handle, tap).await?;
        redirect(handle, link, tap).await?;
        redirect(handle, tap, link).await
    };
    let outcome = joined.await;
    if outcome.is_err() {
        undo(handle, link).await;
    }
    outcome
}

/// Gives a link the place where its incoming packets can be looked at. A link that has one already is somebody else's.
async fn add_ingress(handle: &Handle, link: u32) -> Result<()> {
    let index = i32::try_from(link).unwrap_or_default();
    let step = format!("add an ingress qdisc to link {link}");
    handle.qdisc().add(index).ingress().execute().await.map_err(kernel(step))
}

/// Sends on what arrives at one link as if the other one had sent it.
async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<()> {
    let step = || format!("redirect packets of link {from} to link {to}");
    let from = i32::try_from(from).unwrap_or_default();
    let filter = handle.traffic_filter(from).add().parent(INGRESS).protocol(ALL_PROTOCOLS);
    let filter = filter.redirect(to).map_err(kernel(step()))?;
    filter.execute().await.map_err(kernel(step()))
}

/// Undoes [`join`] at the link. One that is gone is no error.
pub(crate) async fn undo(handle: &Handle, link: u32) {
    remove_qdisc(handle, link, TcHandle::INGRESS, TcHandle { major: 0xffff, minor: 0 }).await;
}

/// Takes a queueing discipline of a link away, by its place and its own handle. One that is not there is no error.
pub(crate) async fn remove_qdisc(handle: &Handle, link: u32, parent: TcHandle, own: TcHandle) {
    let mut request = handle.qdisc().del(i32::try_from(link).unwrap_or_default());
    let header = &mut request.message_mut().header;
    (header.parent, header.handle) = (parent, own);
    if let Err(error) = request.execute().await {
        log::debug!("the link {link} keeps the queueing discipline {own:?}: {error}");
    }
}

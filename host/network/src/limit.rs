//! Limits of what a link sends: a token bucket (Linux: net/sched/sch_tbf.c, linux/pkt_sched.h).

use futures::StreamExt;
use rtnetlink::packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use rtnetlink::{Error as NetlinkError, Handle};

use crate::Result;
use crate::filter::remove_qdisc;
use crate::namespace::kernel;

/// By which ours is known, so that nobody else's is taken away.
const OURS: TcHandle = TcHandle { major: 0xc0ac, minor: 0 };

/// `TCA_TBF_PARMS`, `TCA_TBF_RATE64`, `TCA_TBF_BURST`.
const PARAMETERS: u16 = 1;
const RATE64: u16 = 4;
const BURST: u16 = 6;
/// `TC_LINKLAYER_ETHERNET`: with it the kernel needs no table of rates.
const ETHERNET: u8 = 1;
/// What may be sent at once: as much as a host sends in one packet before it is cut (64 KiB), or 10 ms of the rate.
const BURST_BYTES_MIN: u64 = 128 << 10;

/// Limits what a link sends to `bits` a second.
///
/// # Errors
/// Where the kernel has no token buckets, or the link has a queueing discipline of somebody else's.
pub(crate) async fn limit(handle: &Handle, link: u32, bits: u64) -> Result<()> {
    let mut message = TcMessage::with_index(i32::try_from(link).unwrap_or_default());
    (message.header.parent, message.header.handle) = (TcHandle::ROOT, OURS);
    message.attributes.push(TcAttribute::Kind("tbf".into()));
    message.attributes.push(TcAttribute::Options(options(bits)));
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewQueueDiscipline(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let step = || format!("limit link {link} to {bits} bits a second");
    let mut answers = handle.clone().request(request).map_err(kernel(step()))?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(kernel(step())(NetlinkError::NetlinkError(error)));
        }
    }
    Ok(())
}

fn options(bits: u64) -> Vec<TcOption> {
    let bytes = (bits / 8).max(1);
    let burst = u32::try_from((bytes / 100).max(BURST_BYTES_MIN)).unwrap_or(u32::MAX);
    // What waits beyond 50 ms is dropped.
    let queue = u32::try_from(bytes / 20).unwrap_or(u32::MAX).saturating_add(burst);
    // struct tc_tbf_qopt: two struct tc_ratespec of 12 bytes (the second is a peak's, and none), then limit, buffer and mtu.
    let mut parameters = vec![0, ETHERNET, 0, 0, 0, 0, 0, 0];
    parameters.extend(u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
    parameters.extend([0; 12]);
    parameters.extend(queue.to_ne_bytes());
    parameters.extend([0; 8]);
    let mut options = vec![(PARAMETERS, parameters), (BURST, burst.to_ne_bytes().to_vec())];
    if bytes > u64::from(u32::MAX) {
        options.push((RATE64, bytes.to_ne_bytes().to_vec()));
    }
    options.into_iter().map(|(kind, bytes)| TcOption::Other(DefaultNla::new(kind, bytes))).collect()
}

/// Takes the limit away. A link that is gone, or has none of ours, is no error.
pub(crate) async fn undo(handle: &Handle, link: u32) {
    remove_qdisc(handle, link, TcHandle::ROOT, OURS).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(options: &[TcOption], kind: u16) -> Option<Vec<u8>> {
        use rtnetlink::packet_core::Nla;
        options.iter().find(|option| option.kind() == kind).map(|option| {
            let mut bytes = vec![0; option.value_len()];
            option.emit_value(&mut bytes);
            bytes
        })
    }

    #[test]
    fn a_limit_is_what_the_kernel_reads() {
        let slow = options(8_000_000);
        let parameters = bytes(&slow, PARAMETERS).unwrap();
        assert_eq!(parameters.len(), 36, "struct tc_tbf_qopt");
        assert_eq!(parameters[8..12], 1_000_000_u32.to_ne_bytes());
        assert_eq!(bytes(&slow, BURST).unwrap(), (128_u32 << 10).to_ne_bytes());
        assert!(bytes(&slow, RATE64).is_none());
        let fast = options(80_000_000_000);
        assert_eq!(bytes(&fast, RATE64).unwrap(), 10_000_000_000_u64.to_ne_bytes());
    }
}

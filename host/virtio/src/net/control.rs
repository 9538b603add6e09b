//! The control queue (virtio 1.3, section 5.1.6.5), for how many pairs of queues the driver uses: nothing else is offered.

use crate::chain::walk;
use crate::device::{Broken, Counters, Turn};
use crate::drain::{Budget, Served, drain};
use crate::ring::Ring;

const BUDGET: Budget = Budget { chains: 16, bytes: usize::MAX };
/// `VIRTIO_NET_CTRL_MQ` and `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const PAIRS_SET: [u8; 2] = [4, 0];
/// `VIRTIO_NET_OK`.
const OK: u8 = 0;
/// `VIRTIO_NET_ERR`.
const ERR: u8 = 1;

/// Answers the driver's commands. `set_pairs` gets the number that the driver wants, and says whether it has it now.
pub(super) fn pump(
    ring: &mut Ring,
    counters: &mut Counters,
    mut set_pairs: impl FnMut(u16) -> bool,
) -> Result<Turn, Broken> {
    drain(ring, BUDGET, |chain| {
        let Ok(mut buffers) = walk(chain, chain.memory()) else {
            counters.errors += 1;
            return Ok(Served::default());
        };
        // Class, command, and the number of pairs.
        let mut command = [0; 4];
        let whole = buffers.readable.take(&mut command) && buffers.readable.is_empty();
        // Without a place for the answer nothing is done.
        let done = match command {
            [class, kind, low, high] if whole && [class, kind] == PAIRS_SET && !buffers.writable.is_empty() => {
                set_pairs(u16::from_le_bytes([low, high]))
            }
            _ => false,
        };
        counters.errors += u64::from(!done);
        let written = buffers.writable.put(&[if done { OK } else { ERR }]);
        Ok(Served { written: u32::try_from(written).unwrap_or(0), moved: 0 })
    })
}

//! The network device (virtio 1.3, section 5.1) over taps: a frame of the guest's is a write, one for the guest is a read.
//!
//! The tap speaks the device's own header (`IFF_VNET_HDR`), so checksums and segmentation pass through as the guest and the
//! host's kernel have them, and this device never looks into a frame.
//! [`Net`] serves the queues itself; for [`VhostNet`] the host's kernel does it (vhost-net).

mod control;
#[cfg(test)]
mod kernel_tests;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;
#[cfg(test)]
mod vhost_tests;
mod virtio;

pub use vhost::{Vhost, VhostNet};
pub use virtio::{Net, PAIRS_MAX};

/// Bytes of the header before each frame, which a device of virtio 1 always has (section 5.1.6): struct `virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;
/// Bytes of the shortest frame: two addresses and a type. A tap takes none that is shorter.
const FRAME_BYTES_MIN: usize = 14;
/// Bytes of the longest frame: what a driver without mergeable buffers has room for (section 5.1.6.3.1).
const FRAME_BYTES_MAX: usize = 65550;

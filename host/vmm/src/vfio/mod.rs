//! PCI devices of the host's that the guest has for itself (Linux: Documentation/driver-api/vfio.rst). Whoever starts the monitor has taken
//! them from the host, and hands their descriptors over.
//!
//! ```text
//! guest ── ECAM ──▶ Passed ── what the guest may see and change ──▶ the device's configuration space
//!       ── BAR ───▶ mapped into the guest; but for the table of interrupts, which is the monitor's
//! device ─ DMA ───▶ IOMMU ──▶ the guest's memory (Reach), and nothing else of the host's
//!        ─ interrupt ─▶ eventfd ──▶ KVM
//! ```

mod iommu;
mod kernel;
mod passed;
mod reach;

pub(crate) use iommu::Iommu;
pub(crate) use kernel::Device;
pub(crate) use passed::{Numbers, Passed};
pub(crate) use reach::{Reach, Space};

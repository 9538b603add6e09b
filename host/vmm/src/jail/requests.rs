//! The requests of ioctl that each kind of thread may make.

use super::syscalls::Kind;

// linux/kvm.h.
const KVM_CREATE_VCPU: u32 = 0xae41;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
const KVM_SET_LAPIC: u32 = 0x4400_ae8f;
const KVM_SET_MSRS: u32 = 0x4008_ae89;
const KVM_SET_CPUID2: u32 = 0x4008_ae90;
// What a machine that is saved has in KVM: told, and never set any more.
const KVM_CHECK_EXTENSION: u32 = 0xae03;
const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_GET_MSRS: u32 = 0xc008_ae88;
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
const KVM_GET_TSC_KHZ: u32 = 0xaea3;
const KVM_GET_XSAVE: u32 = 0x9000_aea4;
const KVM_GET_XCRS: u32 = 0x8188_aea6;
const KVM_RUN: u32 = 0xae80;
// A guest's watchdogs are told that it stood.
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_IRQ_LINE: u32 = 0x4008_ae61;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
// linux/vfio.h, linux/iommufd.h. A device is made, and reaches what the guest gains, by the main thread; processors put it where the
// guest wants it, and let go of it.
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const VFIO_DEVICE_GET_INFO: u32 = 0x3b6b;
const VFIO_DEVICE_GET_REGION_INFO: u32 = 0x3b6c;
const VFIO_DEVICE_SET_IRQS: u32 = 0x3b6e;
const VFIO_DEVICE_RESET: u32 = 0x3b6f;
const VFIO_IOMMU_MAP_DMA: u32 = 0x3b71;
const VFIO_IOMMU_UNMAP_DMA: u32 = 0x3b72;
const IOMMU_IOAS_MAP: u32 = 0x3b85;
const IOMMU_IOAS_UNMAP: u32 = 0x3b86;
// linux/if_tun.h.
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETQUEUE: u32 = 0x4004_54d9;
// linux/vhost.h.
const VHOST_GET_FEATURES: u32 = 0x8008_af00;
const VHOST_SET_OWNER: u32 = 0xaf01;
const VHOST_SET_VRING_ERR: u32 = 0x4008_af22;
const VHOST_SET_FEATURES: u32 = 0x4008_af00;
const VHOST_SET_MEM_TABLE: u32 = 0x4008_af03;
const VHOST_SET_VRING_NUM: u32 = 0x4008_af10;
const VHOST_SET_VRING_ADDR: u32 = 0x4028_af11;
const VHOST_SET_VRING_BASE: u32 = 0x4008_af12;
const VHOST_SET_VRING_KICK: u32 = 0x4008_af20;
const VHOST_SET_VRING_CALL: u32 = 0x4008_af21;
const VHOST_NET_SET_BACKEND: u32 = 0x4008_af30;
// linux/fs.h.
const BLKDISCARD: u32 = 0x1277;
const BLKPBSZGET: u32 = 0x127b;
const BLKSSZGET: u32 = 0x1268;
const FIONBIO: u32 = 0x5421;

/// Those of a kind of thread.
pub(super) fn requests(kind: Kind) -> Vec<u32> {
    match kind {
        // A device that breaks is taken from the kernel; one that comes later is made, and the guest told of it.
        Kind::Main => vec![
            BLKPBSZGET,
            BLKSSZGET,
            FIONBIO,
            IOMMU_IOAS_MAP,
            IOMMU_IOAS_UNMAP,
            KVM_CHECK_EXTENSION,
            KVM_GET_CLOCK,
            KVM_GET_IRQCHIP,
            KVM_IRQ_LINE,
            TUNSETQUEUE,
            VFIO_DEVICE_GET_INFO,
            VFIO_DEVICE_GET_REGION_INFO,
            VFIO_DEVICE_RESET,
            VFIO_IOMMU_MAP_DMA,
            VFIO_IOMMU_UNMAP_DMA,
            VHOST_GET_FEATURES,
            VHOST_NET_SET_BACKEND,
            VHOST_SET_OWNER,
            VHOST_SET_VRING_ERR,
        ],
        Kind::Disk => vec![BLKDISCARD],
        Kind::Nursery => {
            [requests(Kind::Processor), vec![KVM_CREATE_VCPU, KVM_SET_CPUID2, KVM_SET_LAPIC, KVM_SET_MSRS]].concat()
        }
        Kind::Processor => vec![
            KVM_RUN,
            KVM_GET_DEBUGREGS,
            KVM_GET_LAPIC,
            KVM_GET_MP_STATE,
            KVM_GET_MSRS,
            KVM_GET_REGS,
            KVM_GET_SREGS,
            KVM_GET_TSC_KHZ,
            KVM_GET_VCPU_EVENTS,
            KVM_GET_XCRS,
            KVM_GET_XSAVE,
            KVM_KVMCLOCK_CTRL,
            KVM_IRQ_LINE,
            KVM_IRQFD,
            KVM_IOEVENTFD,
            KVM_SET_GSI_ROUTING,
            KVM_SET_USER_MEMORY_REGION,
            VFIO_DEVICE_SET_IRQS,
            TUNSETOFFLOAD,
            TUNSETVNETHDRSZ,
            TUNSETQUEUE,
            VHOST_SET_FEATURES,
            VHOST_SET_MEM_TABLE,
            VHOST_SET_VRING_NUM,
            VHOST_SET_VRING_ADDR,
            VHOST_SET_VRING_BASE,
            VHOST_SET_VRING_KICK,
            VHOST_SET_VRING_CALL,
            VHOST_NET_SET_BACKEND,
        ],
    }
}

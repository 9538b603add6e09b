//! What devices of the host's may reach of this process's memory: the guest's, at the addresses that the guest knows.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use vfio_bindings::bindings::vfio::{
    VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
};

/// Requests (linux/vfio.h, linux/iommufd.h).
const MAP_DMA: libc::Ioctl = 0x3b71;
const UNMAP_DMA: libc::Ioctl = 0x3b72;
const IOAS_MAP: libc::Ioctl = 0x3b85;
const IOAS_UNMAP: libc::Ioctl = 0x3b86;

/// `IOMMU_IOAS_MAP_FIXED_IOVA | _WRITEABLE | _READABLE`.
const IOAS_MAP_FLAGS: u32 = 1 | 1 << 1 | 1 << 2;

/// `struct iommu_ioas_map`.
#[repr(C)]
struct IoasMap {
    size: u32,
    flags: u32,
    ioas: u32,
    reserved: u32,
    user_address: u64,
    length: u64,
    iova: u64,
}

/// `struct iommu_ioas_unmap`.
#[repr(C)]
struct IoasUnmap {
    size: u32,
    ioas: u32,
    iova: u64,
    length: u64,
}

/// An address space of devices.
#[derive(Debug)]
pub(crate) enum Iommu {
    /// Of groups.
    Container(OwnedFd),
    /// Of devices by IOMMUFD: the descriptor, and the number of the address space.
    Iommufd(OwnedFd, u32),
}

/// What an address space is asked.
pub(crate) trait Maps: Send + Sync {
    /// Lets devices reach `bytes` of this process's memory from `place` on, at the guest's address `start`. The kernel keeps all of it in
    /// memory until it is unmapped.
    ///
    /// # Errors
    /// The kernel's: `ENOMEM` where the process may not keep so much there (`RLIMIT_MEMLOCK`).
    fn map(&self, start: u64, place: u64, bytes: u64) -> io::Result<()>;

    /// Takes that back.
    ///
    /// # Errors
    /// The kernel's.
    fn unmap(&self, start: u64, bytes: u64) -> io::Result<()>;
}

impl Maps for Iommu {
    fn map(&self, start: u64, place: u64, bytes: u64) -> io::Result<()> {
        let mapped = match self {
            Self::Container(fd) => {
                let request = vfio_iommu_type1_dma_map {
                    argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
                    flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
                    vaddr: place,
                    iova: start,
                    size: bytes,
                };
                // SAFETY: the request reads the structure, which lives during the call. What it names is the guest's memory, which lives until
                // the process ends, and which this process looks at by volatile accesses only.
                #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
                unsafe {
                    libc::ioctl(fd.as_raw_fd(), MAP_DMA, &raw const request)
                }
            }
            Self::Iommufd(fd, ioas) => {
                let size = size_of::<IoasMap>() as u32;
                let (flags, ioas) = (IOAS_MAP_FLAGS, *ioas);
                let request =
                    IoasMap { size, flags, ioas, reserved: 0, user_address: place, length: bytes, iova: start };
                // SAFETY: as above.
                #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
                unsafe {
                    libc::ioctl(fd.as_raw_fd(), IOAS_MAP, &raw const request)
                }
            }
        };
        if mapped < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn unmap(&self, start: u64, bytes: u64) -> io::Result<()> {
        let unmapped = match self {
            Self::Container(fd) => {
                let mut request = vfio_iommu_type1_dma_unmap {
                    argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
                    iova: start,
                    size: bytes,
                    ..Default::default()
                };
                // SAFETY: the request reads and writes the structure, which lives during the call.
                #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
                unsafe {
                    libc::ioctl(fd.as_raw_fd(), UNMAP_DMA, &raw mut request)
                }
            }
            Self::Iommufd(fd, ioas) => {
                let size = size_of::<IoasUnmap>() as u32;
                let mut request = IoasUnmap { size, ioas: *ioas, iova: start, length: bytes };
                // SAFETY: as above.
                #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
                unsafe {
                    libc::ioctl(fd.as_raw_fd(), IOAS_UNMAP, &raw mut request)
                }
            }
        };
        if unmapped < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

//! What the kernel is asked of a PCI device of the host's (Linux: include/uapi/linux/vfio.h, iommufd.h).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::mm::{MapFlags, ProtFlags};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE, vfio_device_info, vfio_irq_set, vfio_region_info,
};
use vmm_sys_util::eventfd::EventFd;

/// Requests; all of them are of the kind `_IO(';', 100 + n)`.
const DEVICE_GET_INFO: libc::Ioctl = 0x3b6b;
const DEVICE_GET_REGION_INFO: libc::Ioctl = 0x3b6c;
const DEVICE_SET_IRQS: libc::Ioctl = 0x3b6e;
const DEVICE_RESET: libc::Ioctl = 0x3b6f;

/// A part of a device that it shows: a BAR, or the configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Region {
    pub(crate) bytes: u64,
    /// Where it is in the device's file.
    pub(crate) offset: u64,
    /// Whether it can be read and written at all, and whether it can be mapped.
    pub(crate) is_accessible: bool,
    pub(crate) is_mappable: bool,
}

/// A device of the host's.
pub(crate) trait Kernel: Send {
    /// What is at an index (`VFIO_PCI_BAR0_REGION_INDEX` and so on).
    fn region(&self, index: u32) -> io::Result<Region>;

    /// Reads at an offset of the device's file.
    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes there.
    fn write(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Has its message-signalled interrupts signal these, in the order of its table; none turns them off.
    fn signal_by(&self, events: &[&EventFd]) -> io::Result<()>;

    /// Maps a part of its file.
    fn map(&self, offset: u64, bytes: u64) -> io::Result<Mapping>;
}

/// A part of a device in this process's memory, until it is dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: the mapping is the process's; nothing of it belongs to a thread.
#[expect(unsafe_code, reason = "a pointer is no thread's own")]
unsafe impl Send for Mapping {}

impl Mapping {
    /// Its address in this process, and its bytes.
    pub(crate) fn place(&self) -> (u64, u64) {
        (self.start.addr() as u64, self.bytes as u64)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by [`Device::map`] and nobody else unmaps it. KVM was told before that it is gone.
        #[expect(unsafe_code, reason = "munmap")]
        let _ = unsafe { rustix::mm::munmap(self.start, self.bytes) };
    }
}

/// See [`Kernel`].
#[derive(Debug)]
pub(crate) struct Device(File);

impl Device {
    /// A device that was given to this process.
    ///
    /// # Errors
    /// Where it is no PCI device.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let device = Self(fd.into());
        let mut info = vfio_device_info { argsz: size_of::<vfio_device_info>() as u32, ..Default::default() };
        // SAFETY: the request writes as many bytes as `argsz` says to the structure, which lives during the call.
        #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
        let asked = unsafe { libc::ioctl(device.0.as_raw_fd(), DEVICE_GET_INFO, &raw mut info) };
        succeeded(asked)?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no PCI device"));
        }
        if info.flags & VFIO_DEVICE_FLAGS_RESET != 0 {
            // Whatever had it before has left nothing in it.
            // SAFETY: the request takes no argument.
            #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
            let reset = unsafe { libc::ioctl(device.0.as_raw_fd(), DEVICE_RESET) };
            succeeded(reset)?;
        }
        Ok(device)
    }
}

#[cfg(test)]
impl Device {
    /// Memory of nobody's in the place of a device's.
    pub(super) fn anonymous(bytes: u64) -> io::Result<Mapping> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        // SAFETY: a new mapping at a place that the kernel chooses.
        #[expect(unsafe_code, reason = "mappings are unsafe by declaration")]
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), MapFlags::PRIVATE) }?;
        Ok(Mapping { start, bytes })
    }
}

fn succeeded(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Kernel for Device {
    fn region(&self, index: u32) -> io::Result<Region> {
        let argsz = size_of::<vfio_region_info>() as u32;
        let mut info = vfio_region_info { argsz, index, ..Default::default() };
        // SAFETY: the request writes as many bytes as `argsz` says to the structure, which lives during the call.
        #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
        let asked = unsafe { libc::ioctl(self.0.as_raw_fd(), DEVICE_GET_REGION_INFO, &raw mut info) };
        succeeded(asked)?;
        let has = |flags: u32| info.flags & flags == flags;
        Ok(Region {
            bytes: info.size,
            offset: info.offset,
            is_accessible: has(VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE),
            is_mappable: has(VFIO_REGION_INFO_FLAG_MMAP),
        })
    }

    fn read(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(data, offset)
    }

    fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn signal_by(&self, events: &[&EventFd]) -> io::Result<()> {
        let bytes = size_of::<vfio_irq_set>() + events.len() * size_of::<i32>();
        let data = if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
        let count = u32::try_from(events.len()).map_err(io::Error::other)?;
        let header = [
            u32::try_from(bytes).map_err(io::Error::other)?,
            data | VFIO_IRQ_SET_ACTION_TRIGGER,
            VFIO_PCI_MSIX_IRQ_INDEX,
            0,
            count,
        ];
        // The structure, and behind it the descriptors: all of 32 bits.
        let mut words: Vec<i32> = header.into_iter().map(u32::cast_signed).collect();
        words.extend(events.iter().map(|event| event.as_raw_fd()));
        // SAFETY: the request reads as many bytes as the first word says, which are those of the vector; it lives during the call.
        #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
        let set = unsafe { libc::ioctl(self.0.as_raw_fd(), DEVICE_SET_IRQS, words.as_ptr()) };
        succeeded(set)
    }

    fn map(&self, offset: u64, bytes: u64) -> io::Result<Mapping> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses; nothing is there that it could replace.
        #[expect(unsafe_code, reason = "mappings are unsafe by declaration")]
        let start =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, &self.0, offset) }?;
        Ok(Mapping { start, bytes })
    }
}

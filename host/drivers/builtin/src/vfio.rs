//! PCI devices of the host's, taken by the driver and handed to the monitor, which opens no file (Linux:
//! Documentation/driver-api/vfio.rst and iommufd.rst; include/uapi/linux/vfio.h, iommufd.h).
//!
//! A device by its group is asked for through the group's file, which one process opens once; all groups of a machine share a container. A
//! device by itself has a file of its own, and all of a machine share an address space of IOMMUFD.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use coracle_machine::{Device, Error, PciAddress, Result};
use coracle_monitor_api as api;

use crate::describe::Descriptors;

/// Requests.
const SET_IOMMU: libc::Ioctl = 0x3b66;
const GROUP_GET_STATUS: libc::Ioctl = 0x3b67;
const GROUP_SET_CONTAINER: libc::Ioctl = 0x3b68;
const GROUP_GET_DEVICE_FD: libc::Ioctl = 0x3b6a;
const DEVICE_BIND_IOMMUFD: libc::Ioctl = 0x3b76;
const DEVICE_ATTACH_IOMMUFD_PT: libc::Ioctl = 0x3b77;
const IOAS_ALLOC: libc::Ioctl = 0x3b81;

/// `VFIO_TYPE1v2_IOMMU`.
const TYPE1: libc::c_ulong = 3;
/// `VFIO_GROUP_FLAGS_VIABLE`.
const VIABLE: u32 = 1;

/// What a machine has of the host's devices.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// There while a group is open: without one it forgets what was mapped.
    container: Option<OwnedFd>,
    /// Descriptor, and the number of the address space; there while a device has it.
    iommufd: Option<(OwnedFd, u32)>,
    /// The groups that are open, each with the devices that were taken by it.
    groups: BTreeMap<u32, (File, Vec<PciAddress>)>,
    /// Devices that were taken by themselves.
    devices: Vec<PciAddress>,
}

fn failed(address: PciAddress, what: &str) -> impl Fn(std::io::Error) -> Error {
    let step = format!("take the PCI device {address}: {what}");
    move |error| Error::Missing(format!("{step}: {error}"))
}

fn open(path: &Path) -> std::io::Result<File> {
    let told = |error: std::io::Error| std::io::Error::new(error.kind(), format!("open {}: {error}", path.display()));
    File::options().read(true).write(true).open(path).map_err(told)
}

/// A request whose argument is a pointer to `argument`, or a number.
fn ask(file: &impl AsRawFd, request: libc::Ioctl, argument: libc::c_ulong) -> std::io::Result<i32> {
    // SAFETY: each caller below gives what the request takes: a number, or the address of a structure of its own, which lives during the
    // call and has as many bytes as it says.
    #[expect(unsafe_code, reason = "ioctls without a safe wrapper")]
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

fn address_of<T>(structure: &mut T) -> libc::c_ulong {
    (&raw mut *structure).addr() as libc::c_ulong
}

fn sysfs(address: PciAddress) -> PathBuf {
    Path::new("/sys/bus/pci/devices").join(address.to_string())
}

impl Passed {
    /// Takes a device, and describes it for the monitor.
    ///
    /// # Errors
    /// [`Error::Missing`] where the host does not hand it over.
    pub(crate) fn take(&mut self, address: PciAddress, by_iommufd: bool, fds: &mut Descriptors) -> Result<api::Device> {
        let taken = if by_iommufd { self.take_by_itself(address, fds) } else { self.take_by_group(address, fds) };
        let (device, iommu) = taken.inspect_err(|_| self.let_go())?;
        Ok(api::Device::Vfio { device_fd: fds.add(device), by_iommufd, iommu })
    }

    /// The monitor has let go of a device, or has not taken it. Nothing is done for one that is not the host's.
    pub(crate) fn give_back(&mut self, device: &Device) {
        let Device::Vfio { address, .. } = device else { return };
        for (_, devices) in self.groups.values_mut() {
            devices.retain(|other| other != address);
        }
        self.devices.retain(|other| other != address);
        self.let_go();
    }

    /// Closes what no device needs: the next one gets another, of which the monitor is told.
    fn let_go(&mut self) {
        self.groups.retain(|_, (_, devices)| !devices.is_empty());
        if self.groups.is_empty() {
            self.container = None;
        }
        if self.devices.is_empty() {
            self.iommufd = None;
        }
    }

    fn take_by_group(&mut self, address: PciAddress, fds: &mut Descriptors) -> Result<(OwnedFd, Option<api::Iommu>)> {
        let group =
            std::fs::read_link(sysfs(address).join("iommu_group")).map_err(failed(address, "its IOMMU group"))?;
        let number = group.file_name().and_then(|name| name.to_str()?.parse().ok());
        let number: u32 = number.ok_or_else(|| Error::Invalid(format!("{address} is in no IOMMU group")))?;
        let is_first = self.container.is_none();
        if !self.groups.contains_key(&number) {
            let file = self.open_group(address, number)?;
            self.groups.insert(number, (file, Vec::new()));
        }
        let Some((file, devices)) = self.groups.get_mut(&number) else {
            return Err(Error::Invalid(format!("the IOMMU group {number} is not open")));
        };
        let name = CString::new(address.to_string()).map_err(|error| Error::Invalid(error.to_string()))?;
        let device = ask(file, GROUP_GET_DEVICE_FD, name.as_ptr().addr() as libc::c_ulong);
        let device = device.map_err(failed(address, "its file"))?;
        // SAFETY: the kernel has made this descriptor for us just now.
        #[expect(unsafe_code, reason = "a descriptor that a request gives has no safe constructor")]
        let device = unsafe { OwnedFd::from_raw_fd(device) };
        devices.push(address);
        let Some(container) = self.container.as_ref().filter(|_| is_first) else { return Ok((device, None)) };
        let container = container.try_clone().map_err(failed(address, "its container"))?;
        Ok((device, Some(api::Iommu::Container { fd: fds.add(container) })))
    }

    /// Opens a group, in the machine's container.
    fn open_group(&mut self, address: PciAddress, number: u32) -> Result<File> {
        let file = open(&Path::new("/dev/vfio").join(number.to_string())).map_err(failed(address, "its group"))?;
        let mut status = [8_u32, 0];
        ask(&file, GROUP_GET_STATUS, address_of(&mut status)).map_err(failed(address, "its group's state"))?;
        let [_, flags] = status;
        if flags & VIABLE == 0 {
            return Err(Error::Missing(format!(
                "take the PCI device {address}: another device of its IOMMU group {number} is on a driver of the host's"
            )));
        }
        let is_new = self.container.is_none();
        let container = match self.container.take() {
            Some(container) => container,
            None => open(Path::new("/dev/vfio/vfio")).map_err(failed(address, "a container"))?.into(),
        };
        let container = self.container.insert(container);
        let mut fd = container.as_raw_fd();
        ask(&file, GROUP_SET_CONTAINER, address_of(&mut fd)).map_err(failed(address, "its container"))?;
        if is_new {
            ask(container, SET_IOMMU, TYPE1).map_err(failed(address, "its IOMMU"))?;
        }
        Ok(file)
    }

    fn take_by_itself(&mut self, address: PciAddress, fds: &mut Descriptors) -> Result<(OwnedFd, Option<api::Iommu>)> {
        let folder = sysfs(address).join("vfio-dev");
        let mut entries = std::fs::read_dir(&folder).map_err(failed(address, "its own file (IOMMUFD)"))?.flatten();
        let name = entries.next().map(|entry| entry.file_name());
        let name = name.ok_or_else(|| Error::Missing(format!("the PCI device {address} has no file of its own")))?;
        let device = open(&Path::new("/dev/vfio/devices").join(name)).map_err(failed(address, "its own file"))?;
        let is_first = self.iommufd.is_none();
        let made = match self.iommufd.take() {
            Some(made) => made,
            None => {
                let file = open(Path::new("/dev/iommu")).map_err(failed(address, "IOMMUFD"))?;
                // `struct iommu_ioas_alloc`: size, flags, the number that is given.
                let mut request = [12_u32, 0, 0];
                ask(&file, IOAS_ALLOC, address_of(&mut request)).map_err(failed(address, "an address space"))?;
                let [_, _, ioas] = request;
                (file.into(), ioas)
            }
        };
        let (iommufd, ioas) = self.iommufd.insert(made);
        // `struct vfio_device_bind_iommufd`: argsz, flags, iommufd, the number that is given.
        let mut bind = [16_u32, 0, iommufd.as_raw_fd().cast_unsigned(), 0];
        ask(&device, DEVICE_BIND_IOMMUFD, address_of(&mut bind)).map_err(failed(address, "IOMMUFD"))?;
        // `struct vfio_device_attach_iommufd_pt`: argsz, flags, the number of the address space.
        let mut attach = [12_u32, 0, *ioas];
        ask(&device, DEVICE_ATTACH_IOMMUFD_PT, address_of(&mut attach))
            .map_err(failed(address, "its address space"))?;
        self.devices.push(address);
        if !is_first {
            return Ok((device.into(), None));
        }
        let fd = iommufd.try_clone().map_err(failed(address, "IOMMUFD"))?;
        Ok((device.into(), Some(api::Iommu::Iommufd { fd: fds.add(fd), ioas: *ioas })))
    }
}

/// Lets the monitor keep so much of its memory where it is: what devices reach does not move.
///
/// # Errors
/// [`Error::Missing`] where this process may not allow it.
pub(crate) fn allow_to_keep(monitor: i32, bytes: u64) -> Result<()> {
    coracle_process::lock_memory(monitor, bytes).map_err(|error| {
        Error::Missing(format!("let the monitor keep the guest's memory in place (RLIMIT_MEMLOCK): {error}"))
    })
}

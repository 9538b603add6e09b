//! What QEMU is handed open. It runs as nobody of the host's (see [`coracle_process::Confinement`]) and opens no file of a pod by itself: the
//! kernel and the initrd, disks, and its ends of the sockets of device servers are descriptors from its start, or come by its control channel.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use coracle_machine::{Device, Error, MachineSpec, Result};
use coracle_process::for_everybody;
use serde_json::json;

use crate::command::VsockKind;
use crate::{qmp, vfio};

/// The number of each descriptor in QEMU.
#[derive(Debug, Clone, Default)]
pub(crate) struct Handed {
    pub(crate) kernel: RawFd,
    pub(crate) initrd: RawFd,
    /// Its end of the vsock server's socket.
    pub(crate) vsock: Option<RawFd>,
    /// What the kernel's IOMMUFD is asked by.
    pub(crate) iommufd: Option<RawFd>,
    /// Of each device that has one: a disk's file, or the end of a file server's socket.
    devices: Vec<Option<RawFd>>,
}

impl Handed {
    /// Of a machine; the first number that is free is `first`.
    pub(crate) fn of(spec: &MachineSpec, vsock: VsockKind, first: RawFd) -> Self {
        let mut numbers = first..;
        let mut next = || numbers.next().unwrap_or(RawFd::MAX);
        let has_one = |device: &Device| matches!(device, Device::Block { .. } | Device::SharedFs { .. });
        let has_server =
            vsock == VsockKind::Server && spec.devices.iter().any(|device| matches!(device, Device::Vsock));
        Self {
            kernel: next(),
            initrd: next(),
            vsock: has_server.then(&mut next),
            iommufd: vfio::wants_iommufd(spec).then(&mut next),
            devices: spec.devices.iter().map(|device| has_one(device).then(&mut next)).collect(),
        }
    }

    /// That of the device at this place of the specification.
    pub(crate) fn device(&self, index: usize) -> RawFd {
        self.devices.get(index).copied().flatten().unwrap_or(-1)
    }

    /// The sets of disks' descriptors.
    pub(crate) fn sets<'a>(&'a self, spec: &'a MachineSpec) -> impl Iterator<Item = i64> + 'a {
        let disks = self.devices.iter().zip(&spec.devices).filter(|(_, device)| matches!(device, Device::Block { .. }));
        disks.filter_map(|(number, _)| number.map(i64::from))
    }

    /// Opens all of them. The device servers listen already.
    ///
    /// # Errors
    /// [`Error::Missing`] where something is not there or can't be opened.
    pub(crate) fn open(&self, spec: &MachineSpec) -> Result<Vec<(RawFd, OwnedFd)>> {
        let read = |what: &str, path: &Path| {
            let opened = File::open(path).and_then(for_everybody);
            opened.map(OwnedFd::from).map_err(missing(what, path))
        };
        let mut all = vec![
            (self.kernel, read("the guest's kernel", &spec.kernel.path)?),
            (self.initrd, read("the guest's initrd", &spec.initrd)?),
        ];
        if let Some(number) = self.vsock {
            all.push((number, connect(&spec.folder.join(crate::vsock::MONITOR_SOCKET))?));
        }
        if let Some(number) = self.iommufd {
            all.push((number, vfio::open_iommufd()?));
        }
        for (number, device) in self.devices.iter().zip(&spec.devices) {
            match (number, device) {
                (Some(number), Device::Block { path, read_only, direct, .. }) => {
                    all.push((*number, disk(path, *read_only, *direct)?));
                }
                (Some(number), Device::SharedFs { socket, .. }) => all.push((*number, connect(socket)?)),
                _ => {}
            }
        }
        Ok(all)
    }
}

/// Has QEMU let go of a set's own descriptor: the disk that was made of it has another, which is then the only one.
///
/// # Errors
/// Where QEMU refuses.
pub(crate) async fn let_go(control: &qmp::Client, set: i64) -> Result<()> {
    control.execute("remove-fd", json!({ "fdset-id": set })).await?;
    Ok(())
}

/// Opens a disk's file, as QEMU would.
///
/// # Errors
/// [`Error::Missing`] where that can't be.
pub(crate) fn disk(path: &Path, read_only: bool, direct: bool) -> Result<OwnedFd> {
    let mut options = File::options();
    options.read(true).write(!read_only).custom_flags(if direct { libc::O_DIRECT } else { 0 });
    options.open(path).map(OwnedFd::from).map_err(missing("the disk", path))
}

/// QEMU's driver for what is at `path`.
pub(crate) fn driver(path: &Path) -> &'static str {
    let is_device = std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    if is_device { "host_device" } else { "file" }
}

fn connect(socket: &Path) -> Result<OwnedFd> {
    UnixStream::connect(socket).map(OwnedFd::from).map_err(missing("the socket", socket))
}

fn missing(what: &str, path: &Path) -> impl Fn(std::io::Error) -> Error {
    let step = format!("{what} {} can't be opened", path.display());
    move |error| Error::Missing(format!("{step}: {error}"))
}

//! What QEMU is handed open. It runs as nobody of the host's (see [`coracle_process::Confinement`]) and opens no file of a pod by itself: the
//! kernel and the initrd, disks, and its ends of the sockets of device servers are descriptors from its start, or come by its control channel.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use coracle_machine::{Device, Error, MachineSpec, Result};
use coracle_process::for_everybody;
use rustix::fs::OFlags;
use serde_json::json;

use crate::command::VsockKind;
use crate::{qmp, vfio};

/// What mends a guest image that can't be read.
const IMAGE_MEND: &str = "run `coracle image build` or set `guest.folder`";

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
    /// The disks that are block devices, by their numbers.
    block_devices: Vec<RawFd>,
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
            block_devices: Vec::new(),
        }
    }

    /// That of the device at this place of the specification.
    pub(crate) fn device(&self, index: usize) -> RawFd {
        self.devices.get(index).copied().flatten().unwrap_or(-1)
    }

    /// QEMU's driver for the disk at this place of the specification.
    pub(crate) fn driver(&self, index: usize) -> &'static str {
        driver(self.block_devices.contains(&self.device(index)))
    }

    /// The sets of disks' descriptors.
    pub(crate) fn sets<'a>(&'a self, spec: &'a MachineSpec) -> impl Iterator<Item = i64> + 'a {
        let disks = self.devices.iter().zip(&spec.devices).filter(|(_, device)| matches!(device, Device::Block { .. }));
        disks.filter_map(|(number, _)| number.map(i64::from))
    }

    /// Opens all of them, each once: what is found by a path is what QEMU gets. The device servers listen already.
    ///
    /// # Errors
    /// [`Error::Missing`] where something is not there or can't be opened.
    pub(crate) async fn open(&mut self, spec: &MachineSpec, is_confined: bool) -> Result<Vec<(RawFd, OwnedFd)>> {
        let mut all = vec![
            (self.kernel, image("the guest's kernel", spec.kernel.path.clone(), is_confined).await?),
            (self.initrd, image("the guest's initrd", spec.initrd.clone(), is_confined).await?),
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
                    let (file, is_device) = disk(path.clone(), *read_only, *direct).await?;
                    all.push((*number, file));
                    self.block_devices.extend(is_device.then_some(*number));
                }
                (Some(number), Device::SharedFs { socket, .. }) => all.push((*number, connect(socket)?)),
                _ => {}
            }
        }
        Ok(all)
    }
}

/// Work that may wait for a disk or a server of the host's, which must not hold up others.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(Error::Monitor(error.to_string())))
}

/// A part of the guest image.
async fn image(what: &'static str, path: PathBuf, is_confined: bool) -> Result<OwnedFd> {
    aside(move || {
        let mend = |error| Error::Missing(format!("{what} {} can't be read ({error}): {IMAGE_MEND}", path.display()));
        let file = File::open(&path).map_err(mend)?;
        let file = if is_confined { for_everybody(file).map_err(mend)? } else { file };
        Ok(file.into())
    })
    .await
}

/// Has QEMU let go of a set's own descriptor: the disk that was made of it has another, which is then the only one.
///
/// # Errors
/// Where QEMU refuses.
pub(crate) async fn let_go(control: &qmp::Client, set: i64) -> Result<()> {
    control.execute("remove-fd", json!({ "fdset-id": set })).await?;
    Ok(())
}

/// Opens a disk's file, as QEMU would; and whether it is a block device.
///
/// # Errors
/// [`Error::Missing`] where that can't be.
pub(crate) async fn disk(path: PathBuf, read_only: bool, direct: bool) -> Result<(OwnedFd, bool)> {
    aside(move || {
        let missing = |error| Error::Missing(format!("the disk {} can't be opened: {error}", path.display()));
        let mut options = File::options();
        // One that would be waited for is none.
        let flags = libc::O_NONBLOCK | if direct { libc::O_DIRECT } else { 0 };
        let file = options.read(true).write(!read_only).custom_flags(flags).open(&path).map_err(missing)?;
        let kind = file.metadata().map_err(missing)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(missing(std::io::Error::other("it is neither a file nor a block device")));
        }
        let waits = |flags: OFlags| rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK);
        rustix::fs::fcntl_getfl(&file).and_then(waits).map_err(|error| missing(error.into()))?;
        Ok((file.into(), kind.is_block_device()))
    })
    .await
}

/// QEMU's driver for a disk.
pub(crate) fn driver(is_block_device: bool) -> &'static str {
    if is_block_device { "host_device" } else { "file" }
}

fn connect(socket: &Path) -> Result<OwnedFd> {
    let missing = |error| Error::Missing(format!("the socket {} can't be opened: {error}", socket.display()));
    UnixStream::connect(socket).map(OwnedFd::from).map_err(missing)
}

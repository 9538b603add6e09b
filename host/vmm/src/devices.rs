//! From the driver's description to devices.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use coracle_monitor_api as api;
use coracle_virtio::balloon::Balloon;
use coracle_virtio::block::{Block, BlockConfig};
use coracle_virtio::console::Console;
use coracle_virtio::device::{Broken, Device};
use coracle_virtio::fs::Fs;
use coracle_virtio::net::{Net, Vhost, VhostNet};
use coracle_virtio::pmem::Pmem;
use coracle_virtio::rng::Rng;
use coracle_virtio::vsock::Vsock;
use coracle_virtio::vsock::muxer::Muxer;

use crate::Error;
use crate::machine::Maker;

/// The descriptors that a description names; each is taken once.
pub(crate) enum Descriptors {
    /// Inherited ones, by their number in this process; those that were taken.
    Inherited(Vec<i32>),
    /// Those that came with a message, by their place in it.
    Received(Vec<Option<OwnedFd>>),
}

impl Descriptors {
    pub(crate) fn inherited() -> Self {
        Self::Inherited(Vec::new())
    }

    /// Takes the descriptor of this number.
    pub(crate) fn take(&mut self, number: i32) -> Result<OwnedFd, Error> {
        let taken = match self {
            Self::Received(all) => {
                let place = usize::try_from(number).ok().and_then(|index| all.get_mut(index));
                return place.and_then(Option::take).ok_or_else(|| not_there(number));
            }
            Self::Inherited(taken) => taken,
        };
        if number <= api::CONTROL_FD || taken.contains(&number) {
            return Err(not_there(number));
        }
        // SAFETY: asking for flags takes no pointer; a number that is not open is answered EBADF.
        #[expect(unsafe_code, reason = "fcntl on a number")]
        let open = unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0;
        if !open {
            return Err(not_there(number));
        }
        taken.push(number);
        // SAFETY: it is open, above the numbers that this process uses itself, and handed out here once.
        #[expect(unsafe_code, reason = "an inherited descriptor has no safe constructor")]
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        Ok(fd)
    }
}

fn not_there(number: i32) -> Error {
    Error::Invalid(format!("the descriptor {number} is not open, is named twice, or is not the machine's"))
}

/// A device, and whether it may wait for a disk: then it gets a loop of its own.
pub(crate) struct Made {
    pub(crate) device: Box<dyn Device>,
    pub(crate) waits: bool,
}

/// Makes a virtio device.
pub(crate) fn make(device: &api::Device, descriptors: &mut Descriptors, maker: &Maker) -> Result<Made, Error> {
    let quick = |device: Box<dyn Device>| Made { device, waits: false };
    Ok(match device {
        api::Device::Rng => quick(Box::new(Rng::new())),
        api::Device::Balloon => quick(Box::new(Balloon::new(maker.reach.held()))),
        api::Device::Console { output_fd } => {
            let console = Console::new(descriptors.take(*output_fd)?).map_err(failed("console"))?;
            quick(Box::new(console))
        }
        api::Device::Vsock { cid, programs_fd, path } => {
            let programs = descriptors.take(*programs_fd)?.into();
            let muxer = Muxer::with_listener(*cid, Path::new(path), programs).map_err(failed("vsock"))?;
            quick(Box::new(Vsock::new(muxer)))
        }
        api::Device::Fs { tag, server_fd, queue_size } => {
            if !maker.is_shared {
                return Err(Error::Invalid("a shared file system needs memory that its server may map".into()));
            }
            let server = descriptors.take(*server_fd)?.into();
            let fs = Fs::new(tag, server, *queue_size).map_err(|source| Error::Device { device: "fs", source })?;
            quick(Box::new(fs))
        }
        api::Device::Net { mac, tap_fds, vhost_fds } => {
            let mut take = |numbers: &[i32]| numbers.iter().map(|number| descriptors.take(*number)).collect();
            let (taps, vhosts): (Result<Vec<_>, _>, Result<Vec<_>, _>) = (take(tap_fds), take(vhost_fds));
            quick(net(taps?, vhosts?, *mac).map_err(failed("net"))?)
        }
        api::Device::Pmem { file_fd } => {
            let later = || Error::Invalid("a file is memory from the machine's start".into());
            let (start, bytes) = maker.files.place(*file_fd).ok_or_else(later)?;
            quick(Box::new(Pmem::new(start, bytes)))
        }
        api::Device::Vfio { .. } => return Err(Error::Invalid("a device of the host's is no virtio device".into())),
        api::Device::Block { file_fd, read_only, direct, serial, queues } => {
            let config = BlockConfig {
                file: descriptors.take(*file_fd)?,
                read_only: *read_only,
                direct: *direct,
                serial: serial.clone(),
                queues: *queues,
            };
            Made { device: Box::new(Block::new(config).map_err(failed("block"))?), waits: true }
        }
    })
}

/// A network device: served by the kernel where it was opened for each of its pairs of queues, by this process where it was not.
fn net(taps: Vec<OwnedFd>, vhosts: Vec<OwnedFd>, mac: [u8; 6]) -> io::Result<Box<dyn Device>> {
    if !taps.is_empty() && taps.len() == vhosts.len() {
        match vhosts.into_iter().map(Vhost::new).collect::<io::Result<Vec<_>>>() {
            Ok(vhosts) => return Ok(Box::new(VhostNet::new(vhosts.into_iter().zip(taps).collect(), mac)?)),
            Err(error) => log::warn!("net: the kernel does not serve it: {error}"),
        }
    }
    Ok(Box::new(Net::new(taps, mac)?))
}

fn failed<E: std::fmt::Display>(device: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Device { device, source: Broken(error.to_string()) }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    /// Descriptors which the kernel serves no network by.
    fn sockets(count: usize) -> Vec<OwnedFd> {
        let socket = |_| socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::empty(), None).unwrap().0;
        (0..count).map(socket).collect()
    }

    #[test]
    fn a_network_device_does_without_the_kernel() {
        for (taps, vhosts) in [(1, 0), (1, 1), (1, 2), (2, 1), (2, 2)] {
            let device = net(sockets(taps), sockets(vhosts), [2, 0, 0, 0, 0, 1]).unwrap();
            assert!(!device.served_elsewhere(0), "{taps} taps, {vhosts} for the kernel");
        }
        assert!(net(sockets(0), sockets(0), [0; 6]).is_err());
        assert!(net(sockets(0), sockets(1), [0; 6]).is_err());
    }
}

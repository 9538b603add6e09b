//! The file system device (virtio 1.3, section 5.11), served by another process over vhost-user: the monitor tells that
//! process where the queues are, and has no part in what passes through them.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::device::{Activation, Broken, Device, Source, Turn, VERSION_1};
use crate::vhost_user::PROTOCOL_FEATURES;
use crate::vsock::muxer::hung_up;

/// Bytes of the tag in the configuration space; what is left of it is zero.
const TAG_BYTES: usize = 36;
/// Queues: high priority, and one for requests.
const QUEUES: usize = 2;
/// How long the server may take to answer while the guest's driver waits.
const PATIENCE: Duration = Duration::from_secs(5);

/// See the module.
pub struct Fs {
    config: [u8; TAG_BYTES + 4],
    sizes: [u16; QUEUES],
    server: Frontend,
    /// Another descriptor of the same connection, to see its end.
    watched: UnixStream,
    features: u64,
    running: usize,
}

impl Fs {
    /// A device of the name `tag` (at most 36 bytes), whose server is connected and gets queues of `queue_size` entries.
    ///
    /// # Errors
    /// [`Broken`] where the server does not answer as it should, or the tag is too long.
    pub fn new(tag: &str, server: UnixStream, queue_size: u16) -> Result<Self, Broken> {
        let mut config = [0; TAG_BYTES + 4];
        match config.get_mut(..tag.len()) {
            Some(place) if !tag.is_empty() && tag.len() <= TAG_BYTES => place.copy_from_slice(tag.as_bytes()),
            _ => return Err(Broken(format!("the tag {tag:?} has not 1 to {TAG_BYTES} bytes"))),
        }
        if let Some(place) = config.last_chunk_mut::<4>() {
            *place = 1_u32.to_le_bytes();
        }
        let failed = |error: std::io::Error| Broken(format!("the file server's connection: {error}"));
        server.set_nonblocking(false).map_err(failed)?;
        server.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        server.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let watched = server.try_clone().map_err(failed)?;
        let mut server = Frontend::from_stream(server, QUEUES as u64);
        server.set_owner().map_err(refused("greet"))?;
        let features = server.get_features().map_err(refused("ask for features"))?;
        if features & PROTOCOL_FEATURES != 0 {
            // With version 1: a server may refuse a legacy driver at once.
            server
                .set_features(features & (PROTOCOL_FEATURES | VERSION_1))
                .map_err(refused("agree on the protocol"))?;
            let offered = server.get_protocol_features().map_err(refused("ask for the protocol's features"))?;
            let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
            server.set_protocol_features(offered & wanted).map_err(refused("agree on the protocol's features"))?;
        }
        Ok(Self { config, sizes: [queue_size; QUEUES], server, watched, features, running: 0 })
    }

    fn start(&mut self, activation: &Activation) -> Result<(), Broken> {
        let memory = activation.memory.memory().into_inner();
        let regions: Result<Vec<_>, _> = memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect();
        let regions = regions.map_err(refused("describe the memory"))?;
        let features = activation.features & self.features | self.features & PROTOCOL_FEATURES;
        self.server.set_features(features).map_err(refused("agree on features"))?;
        self.server.set_mem_table(&regions).map_err(refused("share the memory"))?;
        for (index, ring) in activation.rings.iter().enumerate() {
            let Some(ring) = ring else { continue };
            let state = ring.registers();
            let place = |address: u64| {
                let host = memory.get_host_address(GuestAddress(address));
                host.map(|pointer| pointer as u64).map_err(|error| Broken(format!("a queue's address: {error}")))
            };
            let data = VringConfigData {
                queue_max_size: state.max_size,
                queue_size: state.size,
                flags: 0,
                desc_table_addr: place(state.desc_table)?,
                used_ring_addr: place(state.used_ring)?,
                avail_ring_addr: place(state.avail_ring)?,
                log_addr: None,
            };
            let Some(interrupt) = ring.interrupt() else {
                return Err(Broken(format!("queue {index} has no interrupt")));
            };
            self.server.set_vring_num(index, state.size).map_err(refused("size a queue"))?;
            self.server.set_vring_addr(index, &data).map_err(refused("place a queue"))?;
            self.server.set_vring_base(index, 0).map_err(refused("begin a queue"))?;
            self.server.set_vring_call(index, interrupt).map_err(refused("give an interrupt"))?;
            self.server.set_vring_kick(index, ring.doorbell()).map_err(refused("give a doorbell"))?;
            if self.features & PROTOCOL_FEATURES != 0 {
                self.server.set_vring_enable(index, true).map_err(refused("enable a queue"))?;
            }
            self.running = index + 1;
        }
        Ok(())
    }
}

fn refused<E: std::fmt::Display>(step: &'static str) -> impl FnOnce(E) -> Broken {
    move |error| Broken(format!("the file server: {step}: {error}"))
}

impl Device for Fs {
    fn name(&self) -> &'static str {
        "fs"
    }

    fn id(&self) -> u16 {
        26
    }

    fn features(&self) -> u64 {
        // What the server has of the rings' features is agreed on with it; the device has none of its own that we know.
        0
    }

    fn ring_features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.start(&activation)
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { token: 0, fd: self.watched.as_fd(), edge: true }]
    }

    fn served_elsewhere(&self, _: u16) -> bool {
        true
    }

    fn on_queue(&mut self, _: u16) -> Result<Turn, Broken> {
        Ok(Turn::Done)
    }

    fn on_source(&mut self, _: u16) -> Result<Turn, Broken> {
        // The server speaks only when it is asked. What comes by itself is its end.
        if hung_up(self.watched.as_fd()) {
            return Err(Broken::new("the file server has ended"));
        }
        Ok(Turn::Done)
    }

    /// The file server knows what the guest has open.
    fn save(&self) -> Option<Vec<u8>> {
        None
    }

    fn reset(&mut self) {
        for index in 0..std::mem::take(&mut self.running) {
            // The answer is the queue's position, and that the server has stopped. One that is gone has stopped, too.
            if let Err(error) = self.server.get_vring_base(index) {
                log::debug!("fs: stop queue {index}: {error}");
            }
        }
    }
}

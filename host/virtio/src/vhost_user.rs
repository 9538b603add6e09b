//! The socket device as a vhost-user backend: a process of its own, for monitors that have no such device and kernels
//! without vhost-vsock.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

use vhost::vhost_user::{Listener, VhostUserProtocolFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use crate::device::{EVENT_IDX, INDIRECT_DESC, VERSION_1};
use crate::vsock::device::Device;
use crate::vsock::muxer::Muxer;

/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_ACCESS_PLATFORM` (virtio 1.3, 6): without an IOMMU that the guest sees, what it lends is where it says.
const ACCESS_PLATFORM: u64 = 1 << 33;

const RX: u16 = 0;
const TX: u16 = 1;
const QUEUES: usize = 2;
const QUEUE_SIZE: usize = 1024;
/// The event number of the muxer's epoll; the library keeps the first ones for itself.
const MUXER: u16 = 16;

struct Backend {
    device: Device,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    event_idx: bool,
    /// By which the library ends the thread that serves the rings, once the monitor has hung up: without one it would serve them for ever.
    exit: (EventConsumer, EventNotifier),
    /// The descriptor of it that the library was given, and forgets.
    given: Arc<AtomicI32>,
}

impl Backend {
    fn pump(&mut self, vrings: &[VringRwLock]) -> io::Result<()> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let memory = memory.memory();
        let [rx, tx, ..] = vrings else { return Ok(()) };
        self.device.muxer().handle_events();
        loop {
            // Whether the other side has added something between our last look and its being told to knock.
            let mut again = false;
            {
                let mut vring = tx.get_mut();
                if vring.get_queue().ready() {
                    if self.event_idx {
                        vring.disable_notification().map_err(io::Error::other)?;
                    }
                    let signal = self.device.process_tx(vring.get_queue_mut(), &memory).map_err(io::Error::other)?;
                    if signal {
                        vring.signal_used_queue()?;
                    }
                    again |= self.event_idx
                        && vring.enable_notification().map_err(io::Error::other)?
                        && self.device.muxer().accepts();
                }
            }
            {
                let mut vring = rx.get_mut();
                if vring.get_queue().ready() {
                    let stalled = !self.device.muxer().accepts();
                    let signal = self.device.process_rx(vring.get_queue_mut(), &memory).map_err(io::Error::other)?;
                    if signal {
                        vring.signal_used_queue()?;
                    }
                    again |= stalled && self.device.muxer().accepts();
                    if self.event_idx && self.device.muxer().has_pending() {
                        // Out of buffers: knock when there are new ones.
                        again |= vring.enable_notification().map_err(io::Error::other)?;
                    }
                }
            }
            if !again {
                return Ok(());
            }
        }
    }
}

impl VhostUserBackendMut for Backend {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        VERSION_1 | EVENT_IDX | INDIRECT_DESC | ACCESS_PLATFORM | PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // QEMU gives a device that reaches only what is lent to it to no server without the last two.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.device.guest_cid().to_le_bytes();
        let start = offset as usize;
        config.get(start..start.saturating_add(size as usize)).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = (self.exit.0.try_clone().ok()?, self.exit.1.try_clone().ok()?);
        self.given.store(consumer.as_raw_fd(), Ordering::Relaxed);
        Some((consumer, notifier))
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        match event {
            RX | TX | MUXER => self.pump(vrings),
            other => Err(io::Error::other(format!("unexpected event {other}"))),
        }
    }
}

/// Serves one monitor that connects to `monitor`, until it hangs up. Host programs reach the guest at `path`, where
/// `programs` listens.
///
/// # Errors
/// Where the protocol fails; a monitor that ends is no error.
pub fn serve_vsock(guest_cid: u64, path: &Path, programs: UnixListener, monitor: UnixListener) -> io::Result<()> {
    let muxer = Muxer::with_listener(guest_cid, path, programs)?;
    let epoll = muxer.epoll().as_raw_fd();
    let exit = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
    let given = Arc::new(AtomicI32::new(-1));
    let backend =
        Backend { device: Device::new(muxer), memory: None, event_idx: false, exit, given: Arc::clone(&given) };
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Arc::new(Mutex::new(backend));
    let mut daemon = VhostUserDaemon::new("vsock".to_owned(), Arc::clone(&backend), memory).map_err(failed)?;
    for handler in daemon.get_epoll_handlers() {
        handler.register_listener(epoll, EventSet::IN, u64::from(MUXER))?;
    }
    daemon.start(&mut Listener::from(monitor)).map_err(failed)?;
    let ended = daemon.wait();
    // With it go its threads.
    drop(daemon);
    let forgotten = given.load(Ordering::Relaxed);
    if forgotten >= 0 {
        // SAFETY: the descriptor was the clone's alone, which the library turned into a number and gave to its epoll instance; that is gone.
        #[expect(unsafe_code, reason = "the library forgets a descriptor")]
        drop(unsafe { OwnedFd::from_raw_fd(forgotten) });
    }
    match ended {
        Err(vhost_user_backend::Error::HandleRequest(vhost::vhost_user::Error::Disconnected)) => Ok(()),
        ended => ended.map_err(failed),
    }
}

/// The library's error has a text, and is no `Error`.
#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn failed(error: vhost_user_backend::Error) -> io::Error {
    io::Error::other(error.to_string())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_server_ends_when_its_monitor_hangs_up() {
        let folder = tempfile::tempdir().unwrap();
        let listen = |name: &str| UnixListener::bind(folder.path().join(name)).unwrap();
        let (programs, monitor) = (listen("programs"), listen("monitor"));
        let (told, ended) = mpsc::channel();
        let path = folder.path().join("programs");
        std::thread::spawn(move || {
            let _ = told.send(serve_vsock(3, &path, programs, monitor));
        });
        drop(UnixStream::connect(folder.path().join("monitor")).unwrap());
        ended.recv_timeout(Duration::from_secs(60)).expect("its end").unwrap();
    }
}

//! The network device whose queues the host's kernel serves (`/dev/vhost-net`, linux/vhost.h): the monitor tells it where
//! they are, and has no part in what passes through them. The control queue, which the kernel does not know, is served here.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::control;
use super::tap::{Tap, ask_kernel};
use super::virtio::{CTRL_VQ, MQ, MRG_RXBUF, OFFERED, Queues, prepare, shape};
use crate::device::{Activation, Broken, Counters, Device, EVENT_IDX, INDIRECT_DESC, Memory, Source, Turn, VERSION_1};
use crate::ring::{Ring, borrowed};

/// Receive and transmit of a pair, by their index.
const QUEUES: usize = 2;

/// What the kernel and this device can both do of the device's features. All but one are a matter between the guest and the
/// tap: only how many buffers a frame is in is the kernel's part.
pub(super) fn offered(kernel: u64) -> u64 {
    OFFERED & (!MRG_RXBUF | kernel)
}

/// What the kernel is told of those that the driver has taken. Never `VHOST_NET_F_VIRTIO_NET_HDR`, by which the kernel would
/// make up headers for a tap that has none.
pub(super) fn agreed(driver: u64, kernel: u64) -> u64 {
    driver & kernel & (VERSION_1 | EVENT_IDX | INDIRECT_DESC | MRG_RXBUF)
}

/// The kernel's side of one pair of queues.
pub struct Vhost {
    fd: OwnedFd,
    features: u64,
    memory: Memory,
    /// Rung by the kernel where the guest's queues make no sense to it.
    errors: EventFd,
    /// The interrupt of a queue that has none.
    nobody: EventFd,
}

impl Vhost {
    /// Over `/dev/vhost-net`, opened for this pair alone. The kernel starts a thread for it, which works on the memory of the
    /// calling process.
    ///
    /// # Errors
    /// Where it is something else, is another's already, or is too old for virtio 1.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK);
        let memory = Memory::new(GuestMemoryMmap::new());
        let mut vhost = Self { fd, features: 0, memory, errors: event()?, nobody: event()? };
        vhost.set_owner().map_err(io::Error::other)?;
        vhost.features = vhost.get_features().map_err(io::Error::other)?;
        if vhost.features & VERSION_1 == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "vhost-net does not know virtio 1"));
        }
        for index in 0..QUEUES {
            vhost.set_vring_err(index, &vhost.errors).map_err(io::Error::other)?;
        }
        Ok(vhost)
    }

    /// Has the queue served, from and to this tap; with none, no more: the kernel is done with it when this returns.
    fn serve(&self, index: usize, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let index = u32::try_from(index).map_err(io::Error::other)?;
        let request = vhost_vring_file { index, fd: tap.map_or(-1, |tap| tap.as_raw_fd()) };
        // SAFETY: the request reads a structure of that type, which lives during the call. The kernel takes a reference of
        // its own to the tap.
        #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
        let result = unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &request) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Tells the kernel where the guest's memory is in this process. What the guest is given later is told at the next
    /// activation only.
    fn share_memory(&mut self, memory: &Memory) -> Result<(), Broken> {
        self.memory = memory.clone();
        let now = self.memory.memory();
        let region = |region: &vm_memory::GuestRegionMmap| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            ..Default::default()
        };
        let regions: Vec<_> = now.iter().map(region).collect();
        self.set_mem_table(&regions).map(drop).map_err(refused("take the memory"))
    }

    fn place(&self, index: usize, ring: &Ring) -> Result<(), Broken> {
        let state = ring.registers();
        let data = VringConfigData {
            queue_max_size: state.max_size,
            queue_size: state.size,
            flags: 0,
            desc_table_addr: state.desc_table,
            used_ring_addr: state.used_ring,
            avail_ring_addr: state.avail_ring,
            log_addr: None,
        };
        self.set_vring_num(index, state.size).map_err(refused("size a queue"))?;
        self.set_vring_addr(index, &data).map_err(refused("place a queue"))?;
        self.set_vring_base(index, 0).map_err(refused("begin a queue"))?;
        self.set_vring_call(index, ring.interrupt().unwrap_or(&self.nobody)).map_err(refused("take an interrupt"))?;
        self.set_vring_kick(index, ring.doorbell()).map_err(refused("take a doorbell"))
    }
}

impl std::fmt::Debug for Vhost {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Vhost").field("fd", &self.fd).finish_non_exhaustive()
    }
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Vhost {
    type AS = Memory;

    fn mem(&self) -> &Memory {
        &self.memory
    }

    /// Whether each part of the ring lies in one mapping. The kernel takes the parts by their addresses in this process, and
    /// does not ask what is behind the guest's memory there.
    fn is_valid(&self, ring: &VringConfigData) -> bool {
        let memory = self.memory.memory();
        let entries = usize::from(ring.queue_size);
        // Virtio 1.3, section 2.7, each with the index at its end.
        let parts = [
            (ring.desc_table_addr, 16 * entries),
            (ring.avail_ring_addr, 6 + 2 * entries),
            (ring.used_ring_addr, 6 + 8 * entries),
        ];
        parts.iter().all(|(address, bytes)| memory.get_slice(GuestAddress(*address), *bytes).is_ok())
    }
}

fn refused<E: std::fmt::Display>(step: &'static str) -> impl FnOnce(E) -> Broken {
    move |error| Broken(format!("vhost-net does not {step}: {error}"))
}

/// A pair of queues: the kernel's side of it, and the tap.
#[derive(Debug)]
struct Pair {
    vhost: Vhost,
    tap: Tap,
    /// Whether the driver has set it up, and whether the kernel may have its queues.
    is_set_up: bool,
    is_served: bool,
    /// The doorbells of both queues, while it is set up.
    doorbells: Vec<EventFd>,
}

/// See the module.
///
/// Its counters are those of its control queue: what passes is counted by nobody but the tap's interface, which the monitor's jail has no
/// way to.
#[derive(Debug)]
pub struct VhostNet {
    pairs: Vec<Pair>,
    /// Where the control queue is, which depends on what the driver has taken.
    control: Option<(u16, Ring)>,
    sizes: Vec<u16>,
    config: [u8; 10],
    counters: Counters,
}

impl VhostNet {
    /// A device over taps with `IFF_VNET_HDR`, which are made nonblocking, each with the kernel's side of its pair of queues; with
    /// `IFF_MULTI_QUEUE`, of one link, where there are several. The guest gets `mac` as its address.
    ///
    /// # Errors
    /// No tap, more than [`PAIRS_MAX`], or one whose flags can't be changed.
    pub fn new(pairs: Vec<(Vhost, OwnedFd)>, mac: [u8; 6]) -> io::Result<Self> {
        let (sizes, config) = shape(pairs.len(), mac)?;
        let pair = |(vhost, tap)| {
            let tap = Tap::new(tap, ask_kernel)?;
            Ok(Pair { vhost, tap, is_set_up: false, is_served: false, doorbells: Vec::new() })
        };
        let pairs = pairs.into_iter().map(pair).collect::<io::Result<_>>()?;
        Ok(Self { pairs, control: None, sizes, config, counters: Counters::default() })
    }

    /// Lets the driver use so many pairs, of those that it has set up. False, and it has those that it had, where it can't.
    fn set_pairs(pairs: &mut [Pair], wanted: usize) -> bool {
        let usable = pairs.iter().take_while(|pair| pair.is_set_up).count();
        if !(1..=usable).contains(&wanted) {
            return false;
        }
        let had = pairs.iter().take_while(|pair| pair.is_served).count();
        for (index, pair) in pairs.iter_mut().enumerate() {
            if let Err(error) = pair.turn(index < wanted) {
                log::warn!("net: a tap does not change its queues: {error}");
                for (index, pair) in pairs.iter_mut().enumerate() {
                    let _ = pair.turn(index < had);
                }
                return false;
            }
        }
        true
    }
}

impl Pair {
    /// What both sides agree on, and where the queues are.
    fn set_up(&mut self, features: u64, memory: &Memory, rings: &[Ring]) -> Result<(), Broken> {
        prepare(&self.tap, features)?;
        self.vhost.share_memory(memory)?;
        let features = agreed(features, self.vhost.features);
        self.vhost.set_features(features).map_err(refused("agree on features"))?;
        for (index, ring) in rings.iter().enumerate() {
            self.vhost.place(index, ring)?;
            self.doorbells.push(ring.doorbell().try_clone().map_err(refused("hear a doorbell"))?);
        }
        self.is_set_up = true;
        Ok(())
    }

    /// Has the pair take part, or not. A queue of the link that nobody reads would hold the frames that the host's kernel puts into it.
    fn turn(&mut self, wanted: bool) -> Result<(), Broken> {
        self.tap.attach(wanted).map_err(|error| Broken(error.to_string()))?;
        self.serve(wanted)
    }

    /// Gives the queues to the kernel, or takes them back.
    fn serve(&mut self, wanted: bool) -> Result<(), Broken> {
        if self.is_served == wanted {
            return Ok(());
        }
        // Taken back they are all, whatever comes of one.
        let tap = || wanted.then(|| self.tap.fd());
        let served: Vec<_> = (0..QUEUES).map(|index| self.vhost.serve(index, tap())).collect();
        served.into_iter().collect::<io::Result<()>>().map_err(refused("serve a queue"))?;
        self.is_served = wanted;
        for doorbell in self.doorbells.iter().filter(|_| wanted) {
            // What the driver made available before it was ready it need not ring for again.
            doorbell.write(1).map_err(refused("hear a doorbell"))?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        if std::mem::take(&mut self.is_set_up) {
            // Also where only one of them was given to it.
            self.is_served = true;
            if let Err(error) = self.serve(false) {
                log::warn!("net: vhost-net does not let go of its queues: {error}");
            }
            // What it has found wrong before is of no more interest.
            let _ = self.vhost.errors.read();
        }
        self.doorbells.clear();
    }
}

impl Device for VhostNet {
    fn name(&self) -> &'static str {
        "net"
    }

    fn id(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        let kernel = self.pairs.iter().fold(u64::MAX, |all, pair| all & pair.vhost.features);
        offered(kernel) | if self.pairs.len() > 1 { CTRL_VQ | MQ } else { 0 }
    }

    fn ring_features(&self) -> u64 {
        self.pairs.iter().fold(u64::MAX, |all, pair| all & pair.vhost.features)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.reset();
        let Activation { features, memory, rings } = activation;
        let Queues { control, pairs } = Queues::of(rings, features, self.pairs.len())?;
        self.control = control;
        for (pair, rings) in self.pairs.iter_mut().zip(pairs) {
            if let Some(rings) = rings {
                pair.set_up(features, &memory, &rings)?;
            }
        }
        // A driver starts with one pair (section 5.1.5).
        if Self::set_pairs(&mut self.pairs, 1) { Ok(()) } else { Err(Broken::new("vhost-net serves no queue")) }
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let errors = self.pairs.iter().map(|pair| borrowed(&pair.vhost.errors));
        (0..).zip(errors).map(|(token, fd)| Source { token, fd, edge: true }).collect()
    }

    fn served_elsewhere(&self, queue: u16) -> bool {
        self.control.as_ref().is_none_or(|(control, _)| *control != queue)
    }

    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken> {
        let Some((_, ring)) = self.control.as_mut().filter(|(control, _)| *control == queue) else {
            return Ok(Turn::Done);
        };
        let pairs = &mut self.pairs;
        control::pump(ring, &mut self.counters, |wanted| Self::set_pairs(pairs, usize::from(wanted)))
    }

    fn on_source(&mut self, token: u16) -> Result<Turn, Broken> {
        match self.pairs.get(usize::from(token)).map(|pair| pair.vhost.errors.read()) {
            Some(Ok(_)) => Err(Broken::new("the guest's queues make no sense to vhost-net")),
            // Of a queue that was reset meanwhile.
            _ => Ok(Turn::Done),
        }
    }

    fn reset(&mut self) {
        self.control = None;
        for pair in &mut self.pairs {
            pair.reset();
        }
    }

    /// The host's kernel knows where its rings are.
    fn save(&self) -> Option<Vec<u8>> {
        None
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

//! The socket device for a monitor in the same process.

use super::device::Device as Packets;
use super::muxer::Muxer;
use crate::chain::walk;
use crate::device::{Activation, Broken, Counters, Device, Source, Turn};
use crate::ring::Ring;

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;
/// The queues: rx, tx, events.
const SIZES: [u16; 3] = [256, 256, 16];
const MUXER: u16 = 0;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.3, section 5.10.6.7): all connections are gone.
const TRANSPORT_RESET: [u8; 4] = 0_u32.to_le_bytes();
/// The most rounds of one turn.
const ROUNDS_MAX: usize = 16;

/// The socket device.
pub struct Vsock {
    packets: Packets,
    config: [u8; 8],
    rings: Vec<Option<Ring>>,
    /// Whether the guest is still to hear that its connections are gone.
    lost_connections: bool,
}

impl Vsock {
    /// A device over `muxer`.
    #[must_use]
    pub fn new(muxer: Muxer) -> Self {
        let config = muxer.guest_cid().to_le_bytes();
        Self { packets: Packets::new(muxer), config, rings: Vec::new(), lost_connections: false }
    }

    /// Tells the guest that its connections are gone, as soon as it has a buffer for that.
    fn tell_loss(&mut self) -> Result<(), Broken> {
        let Some(Some(events)) = self.rings.get_mut(EVENTS) else { return Ok(()) };
        while self.lost_connections {
            let Some(chain) = events.pop()? else {
                // For what the guest has added before it sees this it does not ring.
                if events.listen()? {
                    continue;
                }
                return Ok(());
            };
            let mut room = walk(&chain, chain.memory()).map(|buffers| buffers.writable).unwrap_or_default();
            let fits = room.len() >= TRANSPORT_RESET.len();
            let written = if fits { room.put(&TRANSPORT_RESET) } else { 0 };
            events.push(chain.head_index(), u32::try_from(written).unwrap_or(0))?;
            events.signal()?;
            // A guest whose buffers are too small for it has said that it does not care.
            self.lost_connections = false;
        }
        Ok(())
    }

    fn pump(&mut self) -> Result<Turn, Broken> {
        let [Some(rx), Some(tx), ..] = self.rings.as_mut_slice() else { return Ok(Turn::Done) };
        self.packets.muxer().handle_events();
        for _ in 0..ROUNDS_MAX {
            // Whether the guest has added something between our last look and its being told to knock.
            let mut again = false;
            tx.hush()?;
            let memory = tx.memory();
            if self.packets.process_tx(tx.queue(), &memory)? {
                tx.interrupt_now();
            }
            again |= tx.listen()? && self.packets.muxer().accepts();
            let stalled = !self.packets.muxer().accepts();
            if self.packets.process_rx(rx.queue(), &memory)? {
                rx.interrupt_now();
            }
            again |= stalled && self.packets.muxer().accepts();
            if self.packets.muxer().has_pending() {
                // Out of buffers: knock when there are new ones.
                again |= rx.listen()?;
            }
            if !again {
                return Ok(Turn::Done);
            }
        }
        Ok(Turn::More)
    }
}

impl From<super::device::QueueError> for Broken {
    fn from(error: super::device::QueueError) -> Self {
        Self(error.to_string())
    }
}

impl Device for Vsock {
    fn name(&self) -> &'static str {
        "vsock"
    }

    fn id(&self) -> u16 {
        19
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        if !matches!(activation.rings.as_slice(), [Some(_), Some(_), ..]) {
            return Err(Broken::new("the driver runs without its rx or tx queue"));
        }
        self.rings = activation.rings;
        Ok(())
    }

    fn sources(&self) -> Vec<Source<'_>> {
        vec![Source { token: MUXER, fd: self.packets.epoll(), edge: false }]
    }

    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken> {
        match usize::from(queue) {
            RX | TX => self.pump(),
            EVENTS => self.tell_loss().map(|()| Turn::Done),
            _ => Ok(Turn::Done),
        }
    }

    fn on_source(&mut self, _: u16) -> Result<Turn, Broken> {
        self.pump()
    }

    /// Whoever was at the other end of the guest's connections is not there: they were another machine's.
    fn resumed(&mut self) -> Result<(), Broken> {
        self.lost_connections = true;
        self.tell_loss()
    }

    fn reset(&mut self) {
        self.lost_connections = false;
        self.rings.clear();
        self.packets.muxer().forget_all();
    }

    fn counters(&self) -> Counters {
        self.packets.counters()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Memory;
    use crate::driver::{DATA, Driver, activation, memory, peek};

    fn resumed(drivers: &[Driver], memory: &Memory) -> (Vsock, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let mut vsock = Vsock::new(Muxer::new(3, &folder.path().join("v")).unwrap());
        let rings = drivers.iter().map(|driver| Some(driver.ring(false))).collect();
        vsock.activate(activation(memory, 0, rings)).unwrap();
        vsock.resumed().unwrap();
        (vsock, folder)
    }

    #[test]
    fn a_guest_that_goes_on_elsewhere_hears_once_that_its_connections_are_gone() {
        let memory = memory();
        let mut drivers = [0, 1, 2].map(|index| Driver::new(&memory, index, 8));
        drivers[2].chain(&[(DATA, 4, true)]);
        drivers[2].chain(&[(DATA + 16, 4, true)]);
        crate::driver::poke(&memory, DATA, &[7; 4]);
        let (mut vsock, _folder) = resumed(&drivers, &memory);
        assert_eq!((drivers[2].used(), peek(&memory, DATA, 4)), (vec![(0, 4)], vec![0; 4]));
        assert!(drivers[2].interrupted());
        assert_eq!(vsock.on_queue(2).unwrap(), Turn::Done);
        assert_eq!(drivers[2].used(), [], "once");
    }

    #[test]
    fn one_without_a_buffer_hears_of_it_later_and_one_with_a_small_one_never() {
        let memory = memory();
        let mut drivers = [0, 1, 2].map(|index| Driver::new(&memory, index, 8));
        let (mut vsock, _folder) = resumed(&drivers, &memory);
        drivers[2].chain(&[(DATA, 8, true)]);
        assert_eq!(vsock.on_queue(2).unwrap(), Turn::Done);
        assert_eq!(drivers[2].used(), [(0, 4)]);
        let mut drivers = [0, 1, 2].map(|index| Driver::new(&memory, index, 8));
        drivers[2].chain(&[(DATA, 3, true)]);
        let (mut vsock, _folder) = resumed(&drivers, &memory);
        assert_eq!(drivers[2].used(), [(0, 0)]);
        drivers[2].chain(&[(DATA, 4, true)]);
        assert_eq!(vsock.on_queue(2).unwrap(), Turn::Done);
        assert_eq!(drivers[2].used(), []);
        // A driver that has begun anew has no connections to lose.
        let drivers = [0, 1, 2].map(|index| Driver::new(&memory, index, 8));
        let (mut vsock, _folder) = resumed(&drivers, &memory);
        vsock.reset();
        assert_eq!(vsock.on_queue(2).unwrap(), Turn::Done);
    }
}

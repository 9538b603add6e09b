//! The network device.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use super::receive::{self, Receiver};
use super::tap::{Ask, Request, Tap, ask_kernel};
use super::{HEADER_BYTES, control, transmit};
use crate::device::{Activation, Broken, Counters, Device, Source, Turn};
use crate::limit::{Limiter, Limits, Way};
use crate::ring::Ring;

/// The most pairs of queues.
pub const PAIRS_MAX: usize = 64;

/// Entries of a receive or transmit queue.
const QUEUE_SIZE: u16 = 256;
/// The source that tells when a limit lets those go on who wait; the others are the pairs' numbers.
const TIMER: u16 = u16::MAX;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;

/// Features (section 5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(in crate::net) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;
    pub(in crate::net) const CTRL_VQ: u64 = 1 << 17;
    pub(in crate::net) const MQ: u64 = 1 << 22;
}
use feature::{CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, HOST_TSO4, HOST_TSO6, MAC, STATUS};
pub(super) use feature::{CTRL_VQ, MQ, MRG_RXBUF};

/// What a device of one pair offers: all of it passes between the guest and the tap, but for the buffers that may be merged.
pub(super) const OFFERED: u64 =
    CSUM | GUEST_CSUM | MAC | GUEST_TSO4 | GUEST_TSO6 | HOST_TSO4 | HOST_TSO6 | MRG_RXBUF | STATUS;

/// What there is of each tap.
#[derive(Debug)]
struct Pair {
    tap: Tap,
    rx: Receiver,
    tx: Option<Ring>,
}

/// See the module above.
#[derive(Debug)]
pub struct Net {
    pairs: Vec<Pair>,
    /// How many of the pairs the driver uses.
    active: usize,
    /// How many it used when the machine was saved whose place this one takes.
    saved: usize,
    /// Where the control queue is, which depends on what the driver has taken.
    control: Option<(u16, Ring)>,
    sizes: Vec<u16>,
    config: [u8; 10],
    counters: Counters,
    limiter: Limiter,
}

impl Net {
    /// A device over `taps`, each a queue of the same link with `IFF_VNET_HDR`, and with `IFF_MULTI_QUEUE` where there is more
    /// than one. They are made nonblocking. The guest gets one pair of queues a tap, and `mac` as its address.
    ///
    /// # Errors
    /// No taps, more than [`PAIRS_MAX`], or one whose flags can't be changed.
    pub fn new(taps: Vec<OwnedFd>, mac: [u8; 6]) -> io::Result<Self> {
        Self::with(taps, mac, ask_kernel)
    }

    /// A device over what keeps frames apart as taps do, such as sockets of the type `SEQPACKET`, but is no tap: whoever is at
    /// the other ends knows by himself what the driver has taken. For fuzzing and measuring.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn over_sockets(sockets: Vec<OwnedFd>, mac: [u8; 6]) -> io::Result<Self> {
        Self::with(sockets, mac, |_, _| Ok(()))
    }

    pub(super) fn with(taps: Vec<OwnedFd>, mac: [u8; 6], ask: Ask) -> io::Result<Self> {
        let (sizes, config) = shape(taps.len(), mac)?;
        let pairs = taps
            .into_iter()
            .map(|fd| Ok(Pair { tap: Tap::new(fd, ask)?, rx: Receiver::new(), tx: None }))
            .collect::<io::Result<Vec<_>>>()?;
        Ok(Self {
            pairs,
            active: 0,
            saved: 1,
            control: None,
            sizes,
            config,
            counters: Counters::default(),
            limiter: Limiter::new()?,
        })
    }

    /// Lets the driver use so many pairs. False, and the number is as it was, where it can't.
    fn set_pairs(pairs: &mut [Pair], active: &mut usize, wanted: usize) -> bool {
        // The driver has pairs to use from the first on, of those that it has set up.
        let usable = pairs.iter().take_while(|pair| pair.tx.is_some()).count();
        if !(1..=usable).contains(&wanted) {
            return false;
        }
        for (index, pair) in pairs.iter_mut().enumerate() {
            // A queue of the link that nobody reads would hold the frames that the host's kernel puts into it.
            if let Err(error) = pair.tap.attach(index < wanted) {
                log::warn!("net: a tap does not change its queues: {error}");
                return false;
            }
            if index < wanted && index >= *active {
                pair.rx.wake();
            }
        }
        *active = wanted;
        true
    }

    fn on_control(&mut self) -> Result<Turn, Broken> {
        let Some((_, ring)) = &mut self.control else { return Ok(Turn::Done) };
        let (pairs, active) = (&mut self.pairs, &mut self.active);
        let mut turn =
            control::pump(ring, &mut self.counters, |wanted| Self::set_pairs(pairs, active, usize::from(wanted)))?;
        // What came to a queue before it was watched woke nobody.
        for pair in (0..).take(self.active) {
            if self.receive(pair)? == Turn::More {
                turn = Turn::More;
            }
        }
        Ok(turn)
    }

    /// Those who had to wait look again.
    fn go_on(&mut self) {
        for queue in self.limiter.heard() {
            let Some(pair) = self.pairs.get(usize::from(queue / 2)) else { continue };
            let ring = if queue.is_multiple_of(2) { pair.rx.ring() } else { pair.tx.as_ref() };
            if let Some(ring) = ring {
                let _ = ring.doorbell().write(1);
            }
        }
    }

    /// A turn of the receiving queue of a pair.
    fn receive(&mut self, pair: u16) -> Result<Turn, Broken> {
        let Some(budget) = self.limiter.turn(2 * pair, receive::BUDGET, Way::ToGuest)? else { return Ok(Turn::Done) };
        let Some(pair) = self.pairs.get_mut(usize::from(pair)) else { return Ok(Turn::Done) };
        let before = self.counters;
        let turn = pair.rx.pump(&pair.tap, &mut self.counters, budget);
        self.limiter.took(Way::ToGuest, &before, &self.counters);
        turn
    }

    /// A turn of the transmitting queue of a pair.
    fn transmit(&mut self, pair: u16) -> Result<Turn, Broken> {
        let allowed = self.limiter.turn(2 * pair + 1, transmit::BUDGET, Way::FromGuest)?;
        let Some(budget) = allowed else { return Ok(Turn::Done) };
        let Some(pair) = self.pairs.get_mut(usize::from(pair)) else { return Ok(Turn::Done) };
        let Some(tx) = &mut pair.tx else { return Ok(Turn::Done) };
        let before = self.counters;
        let turn = transmit::pump(tx, &pair.tap, &mut self.counters, budget);
        self.limiter.took(Way::FromGuest, &before, &self.counters);
        turn
    }
}

/// The sizes of the queues of a device with so many pairs, and its configuration space.
pub(super) fn shape(pairs: usize, mac: [u8; 6]) -> io::Result<(Vec<u16>, [u8; 10])> {
    if !(1..=PAIRS_MAX).contains(&pairs) {
        let text = format!("a network device has 1 to {PAIRS_MAX} taps, not {pairs}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut sizes = vec![QUEUE_SIZE; 2 * pairs];
    if pairs > 1 {
        sizes.push(CONTROL_SIZE);
    }
    Ok((sizes, configuration(mac, u16::try_from(pairs).unwrap_or(1))))
}

/// What a driver has set up of a device's queues.
pub(super) struct Queues {
    /// The control queue, and its index.
    pub(super) control: Option<(u16, Ring)>,
    /// Receive and transmit of each pair; none of one that the driver does not use.
    pub(super) pairs: Vec<Option<[Ring; 2]>>,
}

impl Queues {
    /// The queues of a device with so many pairs, for a driver with these features.
    pub(super) fn of(mut rings: Vec<Option<Ring>>, features: u64, pairs: usize) -> Result<Self, Broken> {
        let multiple = features & MQ != 0;
        if multiple && features & CTRL_VQ == 0 {
            return Err(Broken::new("the driver wants several queues without the one that says how many"));
        }
        // It comes behind the queues of all pairs, or of the only one (section 5.1.2).
        let at = if multiple { 2 * pairs } else { 2 };
        let mut ring = |index: usize| rings.get_mut(index).and_then(Option::take);
        let mut control = None;
        if features & CTRL_VQ != 0 {
            let ring = ring(at).ok_or_else(|| Broken::new("the driver runs without its control queue"))?;
            control = Some((u16::try_from(at).unwrap_or(u16::MAX), ring));
        }
        let used = if multiple { pairs } else { 1 };
        let mut pairs = Vec::with_capacity(used);
        for index in 0..used {
            pairs.push(match (ring(2 * index), ring(2 * index + 1)) {
                (Some(rx), Some(tx)) => Some([rx, tx]),
                // A driver need not set up pairs that it does not use.
                (None, None) if index > 0 => None,
                _ => return Err(Broken::new("the driver runs without a receive or transmit queue")),
            });
        }
        Ok(Self { control, pairs })
    }
}

/// The configuration space: the address, the status (`VIRTIO_NET_S_LINK_UP`), and the number of pairs (section 5.1.4).
fn configuration(mac: [u8; 6], pairs: u16) -> [u8; 10] {
    let [a, b, c, d, e, f] = mac;
    let [low, high] = pairs.to_le_bytes();
    [a, b, c, d, e, f, 1, 0, low, high]
}

/// What the tap may leave to its reader (linux/if_tun.h), which the driver has taken.
fn offload(features: u64) -> libc::c_uint {
    if features & GUEST_CSUM == 0 {
        // There is no segmentation without checksums (section 5.1.3.1).
        return 0;
    }
    let tso4 = if features & GUEST_TSO4 != 0 { libc::TUN_F_TSO4 } else { 0 };
    let tso6 = if features & GUEST_TSO6 != 0 { libc::TUN_F_TSO6 } else { 0 };
    libc::TUN_F_CSUM | tso4 | tso6
}

/// Has the tap give and take what the driver has agreed to.
pub(super) fn prepare(tap: &Tap, features: u64) -> Result<(), Broken> {
    let header = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
    let asked = tap.ask(Request::HeaderBytes(header)).and_then(|()| tap.ask(Request::Offload(offload(features))));
    asked.map_err(|error| Broken(format!("the tap does not do what the driver wants: {error}")))
}

impl Device for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn id(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        OFFERED | if self.pairs.len() > 1 { CTRL_VQ | MQ } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        self.reset();
        let Activation { features, rings, .. } = activation;
        let Queues { control, pairs } = Queues::of(rings, features, self.pairs.len())?;
        self.control = control;
        for (pair, rings) in self.pairs.iter_mut().zip(pairs) {
            if let Some([rx, tx]) = rings {
                pair.rx.start(rx, features & MRG_RXBUF != 0);
                pair.tx = Some(tx);
            }
        }
        // A driver starts with one pair (section 5.1.5).
        if !Self::set_pairs(&mut self.pairs, &mut self.active, 1) {
            return Err(Broken::new("the taps can't be brought to one queue"));
        }
        self.pairs.first().map_or(Ok(()), |pair| prepare(&pair.tap, features))
    }

    fn sources(&self) -> Vec<Source<'_>> {
        let taps = (0..).zip(&self.pairs).map(|(token, pair)| Source { token, fd: pair.tap.fd(), edge: true });
        taps.chain([Source { token: TIMER, fd: self.limiter.timer(), edge: false }]).collect()
    }

    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken> {
        if self.control.as_ref().is_some_and(|(index, _)| *index == queue) {
            return self.on_control();
        }
        let pair = queue / 2;
        if usize::from(pair) >= self.active {
            return Ok(Turn::Done);
        }
        if queue.is_multiple_of(2) { self.receive(pair) } else { self.transmit(pair) }
    }

    fn on_source(&mut self, token: u16) -> Result<Turn, Broken> {
        if token == TIMER {
            self.go_on();
            return Ok(Turn::Done);
        }
        let index = usize::from(token);
        let Some(pair) = self.pairs.get_mut(index).filter(|_| index < self.active) else { return Ok(Turn::Done) };
        pair.rx.wake();
        self.receive(token)
    }

    fn queue_of(&self, token: u16) -> u16 {
        // The receiving one of the pair.
        token.saturating_mul(2)
    }

    /// The configuration, and how many pairs the driver uses.
    fn save(&self) -> Option<Vec<u8>> {
        let active = u16::try_from(self.active).unwrap_or(1);
        Some([&self.config[..], &active.to_le_bytes()].concat())
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), Broken> {
        let (config, active) = saved.split_last_chunk().unwrap_or((saved, &[0, 0]));
        if config != self.config {
            return Err(Broken::new("this link has another address, or other queues, than the one that was saved"));
        }
        self.saved = usize::from(u16::from_le_bytes(*active));
        Ok(())
    }

    fn resumed(&mut self) -> Result<(), Broken> {
        if Self::set_pairs(&mut self.pairs, &mut self.active, self.saved) {
            return Ok(());
        }
        Err(Broken::new("the taps can't be brought to the queues that the guest uses"))
    }

    fn limit(&mut self, limits: Limits) -> io::Result<()> {
        self.limiter.set(limits, Instant::now())
    }

    fn reset(&mut self) {
        self.limiter.reset();
        (self.active, self.control) = (0, None);
        for pair in &mut self.pairs {
            pair.rx.stop();
            pair.tx = None;
        }
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}

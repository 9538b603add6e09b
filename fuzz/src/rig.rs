//! A device behind its registers, and a driver that does to it what the bytes say.

use std::sync::Arc;

use coracle_virtio::device::{Broken, Counters, Device, EVENT_IDX, INDIRECT_DESC, Turn, VERSION_1};
use coracle_virtio::ring::Interrupts;
use coracle_virtio::transport::{COMMON_BYTES, Effect, Transport, status};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{AVAILABLE, DATA, END, Guest, INDIRECT, NEXT, QUEUE_BYTES, SEAM, USED, WRITE};
use crate::held::peak;
use crate::input::Input;
use crate::snapshot;

/// The most things that one input does.
const ACTIONS_MAX: usize = 256;

/// Offsets of the common configuration (virtio 1.3, section 4.1.4.3).
pub mod register {
    /// `driver_feature_select`.
    pub const DRIVER_FEATURES_SELECT: u64 = 8;
    /// `driver_feature`.
    pub const DRIVER_FEATURES: u64 = 12;
    /// `num_queues`.
    pub const QUEUES: u64 = 18;
    /// `device_status`.
    pub const STATUS: u64 = 20;
    /// `queue_select`.
    pub const QUEUE_SELECT: u64 = 22;
    /// `queue_size`.
    pub const QUEUE_SIZE: u64 = 24;
    /// `queue_msix_vector`.
    pub const QUEUE_VECTOR: u64 = 26;
    /// `queue_enable`.
    pub const QUEUE_ENABLE: u64 = 28;
    /// `queue_desc`, followed by `queue_driver` and `queue_device`.
    pub const QUEUE_ADDRESSES: u64 = 32;
}

/// Who writes a queue's chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// The driver.
    Driver,
    /// The device.
    Device,
    /// The driver the first part, the device the rest.
    Both,
}

/// What is particular to a device.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// How a chain of a queue looks that makes sense.
    pub shape: fn(u16) -> Shape,
    /// How long its descriptors are, mostly.
    pub lengths: &'static [u32],
    /// What a request begins with.
    pub header: fn(&mut Input<'_>) -> Vec<u8>,
    /// The most bytes that a turn may hold at once.
    pub held_max: usize,
    /// The most bytes that a turn may move.
    pub moved_max: u64,
    /// The most requests, packets and refusals of a turn.
    pub operations_max: u64,
}

/// What wakes a device.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// A queue's doorbell.
    Doorbell(u16),
    /// A source of the device's own.
    Source(u16),
}

/// See the module.
pub struct Rig {
    /// The device and its registers.
    pub transport: Transport,
    /// The guest's side.
    pub guest: Guest,
    spec: Spec,
}

impl Rig {
    /// Around a device.
    #[must_use]
    pub fn new(device: Box<dyn Device>, spec: Spec) -> Self {
        let guest = Guest::new();
        Self { transport: transport(device, &guest), guest, spec }
    }

    /// Does what the bytes say. `host` is what happens on the host's side meanwhile.
    pub fn run(&mut self, input: &mut Input<'_>, host: &mut dyn FnMut(&mut Input<'_>)) {
        self.set_up(input);
        self.act_with(input, ACTIONS_MAX, host);
        for queue in 0..self.transport.device().queue_sizes().len() as u16 {
            self.ring(queue);
        }
    }

    /// Does so many things, or as many as the bytes say.
    pub fn act(&mut self, input: &mut Input<'_>, actions: usize) {
        self.act_with(input, actions.min(ACTIONS_MAX), &mut |_| {});
    }

    fn act_with(&mut self, input: &mut Input<'_>, actions: usize, host: &mut dyn FnMut(&mut Input<'_>)) {
        for _ in 0..actions {
            if input.is_empty() || self.guest.is_tired() {
                break;
            }
            let queue = input.byte();
            let action = queue >> 3;
            let queues = self.transport.device().queue_sizes().len() as u16;
            let queue = u16::from(queue & 7) % queues.max(1);
            match action {
                0..8 => {
                    self.offer(queue, input);
                    self.ring(queue);
                }
                8..13 => self.offer(queue, input),
                13..17 => self.ring(queue),
                17..19 => {
                    self.turn(Event::Doorbell(queue));
                }
                19 | 20 => {
                    self.turn(Event::Source(queue));
                    self.ring(queue);
                }
                21..25 => host(input),
                25 => self.guest.jump(queue, input.of(&[1, 2, u16::MAX, 255, 256, 257, 0x8000])),
                26 => self.raw_descriptor(queue, input),
                27 => self.overwrite(queue, input),
                28 => self.register(input),
                29 => {
                    let event = u16::from(input.byte());
                    self.ask_for_interrupt(queue, event);
                }
                30 => {
                    let token = input.word();
                    self.turn(Event::Source(token));
                    self.turn(Event::Doorbell(token));
                }
                _ => self.set_up(input),
            }
        }
    }

    /// Puts another device in the place of this one, as in a machine that goes on where it was saved; what was saved may have been edited.
    pub fn go_on(&mut self, device: Box<dyn Device>, input: &mut Input<'_>) {
        let mut saved = serde_json::to_vec(&self.transport.save().unwrap()).unwrap();
        let mut other = transport(device, &self.guest);
        let edits = snapshot::edit(&mut saved, input);
        let was_active = self.transport.is_active();
        let restored = match serde_json::from_slice(&saved) {
            Ok(saved) => self.guest.watch(was_active, || other.restore(&saved)).is_ok(),
            Err(_) => false,
        };
        assert!(restored || edits > 0, "a device can't take the place of its like");
        self.transport = other;
        if edits == 0 {
            assert_eq!(self.transport.is_active(), was_active);
            let again = serde_json::to_vec(&self.transport.save().unwrap()).unwrap();
            assert_eq!(String::from_utf8(again), String::from_utf8(saved), "what was saved is not what is there");
            for queue in 0..self.guest.queues.len() as u16 {
                self.ring(queue);
            }
            return;
        }
        if !restored {
            // It is of no use, and whoever has made it makes another.
            self.transport.reset();
            self.guest.forget();
            return;
        }
        if !self.transport.is_active() {
            // What its driver has written so far is nobody's queue yet.
            self.guest.forget();
            return;
        }
        self.learn_queues();
        self.guest.lose_track();
        let queues = self.transport.device().queue_sizes().len() as u16;
        for queue in 0..queues {
            self.turn(Event::Doorbell(queue));
        }
    }

    /// Writes a number to a register.
    pub fn write<const N: usize>(&mut self, offset: u64, value: [u8; N]) {
        self.write_any(offset, &value);
    }

    fn write_any(&mut self, offset: u64, value: &[u8]) {
        let transport = &mut self.transport;
        let active = transport.is_active();
        let broken = number::<1>(transport, register::STATUS)[0] & status::NEEDS_RESET;
        match self.guest.watch(active, || transport.write_common(offset, value)) {
            Effect::None => assert_eq!(self.transport.is_active(), active),
            Effect::Reset => {
                assert!(!self.transport.is_active());
                assert_eq!(number::<1>(&self.transport, register::STATUS), [0], "the status after a reset");
                self.guest.forget();
            }
            Effect::Activated => {
                assert!(!active && broken == 0, "active without a reset before");
                self.learn_queues();
            }
            Effect::Broke => {
                assert!(!active && !self.transport.is_active());
                let [status] = number(&self.transport, register::STATUS);
                assert!(status & status::NEEDS_RESET != 0, "the driver is not told that the device is broken");
            }
        }
    }

    /// What the device believes of its queues is what the driver goes by.
    fn learn_queues(&mut self) {
        self.guest.forget();
        let count = u16::from_le_bytes(number(&self.transport, register::QUEUES));
        let selected = number::<2>(&self.transport, register::QUEUE_SELECT);
        for index in 0..count {
            let _ = self.transport.write_common(register::QUEUE_SELECT, &index.to_le_bytes());
            let ready = number::<2>(&self.transport, register::QUEUE_ENABLE) != [0; 2];
            let size = u16::from_le_bytes(number(&self.transport, register::QUEUE_SIZE));
            let addresses = [0, 8, 16]
                .map(|offset| u64::from_le_bytes(number(&self.transport, register::QUEUE_ADDRESSES + offset)));
            let bytes = u64::from(size);
            let ends = [16 * bytes, 6 + 2 * bytes, 6 + 8 * bytes];
            let inside =
                addresses.iter().zip(ends).all(|(at, bytes)| at.checked_add(bytes).is_some_and(|end| end <= END));
            assert!(inside || !ready, "queue {index} is not in the guest's memory: {addresses:#x?} of {size}");
            self.guest.add_queue(ready.then_some((size, addresses)));
        }
        let _ = self.transport.write_common(register::QUEUE_SELECT, &selected);
    }

    /// Resets the device and sets it up. Zeroes do it right.
    pub fn set_up(&mut self, input: &mut Input<'_>) {
        let [how, sizes, odd] = input.bytes();
        self.write(register::STATUS, [0]);
        self.write(register::STATUS, [status::ACKNOWLEDGE]);
        self.write(register::STATUS, [status::ACKNOWLEDGE | status::DRIVER]);
        let mut features = self.transport.offered();
        if how & 1 != 0 {
            features &= !EVENT_IDX;
        }
        if how & 2 != 0 {
            features &= !INDIRECT_DESC;
        }
        if how & 4 != 0 {
            features &= u64::from(input.double()) | EVENT_IDX | INDIRECT_DESC | VERSION_1;
        }
        if odd == 1 {
            features ^= input.quad();
        }
        for half in [0_u32, 1] {
            self.write(register::DRIVER_FEATURES_SELECT, half.to_le_bytes());
            let value = (features >> (32 * half) & 0xffff_ffff) as u32;
            self.write(register::DRIVER_FEATURES, value.to_le_bytes());
        }
        let mut state = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(register::STATUS, [state]);
        let queues = self.transport.device().queue_sizes().to_vec();
        for (index, max) in (0_u16..).zip(queues) {
            if odd == 2 && input.rare(64) {
                continue;
            }
            self.write(register::QUEUE_SELECT, index.to_le_bytes());
            let size = [max, 256, 64, 16, 8, 4, 2, 1][usize::from(sizes & 7)].min(max);
            self.write(register::QUEUE_SIZE, if odd == 3 { input.word() } else { size }.to_le_bytes());
            self.write(register::QUEUE_VECTOR, (index + 1).to_le_bytes());
            let base = u64::from(index & 7) * QUEUE_BYTES;
            for (register, offset) in [(0, 0), (8, AVAILABLE), (16, USED)] {
                let address = if odd == 4 && input.rare(100) { place(input) } else { base + offset };
                self.write(register::QUEUE_ADDRESSES + register, address.to_le_bytes());
            }
            self.write(register::QUEUE_ENABLE, [1, 0]);
        }
        state |= status::DRIVER_OK;
        self.write(register::STATUS, [state]);
        if odd == 0 && how & 4 == 0 {
            assert!(self.transport.is_active(), "a driver that does all right can't use the device");
        }
    }

    /// One turn of the device.
    pub fn turn(&mut self, event: Event) -> Option<Turn> {
        let active = self.transport.is_active();
        let before = self.transport.device().counters();
        let device = self.transport.device();
        let (result, held) = self.guest.watch(active, || {
            peak(|| match event {
                Event::Doorbell(queue) => device.on_queue(queue),
                Event::Source(token) => device.on_source(token),
            })
        });
        assert!(held <= self.spec.held_max, "a turn held {held} bytes");
        let after = self.transport.device().counters();
        let (moved, operations) = (moved(after) - moved(before), operations(after) - operations(before));
        assert!(moved <= self.spec.moved_max, "a turn moved {moved} bytes");
        assert!(operations <= self.spec.operations_max, "a turn did {operations} things");
        match result {
            Ok(turn) => {
                assert!(active || turn == Turn::Done, "there is more to do for a device that is not active");
                Some(turn)
            }
            Err(broken) => {
                assert!(active, "a device that is not active breaks");
                self.broke(&broken);
                None
            }
        }
    }

    fn broke(&mut self, broken: &Broken) {
        let transport = &mut self.transport;
        self.guest.watch(false, || transport.needs_reset(broken));
        assert!(!self.transport.is_active());
        let [status] = number(&self.transport, register::STATUS);
        assert!(status & status::NEEDS_RESET != 0);
    }

    /// Rings a doorbell, and lets the device work until it has no more to do.
    pub fn ring(&mut self, queue: u16) {
        // A chain that is given back takes a turn at most, and nothing else is offered meanwhile.
        let sizes = self.guest.queues.iter().flatten().map(|queue| usize::from(queue.size));
        for _ in 0..2 * sizes.sum::<usize>() + 4 {
            if self.turn(Event::Doorbell(queue)) != Some(Turn::More) {
                return;
            }
        }
        panic!("the device turns without end");
    }

    /// Asks for an interrupt behind an index.
    fn ask_for_interrupt(&mut self, queue: u16, event: u16) {
        if let Some(queue) = self.guest.queue(queue) {
            self.guest.scribble(queue.available + 4 + 2 * u64::from(queue.size), &event.to_le_bytes());
        }
    }

    /// Offers some chains. Zeroes make one that is right.
    fn offer(&mut self, index: u16, input: &mut Input<'_>) {
        let Some(queue) = self.guest.queue(index) else { return };
        let how = input.byte();
        let free = queue.size.saturating_sub(self.guest.outstanding(index));
        let chains = [1, 1, 1, 2, 3, 8, 16, 100][usize::from(how & 7)].min(free);
        let odd = how & 0x08 != 0;
        let outside = how & 0x10 != 0;
        let shape = if how & 0xe0 == 0xe0 { Shape::Both } else { (self.spec.shape)(index) };
        let mut template = *input;
        for _ in 0..chains {
            // Many chains are all alike, so that few bytes make them.
            let source = if chains > 3 { &mut template.clone() } else { &mut *input };
            self.offer_one(index, shape, odd, outside, source);
        }
        if chains > 3 {
            self.skim(&mut template, shape, odd);
            *input = template;
        }
    }

    /// Takes some bytes off, as a chain does.
    fn skim(&self, input: &mut Input<'_>, shape: Shape, odd: bool) {
        let _ = input.bytes::<3>();
        if shape != Shape::Device {
            let _ = (self.spec.header)(input);
        }
        let _ = odd.then(|| input.byte());
    }

    fn offer_one(&mut self, index: u16, shape: Shape, odd: bool, outside: bool, input: &mut Input<'_>) {
        let Some(queue) = self.guest.queue(index) else { return };
        let (head, mut slot) = (queue.slot, queue.slot);
        let form = input.byte();
        let count = [2, 1, 2, 3, 3, 4, 9, 40][usize::from(form & 7)].min(queue.size);
        let readable = match shape {
            Shape::Driver => count,
            Shape::Device => 0,
            Shape::Both => match form >> 3 & 3 {
                0 | 1 => count.saturating_sub(1).max(1),
                2 => 1,
                _ => u16::from(form >> 5) % (count + 1),
            },
        };
        let table = outside.then(|| DATA + 0x400 + 0x100 * u64::from(form >> 5));
        for nth in 0..count {
            let (at, next) = if table.is_some() { (nth, nth + 1) } else { (slot, (slot + 1) % queue.size) };
            let more = if nth + 1 < count { NEXT } else { 0 };
            let mut flags = more | if nth < readable { 0 } else { WRITE };
            let mut next = next;
            let (mut address, mut length) = if nth == 0 && readable > 0 {
                let header = (self.spec.header)(input);
                let address = DATA + 0x1000 + 0x100 * u64::from(index);
                self.guest.write(address, &header);
                (address, header.len() as u32)
            } else {
                let address = if odd { place(input) } else { DATA + 0x4000 + 0x100 * u64::from(input.byte()) };
                let status = more == 0 && shape == Shape::Both && nth >= readable && form & 0xe0 != 0xe0;
                (address, if status { 1 } else { self.length(input) })
            };
            if odd {
                match input.byte() {
                    1 => address = input.quad(),
                    2 => flags = input.word() & 7,
                    3 => next = input.word() % (queue.size * 2),
                    4 => length = input.double(),
                    5 => flags |= NEXT,
                    6 => flags ^= WRITE,
                    7 => length = self.length(input),
                    _ => {}
                }
            }
            match table {
                Some(table) => self.guest.descriptor(table, at, address, length, flags, next),
                None => self.guest.descriptor(queue.descriptors, at, address, length, flags, next),
            }
            slot = if table.is_some() { slot } else { next % queue.size };
        }
        if let Some(table) = table {
            let entries = if odd { input.of(&[count.into(), 0, 1, 0x1_0000, 0x1001]) } else { u32::from(count) };
            let flags = INDIRECT | if odd { input.of(&[0, NEXT, WRITE, INDIRECT]) } else { 0 };
            self.guest.descriptor(queue.descriptors, head, table, 16 * entries, flags, head);
            slot = (head + 1) % queue.size;
        }
        self.guest.set_slot(index, slot);
        let head = if odd && input.rare(4) { input.word() % (queue.size * 2) } else { head };
        self.guest.offer(index, head);
    }

    fn length(&self, input: &mut Input<'_>) -> u32 {
        match input.byte() {
            255 => u32::MAX - u32::from(input.byte() & 3),
            254 => input.double() & 0x1f_ffff,
            253 => 65562 - 2 + u32::from(input.byte() & 7),
            252 => u32::from(input.word()),
            byte @ 200..252 => {
                let odd = [0, 1, 2, 10, 11, 12, 13, 15, 16, 17, 20, 26, 43, 44, 45, 60, 511, 513, 1526, 8192];
                odd[usize::from(byte) % odd.len()]
            }
            byte => self.spec.lengths[usize::from(byte) % self.spec.lengths.len()],
        }
    }

    fn raw_descriptor(&mut self, index: u16, input: &mut Input<'_>) {
        let Some(queue) = self.guest.queue(index) else { return };
        let slot = u16::from(input.byte()) % queue.size;
        let address = place(input);
        let length = self.length(input);
        let (flags, next) = (input.word() & 7, u16::from(input.byte()));
        self.guest.descriptor(queue.descriptors, slot, address, length, flags, next);
        if input.byte() & 1 == 0 {
            self.guest.offer(index, slot);
        }
    }

    /// Writes over some bytes of a queue or of data.
    fn overwrite(&mut self, index: u16, input: &mut Input<'_>) {
        let Some(queue) = self.guest.queue(index) else { return };
        let at = match input.byte() & 7 {
            0 => queue.used + u64::from(input.byte()),
            1 | 2 => queue.available + u64::from(input.byte()),
            3..6 => queue.descriptors + u64::from(input.word()) % 0x1000,
            _ => DATA + u64::from(input.word()),
        };
        let bytes: [u8; 4] = input.bytes();
        let count = usize::from(input.byte() & 3) + 1;
        self.guest.scribble(at, &bytes[..count]);
    }

    /// Any access to any register.
    pub fn register(&mut self, input: &mut Input<'_>) {
        let (kind, offset) = (input.byte(), input.byte());
        let offset = match kind >> 5 {
            0..6 => u64::from(offset) % (COMMON_BYTES + 2),
            6 => u64::from(offset),
            _ => input.quad(),
        };
        let width = [1, 2, 4, 8, 0, 3, 7, 64][usize::from(kind >> 2 & 7)];
        let mut bytes = [0xee; 64];
        match kind & 3 {
            0 => {
                bytes[..8].copy_from_slice(&input.bytes::<8>());
                self.write_any(offset, &bytes[..width]);
            }
            1 => self.transport.read_common(offset, &mut bytes[..width]),
            2 => self.transport.read_config(offset, &mut bytes[..width]),
            _ => {
                bytes[..8].copy_from_slice(&input.bytes::<8>());
                let transport = &mut self.transport;
                self.guest.watch(transport.is_active(), || transport.write_config(offset, &bytes[..width]));
            }
        }
        if matches!(kind & 3, 1 | 2) {
            assert!(bytes[width..].iter().all(|byte| *byte == 0xee), "more was read than was asked for");
        }
    }

    /// After all that the guest has done, a driver that does everything right finds a device that works.
    pub fn recover(&mut self) {
        self.set_up(&mut Input::new(&[]));
    }

    /// Serves one chain of a good driver. The length that is given back.
    pub fn request(&mut self, queue: u16, descriptors: &[(u64, u32, bool)]) -> u32 {
        let before = self.guest.given(queue);
        self.guest.chain(queue, descriptors);
        self.ring(queue);
        assert_eq!(self.guest.given(queue).wrapping_sub(before), 1, "a good request is not served");
        self.guest.look();
        self.guest.last_used(queue).unwrap()
    }
}

/// Registers around a device, as a bus has them.
#[must_use]
pub fn transport(device: Box<dyn Device>, guest: &Guest) -> Transport {
    let queues = device.queue_sizes().len();
    let events = |count| (0..count).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect::<Vec<_>>();
    let interrupts = Arc::new(Interrupts::new(events(queues + 1), queues));
    Transport::new(device, guest.memory().clone(), interrupts, events(queues))
}

/// Reads a register.
#[must_use]
pub fn number<const N: usize>(transport: &Transport, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    transport.read_common(offset, &mut bytes);
    bytes
}

/// An address: mostly of data, sometimes of what must not be touched, or of what is the device's own to write.
pub fn place(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        255 => u64::MAX - u64::from(input.byte()),
        254 => END - u64::from(input.byte()),
        253 => END + u64::from(input.byte()),
        252 => input.quad(),
        251 => u64::from(input.word()),
        byte @ 220..251 => SEAM - 16 * u64::from(byte - 220),
        byte => DATA + 0x4000 + 0x180 * u64::from(byte),
    }
}

fn moved(counters: Counters) -> u64 {
    counters.bytes_in + counters.bytes_out
}

fn operations(counters: Counters) -> u64 {
    counters.operations_in + counters.operations_out + counters.errors
}

//! The registers, in any order and width, around a device that notes what is asked of it.

use std::sync::{Arc, Mutex};

use coracle_virtio::device::{Activation, Broken, Device, Turn, VERSION_1};
use coracle_virtio::ring::NO_VECTOR;
use coracle_virtio::transport::status;

use crate::input::Input;
use crate::rig::{Event, Rig, Shape, Spec, number, place, register};

const SIZES: [u16; 4] = [256, 64, 1, 1024];
const CONFIG: [u8; 10] = *b"0123456789";
/// What the device can do. It breaks where the driver does not take the last of these.
const FEATURES: u64 = 1 | NEEDED;
const NEEDED: u64 = 1 << 3;

const SPEC: Spec = Spec {
    shape: |_| Shape::Both,
    lengths: &[16],
    header: |_| vec![0; 16],
    held_max: 4096,
    moved_max: 0,
    operations_max: 0,
};

/// What the device was asked.
#[derive(Debug, Default, Clone, Copy)]
struct Notes {
    active: bool,
    resets: usize,
    /// How often the driver has written to the configuration space.
    writes: usize,
}

struct Noting(Arc<Mutex<Notes>>);

impl Device for Noting {
    fn name(&self) -> &'static str {
        "noting"
    }

    fn id(&self) -> u16 {
        42
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn config(&self) -> &[u8] {
        &CONFIG
    }

    fn write_config(&mut self, _: usize, _: &[u8]) {
        self.0.lock().unwrap().writes += 1;
    }

    fn activate(&mut self, activation: Activation) -> Result<(), Broken> {
        let mut notes = self.0.lock().unwrap();
        assert!(!notes.active, "active twice without a reset");
        let offered = FEATURES | VERSION_1 | self.ring_features();
        assert_eq!(activation.features & !offered, 0, "features that were not offered");
        assert!(activation.features & VERSION_1 != 0, "a driver from before virtio 1");
        assert_eq!(activation.rings.len(), SIZES.len());
        for (ring, max) in activation.rings.iter().zip(SIZES) {
            let size = ring.as_ref().map_or(1, coracle_virtio::ring::Ring::size);
            assert!(size.is_power_of_two() && size <= max, "a ring of {size}");
        }
        if activation.features & NEEDED == 0 {
            return Err(Broken::new("without what it needs"));
        }
        notes.active = true;
        Ok(())
    }

    fn on_queue(&mut self, queue: u16) -> Result<Turn, Broken> {
        let active = self.0.lock().unwrap().active;
        if active && queue == 3 { Err(Broken::new("the third queue")) } else { Ok(Turn::Done) }
    }

    fn reset(&mut self) {
        let mut notes = self.0.lock().unwrap();
        notes.active = false;
        notes.resets += 1;
    }
}

/// What a driver can read of the registers.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    status: u8,
    features: u64,
    queues: Vec<([u8; 2], [u8; 2], [u64; 3])>,
}

/// Runs one input.
///
/// # Panics
/// Where the registers do what they must not.
pub fn one(data: &[u8]) {
    let notes = Arc::new(Mutex::new(Notes::default()));
    let mut rig = Rig::new(Box::new(Noting(Arc::clone(&notes))), SPEC);
    let mut input = Input::new(data);
    let mut before = look(&mut rig);
    let mut noted = *notes.lock().unwrap();
    for _ in 0..128 {
        if input.is_empty() {
            break;
        }
        let whole = act(&mut rig, &mut input);
        let now = look(&mut rig);
        let noting = *notes.lock().unwrap();
        assert_eq!(rig.transport.is_active(), noting.active, "the registers and the device do not agree");
        if now.status & status::FEATURES_OK != 0 {
            assert_eq!(now.features & !rig.transport.offered(), 0, "features are fine that were not offered");
        }
        if noting.writes > noted.writes {
            assert!(before.status & status::DRIVER != 0, "a configuration that is written before there is a driver");
        }
        if noting.resets == noted.resets && !whole {
            assert_eq!(before.status & !now.status, 0, "a status is taken back");
            if before.status & status::DRIVER_OK != 0 {
                assert_eq!(before.queues, now.queues, "queues change while the device runs");
            }
            if before.status & status::FEATURES_OK != 0 {
                assert_eq!(before.features, now.features, "features change that were agreed on");
            }
        }
        (before, noted) = (now, noting);
    }
    rig.recover();
    rig.write(register::STATUS, [0]);
    rig.write(register::QUEUE_SELECT, [0, 0]);
    assert_eq!(number(&rig.transport, register::QUEUE_SIZE), 256_u16.to_le_bytes());
    let mut bytes = [0xff; 16];
    rig.transport.read_config(4, &mut bytes);
    assert_eq!(&bytes, b"456789\0\0\0\0\0\0\0\0\0\0");
}

/// One access, or a whole set-up, which resets the device: true.
fn act(rig: &mut Rig, input: &mut Input<'_>) -> bool {
    let kind = input.byte();
    match kind & 31 {
        0..7 => rig.register(input),
        7 => {
            rig.set_up(input);
            return true;
        }
        8 => {
            rig.turn(Event::Doorbell(u16::from(kind >> 5)));
        }
        9 => rig.write(0, [input.byte() & 3, 0, 0, 0]),
        10 => rig.write(register::DRIVER_FEATURES_SELECT, [input.byte() & 3, 0, 0, 0]),
        11 | 12 => {
            let value = input.of(&[1_u32, 0, 9, 8, 1 << 8, 1 << 28 | 1, 1 << 29, u32::MAX]);
            rig.write(register::DRIVER_FEATURES, value.to_le_bytes());
        }
        13..18 => {
            let value = input.of(&[1_u8, 3, 11, 15, 0, 64, 128, 4, 8, 255, 207]);
            rig.write(register::STATUS, [value]);
        }
        18 | 19 => rig.write(register::QUEUE_SELECT, [input.byte() & 7, 0]),
        20 | 21 => {
            let value = input.of(&[16_u16, 64, 256, 1, 0, 3, 512, 1024, 2048, 0x8000, u16::MAX]);
            rig.write(register::QUEUE_SIZE, value.to_le_bytes());
        }
        22 => rig.write(register::QUEUE_VECTOR, u16::from(kind >> 5).to_le_bytes()),
        23 | 24 => rig.write(register::QUEUE_ENABLE, [input.of(&[1_u8, 0, 2]), 0]),
        25..29 => {
            let address = place(input) & if kind & 0x80 == 0 { !0xf } else { u64::MAX };
            rig.write(register::QUEUE_ADDRESSES + 8 * u64::from(kind & 3) % 24, address.to_le_bytes());
        }
        _ => {
            let offset = register::QUEUE_ADDRESSES + 4 * u64::from(input.byte() % 6);
            rig.write(offset, input.bytes::<4>());
        }
    }
    false
}

fn look(rig: &mut Rig) -> Seen {
    let transport = &mut rig.transport;
    let selects = [register::QUEUE_SELECT, register::DRIVER_FEATURES_SELECT];
    let selected: [u8; 2] = number(transport, selects[0]);
    let half: [u8; 4] = number(transport, selects[1]);
    let mut features = 0;
    for nth in [1_u32, 0] {
        let _ = transport.write_common(selects[1], &nth.to_le_bytes());
        features = features << 32 | u64::from(u32::from_le_bytes(number(transport, register::DRIVER_FEATURES)));
    }
    let mut queues = Vec::new();
    for (index, max) in (0_u16..).zip(SIZES) {
        let _ = transport.write_common(selects[0], &index.to_le_bytes());
        let size: [u8; 2] = number(transport, register::QUEUE_SIZE);
        let entries = u16::from_le_bytes(size);
        assert!(entries.is_power_of_two() && entries <= max, "a queue of {entries} entries");
        let vector = u16::from_le_bytes(number(transport, register::QUEUE_VECTOR));
        assert!(vector == NO_VECTOR || usize::from(vector) <= SIZES.len(), "vector {vector}");
        let addresses = [0, 8, 16].map(|at| u64::from_le_bytes(number(transport, register::QUEUE_ADDRESSES + at)));
        queues.push((size, number(transport, register::QUEUE_ENABLE), addresses));
    }
    let _ = transport.write_common(selects[0], &selected);
    let _ = transport.write_common(selects[1], &half);
    let [status] = number(transport, register::STATUS);
    Seen { status, features, queues }
}

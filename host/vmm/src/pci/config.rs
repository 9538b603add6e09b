//! The configuration space of a device (PCI 3.0, chapter 6): bytes, and which of their bits the guest may change.

/// Bytes of it. The extended space of PCI Express, up to 4096, is empty.
const BYTES: usize = 256;

/// Registers of the header.
const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
/// Where capabilities may begin.
const FIRST_CAPABILITY: usize = 0x40;

/// Memory accesses are answered.
const COMMAND_MEMORY: u16 = 1 << 1;

/// What a device is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity {
    pub(super) vendor: u16,
    pub(super) device: u16,
    pub(super) subsystem: u16,
    pub(super) revision: u8,
    /// Class, subclass, programming interface.
    pub(super) class: [u8; 3],
}

/// See the module.
#[derive(Debug)]
pub(super) struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    bar_bytes: u64,
    end: usize,
    last_capability: Option<usize>,
}

impl ConfigSpace {
    /// With one 64-bit memory BAR, whose size is a power of two.
    pub(super) fn new(identity: Identity, bar_bytes: u64) -> Self {
        let mut space =
            Self { bytes: [0; BYTES], writable: [0; BYTES], bar_bytes, end: FIRST_CAPABILITY, last_capability: None };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        // There is a list of capabilities.
        space.put(0x06, &(1_u16 << 4).to_le_bytes());
        space.put(0x08, &[identity.revision]);
        let [class, subclass, interface] = identity.class;
        space.put(0x09, &[interface, subclass, class]);
        space.put(0x2c, &identity.vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        // 64-bit memory, not prefetchable.
        space.put(BAR0, &4_u32.to_le_bytes());
        space.allow(COMMAND, &(COMMAND_MEMORY | 1 << 2 | 1 << 10).to_le_bytes());
        space.allow(BAR0, &(!(bar_bytes - 1)).to_le_bytes());
        // A note of the guest's to itself: the line of an interrupt pin that is not there.
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Sets bytes, whatever the guest may.
    pub(super) fn put(&mut self, at: usize, bytes: &[u8]) {
        for (place, byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *place = *byte;
        }
    }

    /// Lets the guest change the bits that are set in `mask`.
    pub(super) fn allow(&mut self, at: usize, mask: &[u8]) {
        for (place, byte) in self.writable.iter_mut().skip(at).zip(mask) {
            *place = *byte;
        }
    }

    /// Adds a capability, without its first two bytes, which are its number and the link. Gives its place.
    pub(super) fn add_capability(&mut self, number: u8, body: &[u8]) -> usize {
        let at = self.end;
        self.put(at, &[number, 0]);
        self.put(at + 2, body);
        let link = self.last_capability.map_or(CAPABILITIES, |last| last + 1);
        self.put(link, &[u8::try_from(at).unwrap_or(0)]);
        self.last_capability = Some(at);
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Reads; past the end there are zeroes.
    pub(super) fn read(&self, at: u16, data: &mut [u8]) {
        let mut bytes = self.bytes.iter().skip(usize::from(at));
        for place in data {
            *place = bytes.next().copied().unwrap_or(0);
        }
    }

    /// The guest writes.
    pub(super) fn write(&mut self, at: u16, data: &[u8]) {
        let from = usize::from(at);
        let places = self.bytes.iter_mut().zip(&self.writable).skip(from);
        for ((place, mask), byte) in places.zip(data) {
            *place = *place & !mask | byte & mask;
        }
    }

    /// All of it.
    pub(super) fn bytes(&self) -> &[u8; BYTES] {
        &self.bytes
    }

    /// Takes what another device's was. Whether that was one of this kind: it differs in nothing but what the guest may change.
    pub(super) fn restore(&mut self, saved: &[u8]) -> bool {
        let Ok(saved) = <&[u8; BYTES]>::try_from(saved) else { return false };
        let own = self.bytes.iter().zip(&self.writable).zip(saved);
        if own.into_iter().any(|((byte, mask), saved)| (byte ^ saved) & !mask != 0) {
            return false;
        }
        self.bytes = *saved;
        true
    }

    /// Puts the BAR at an address, as firmware does.
    pub(super) fn place(&mut self, address: u64) {
        let bytes = (address | 4).to_le_bytes();
        self.put(BAR0, &bytes);
    }

    /// Where the device answers, or 0 where it does not: the guest has not enabled that, or has put the BAR nowhere.
    pub(super) fn decoded(&self) -> u64 {
        let number = |at: usize, count: usize| {
            let bytes = self.bytes.iter().skip(at).take(count).rev();
            bytes.fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let address = number(BAR0, 8) & !(self.bar_bytes - 1);
        let enabled = number(COMMAND, 2) & u64::from(COMMAND_MEMORY) != 0;
        // All ones is the guest asking for the size.
        if enabled && address.checked_add(self.bar_bytes).is_some() { address } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity { vendor: 0x1af4, device: 0x1041, subsystem: 0x1041, revision: 1, class: [2, 0, 0] };
        ConfigSpace::new(identity, 0x8000)
    }

    fn word(space: &ConfigSpace, at: u16) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_bar_tells_its_size_and_is_moved() {
        let mut space = space();
        space.place(0xc000_0000);
        assert_eq!(space.decoded(), 0, "memory is not enabled");
        space.write(4, &[2, 0]);
        assert_eq!(space.decoded(), 0xc000_0000);
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!((word(&space, 0x10), word(&space, 0x14)), (0xffff_8004, 0xffff_ffff));
        assert_eq!(space.decoded(), 0, "it would end beyond the address space");
        space.write(0x10, &0xd000_0000_u32.to_le_bytes());
        space.write(0x14, &[1, 0, 0, 0]);
        assert_eq!(space.decoded(), 0x1_d000_0000);
    }

    #[test]
    fn what_a_device_is_can_not_be_written() {
        let mut space = space();
        let before: Vec<u32> = (0..64).map(|index| word(&space, index * 4)).collect();
        for at in 0..4095 {
            if !(4..6).contains(&at) && !(0x10..0x18).contains(&at) && at != 0x3c {
                space.write(at, &[0xa5]);
            }
        }
        assert_eq!(before, (0..64).map(|index| word(&space, index * 4)).collect::<Vec<_>>());
        assert_eq!(word(&space, 4092), 0);
    }

    #[test]
    fn another_device_of_its_kind_takes_its_place() {
        let mut saved = space();
        saved.write(4, &[2, 0]);
        saved.write(0x10, &0xd000_0000_u32.to_le_bytes());
        let mut other = space();
        assert!(other.restore(saved.bytes()));
        assert_eq!((other.decoded(), other.bytes()), (0xd000_0000, saved.bytes()));
        saved.put(2, &[0x42]);
        assert!(!other.restore(saved.bytes()), "another device");
        assert!(!other.restore(&saved.bytes()[..255]));
        assert_eq!(other.decoded(), 0xd000_0000, "as it was");
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[16, 1]);
        let second = space.add_capability(0x11, &[0; 10]);
        assert_eq!((first, second), (0x40, 0x44));
        assert_eq!(word(&space, 0x34) & 0xff, 0x40);
        assert_eq!(word(&space, 0x40), 0x0110_4409);
    }
}

//! Bytes as decisions. Where they are at their end, each decision is the first and most harmless one.

/// What is left of an input.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of it.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// The next bytes, zeroes behind the end.
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| self.byte())
    }

    /// A number of two bytes.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    /// A number of four bytes.
    pub fn double(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    /// A number of eight bytes.
    pub fn quad(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// One of these.
    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::from(self.byte()) % all.len()]
    }

    /// True for so many of the 256 values of a byte.
    pub fn rare(&mut self, values: u8) -> bool {
        self.byte() > 255 - values
    }

    /// A number up to and without `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        if end <= 256 { u64::from(self.byte()) % end } else { u64::from(self.double()) % end }
    }
}

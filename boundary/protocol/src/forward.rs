//! Forwarded ports: a connection of the host's to [`crate::ports::FORWARD`] in the guest begins with the number of a TCP port,
//! two bytes, the high one first. The guest answers with one byte; after [`CONNECTED`] the connection is the port's.

/// The guest's answer where somebody listens on the port.
pub const CONNECTED: u8 = 1;

/// The guest's answer where nobody does, or the guest does not allow it.
pub const REFUSED: u8 = 0;

/// What the host says first.
#[must_use]
pub fn request(port: u16) -> [u8; 2] {
    port.to_be_bytes()
}

/// The port that the host asks for.
#[must_use]
pub fn port(request: [u8; 2]) -> u16 {
    u16::from_be_bytes(request)
}

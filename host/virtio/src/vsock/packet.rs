//! The packet header (virtio 1.3, section 5.10.6): 44 bytes, little-endian.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;

/// The most payload of one packet, in either direction, in bytes. Linux sends no more.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// The host's context identifier.
pub const HOST_CID: u64 = 2;

/// The only socket type that this device has: a stream.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Connect.
    Request = 1,
    /// Accepted.
    Response = 2,
    /// The connection is no more.
    Reset = 3,
    /// One direction, or both, are at their end.
    Shutdown = 4,
    /// Data.
    Data = 5,
    /// How much the sender can take.
    CreditUpdate = 6,
    /// The sender wants a credit update.
    CreditRequest = 7,
}

impl Op {
    fn from_wire(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// A header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Where it comes from.
    pub src_cid: u64,
    /// Where it goes.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of payload that follow.
    pub len: u32,
    /// The socket type as a number: see [`TYPE_STREAM`].
    pub kind: u16,
    /// What it is for; `None` for a number that the specification does not have.
    pub op: Option<Op>,
    /// Of [`Op::Shutdown`]: which directions.
    pub flags: u32,
    /// Bytes that the sender can buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes of this connection that the sender has taken out of its buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: Op::from_wire(u16::from_le_bytes(take(&mut rest))),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.map_or(0, |op| op as u16).to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (place, byte) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *place = *byte;
        }
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (first, others) = rest.split_first_chunk().unwrap_or((&[0; N], &[]));
    *rest = others;
    *first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let mut bytes = [0; HEADER_BYTES];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(index).unwrap();
        }
        bytes[30..32].copy_from_slice(&5_u16.to_le_bytes());
        let header = Header::decode(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, u32::from_le_bytes([20, 21, 22, 23]));
        assert_eq!(header.op, Some(Op::Data));
        assert_eq!(header.fwd_cnt, u32::from_le_bytes([40, 41, 42, 43]));
        assert_eq!(header.encode(), bytes);
    }

    #[test]
    fn an_unknown_operation_is_none() {
        assert_eq!(Op::from_wire(0), None);
        assert_eq!(Op::from_wire(8), None);
    }
}

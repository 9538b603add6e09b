//! Between the queues and the muxer. Chains may have any layout: header and payload in one descriptor or in fifty.

use std::io::{Read, Write};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::muxer::Muxer;
use crate::device::Counters;

use super::packet::{HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};

/// Why a queue can't be used any more: the guest has written nonsense into it.
#[derive(Debug, thiserror::Error)]
#[error("the guest's queue is not usable: {0}")]
pub struct QueueError(String);

impl From<virtio_queue::Error> for QueueError {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

/// The device.
#[derive(Debug)]
pub struct Device {
    muxer: Muxer,
    /// One packet's payload on its way.
    buffer: Vec<u8>,
    counters: Counters,
}

impl Device {
    /// A device over `muxer`.
    #[must_use]
    pub fn new(muxer: Muxer) -> Self {
        Self { muxer, buffer: vec![0; PAYLOAD_BYTES_MAX], counters: Counters::default() }
    }

    /// The connections.
    pub fn muxer(&mut self) -> &mut Muxer {
        &mut self.muxer
    }

    /// The descriptor that is readable when the host's side has something.
    #[must_use]
    pub fn epoll(&self) -> std::os::fd::BorrowedFd<'_> {
        self.muxer.epoll()
    }

    /// What has passed.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The guest's context identifier, which the device's configuration space holds.
    #[must_use]
    pub fn guest_cid(&self) -> u64 {
        self.muxer.guest_cid()
    }

    /// Reads the guest's packets from its tx queue. True where the guest wants to be told of used buffers.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn process_tx(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let mut used = false;
        while self.muxer.accepts() {
            // Not `pop_descriptor_chain`, which hides a ring that is nonsense: the guest could keep this turning.
            let Some(chain) = queue.iter(memory)?.next() else { break };
            let head = chain.head_index();
            match chain.reader(memory) {
                Ok(mut reader) => {
                    if self.take_packet(&mut reader) {
                        self.counters.operations_out += 1;
                        self.counters.bytes_out += reader.bytes_read() as u64;
                    } else {
                        self.counters.errors += 1;
                    }
                }
                Err(error) => {
                    log::warn!("vsock: a packet that can't be read is dropped: {error}");
                    self.counters.errors += 1;
                }
            }
            queue.add_used(memory, head, 0)?;
            used = true;
        }
        Ok(used && queue.needs_notification(memory)?)
    }

    /// True where it was one.
    fn take_packet(&mut self, reader: &mut impl Read) -> bool {
        let mut bytes = [0; HEADER_BYTES];
        if reader.read_exact(&mut bytes).is_err() {
            log::warn!("vsock: a packet without a whole header is dropped");
            return false;
        }
        let header = Header::decode(&bytes);
        let length = header.len as usize;
        let Some(payload) = self.buffer.get_mut(..length) else {
            log::warn!("vsock: a packet of {length} bytes is dropped");
            return false;
        };
        if reader.read_exact(payload).is_err() {
            log::warn!("vsock: a packet that is shorter than it says is dropped");
            return false;
        }
        self.muxer.receive(&header, payload);
        true
    }

    /// Fills the guest's rx queue. True where the guest wants to be told of used buffers.
    ///
    /// # Errors
    /// [`QueueError`].
    pub fn process_rx(&mut self, queue: &mut Queue, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let mut used = false;
        while self.muxer.has_pending() {
            let Some(chain) = queue.iter(memory)?.next() else { break };
            let head = chain.head_index();
            let written = match chain.writer(memory) {
                Ok(mut writer) if writer.available_bytes() > HEADER_BYTES => {
                    let room = (writer.available_bytes() - HEADER_BYTES).min(self.buffer.len());
                    let packet = self.buffer.get_mut(..room).and_then(|buffer| self.muxer.next(buffer));
                    let Some((header, length)) = packet else {
                        // Nothing after all: the buffers stay the guest's offer.
                        queue.go_to_previous_position();
                        break;
                    };
                    let payload = self.buffer.get(..length).unwrap_or_default();
                    let result = writer.write_all(&header.encode()).and_then(|()| writer.write_all(payload));
                    if let Err(error) = result {
                        log::warn!("vsock: the guest's buffers take less than they have: {error}");
                    }
                    self.counters.operations_in += 1;
                    self.counters.bytes_in += writer.bytes_written() as u64;
                    writer.bytes_written()
                }
                Ok(_) => 0,
                Err(error) => {
                    log::warn!("vsock: buffers that can't be written are given back: {error}");
                    0
                }
            };
            queue.add_used(memory, head, u32::try_from(written).unwrap_or(0))?;
            used = true;
        }
        Ok(used && queue.needs_notification(memory)?)
    }
}

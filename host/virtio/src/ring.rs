//! A queue of a device that runs: the ring in guest memory, the doorbell, and the interrupt.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::device::{Broken, Memory};

/// `VIRTIO_MSI_NO_VECTOR` (virtio 1.3, section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// A chain of descriptors that the guest has made available.
pub type Chain = DescriptorChain<Arc<GuestMemoryMmap>>;

/// A device's interrupts: one descriptor a vector, and who uses which. The transport sets the vectors, the device signals.
#[derive(Debug)]
pub struct Interrupts {
    vectors: Vec<EventFd>,
    queues: Vec<AtomicU16>,
    config: AtomicU16,
}

impl Interrupts {
    /// Over the descriptors of the vectors, for so many queues. Nobody has a vector at first.
    #[must_use]
    pub fn new(vectors: Vec<EventFd>, queues: usize) -> Self {
        let none = || AtomicU16::new(NO_VECTOR);
        Self { vectors, queues: std::iter::repeat_with(none).take(queues).collect(), config: none() }
    }

    /// How many vectors there are.
    #[must_use]
    pub fn vectors(&self) -> &[EventFd] {
        &self.vectors
    }

    /// Gives a queue, or the configuration (`None`), a vector. One that does not exist is [`NO_VECTOR`].
    pub fn set(&self, queue: Option<u16>, vector: u16) {
        let vector = if usize::from(vector) < self.vectors.len() { vector } else { NO_VECTOR };
        if let Some(place) = self.place(queue) {
            place.store(vector, Ordering::Release);
        }
    }

    /// The vector of a queue or of the configuration.
    #[must_use]
    pub fn get(&self, queue: Option<u16>) -> u16 {
        self.place(queue).map_or(NO_VECTOR, |place| place.load(Ordering::Acquire))
    }

    fn place(&self, queue: Option<u16>) -> Option<&AtomicU16> {
        match queue {
            Some(queue) => self.queues.get(usize::from(queue)),
            None => Some(&self.config),
        }
    }

    /// The descriptor that interrupts for a queue or for the configuration.
    #[must_use]
    pub fn descriptor(&self, queue: Option<u16>) -> Option<&EventFd> {
        self.vectors.get(usize::from(self.get(queue)))
    }

    /// Interrupts the guest.
    pub fn signal(&self, queue: Option<u16>) {
        if let Some(vector) = self.descriptor(queue) {
            // An eventfd refuses a write only where 2^64 - 2 signals wait already.
            let _ = vector.write(1);
        }
    }
}

/// The descriptor of an eventfd, whose type gives its number only.
#[must_use]
pub fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the eventfd's own, and open for as long as that is borrowed here.
    #[expect(unsafe_code, reason = "the type gives its number only")]
    let fd = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    fd
}

/// See the module.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    memory: Memory,
    interrupts: Arc<Interrupts>,
    doorbell: EventFd,
    event_idx: bool,
    /// The index of what was given back, as it was when the guest was last asked whether it wants to hear.
    told: u16,
}

impl Ring {
    /// A ring over a queue that the driver has set up.
    ///
    /// # Errors
    /// [`Broken`] where the ring does not lie in the guest's memory.
    pub fn new(
        index: u16,
        queue: Queue,
        memory: Memory,
        interrupts: Arc<Interrupts>,
        doorbell: EventFd,
    ) -> Result<Self, Broken> {
        if !queue.is_valid(&*memory.memory()) {
            return Err(Broken(format!("queue {index} does not lie in the guest's memory")));
        }
        let event_idx = queue.event_idx_enabled();
        let told = queue.next_used();
        Ok(Self { index, queue, memory, interrupts, doorbell, event_idx, told })
    }

    /// The next chain, or `None` where the guest has made none available.
    ///
    /// # Errors
    /// [`Broken`] where the ring's indices are nonsense.
    pub fn pop(&mut self) -> Result<Option<Chain>, Broken> {
        let index = self.queue.avail_idx(&*self.memory.memory(), Ordering::Acquire)?;
        if index.0 == self.queue.next_avail() {
            return Ok(None);
        }
        // Only now the memory for the chain: what the guest has made available may lie in what it has just been given.
        // Not `pop_descriptor_chain`, which hides a ring that is nonsense: the guest could keep a device turning.
        Ok(self.queue.iter(self.memory.memory().into_inner())?.next())
    }

    /// Puts the chain that was popped last back: the next pop gives it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back, with the number of bytes that were written into it.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        Ok(self.queue.add_used(&*self.memory.memory(), head, written)?)
    }

    /// Gives chains back at once, with the number of bytes that were written into each: the guest sees all of them or none.
    /// A driver that looks while a packet's buffers come one by one takes the packet for a broken one.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn push_all(&mut self, chains: &[(u16, u32)]) -> Result<(), Broken> {
        let Some(((head, written), before)) = chains.split_last() else { return Ok(()) };
        let memory = self.memory.memory();
        let mut next = self.queue.next_used();
        for (head, written) in before {
            // The ring of entries of eight bytes begins behind flags and index (virtio 1.3, section 2.7.8). It lies in the
            // guest's memory, which `new` has seen to, so the sum is one of its addresses.
            let place = u64::from(next.checked_rem(self.queue.size()).unwrap_or(0));
            let entry = u64::from(*head) | u64::from(*written) << 32;
            let address = self.queue.used_ring().saturating_add(4 + 8 * place);
            memory
                .write_slice(&entry.to_le_bytes(), GuestAddress(address))
                .map_err(|error| Broken(error.to_string()))?;
            next = next.wrapping_add(1);
        }
        // The last one's index makes those before it visible too.
        self.queue.set_next_used(next);
        Ok(self.queue.add_used(&*memory, *head, *written)?)
    }

    /// Interrupts the guest, if it wants to hear of the chains that were given back.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn signal(&mut self) -> Result<(), Broken> {
        if self.wants_interrupt()? {
            self.interrupts.signal(Some(self.index));
        }
        Ok(())
    }

    /// Not the queue's `needs_notification`, which does not know of what [`Self::push_all`] gives back.
    fn wants_interrupt(&mut self) -> Result<bool, Broken> {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.told, new);
        if !self.event_idx {
            return Ok(true);
        }
        // The index of what was given back is written before the guest's wish is read: it writes its wish, then looks.
        fence(Ordering::SeqCst);
        let address = self.queue.avail_ring().saturating_add(4 + 2 * u64::from(self.queue.size()));
        let wish: u16 = self
            .memory
            .memory()
            .load(GuestAddress(address), Ordering::Relaxed)
            .map_err(|error| Broken(error.to_string()))?;
        // Whether the wished index is among those from `old` on, `new` left out (virtio 1.3, section 2.7.7.2).
        Ok(new.wrapping_sub(u16::from_le(wish)).wrapping_sub(1) < new.wrapping_sub(old))
    }

    /// Interrupts the guest, for devices that have asked the queue themselves whether it wants that.
    pub fn interrupt_now(&self) {
        self.interrupts.signal(Some(self.index));
    }

    /// Asks the guest to ring the doorbell for what it makes available from now on. True where it has made something
    /// available meanwhile, which it does not ring for.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn listen(&mut self) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(&*self.memory.memory())?)
    }

    /// Asks the guest not to ring while the device is looking anyway.
    ///
    /// # Errors
    /// [`Broken`].
    pub fn hush(&mut self) -> Result<(), Broken> {
        if self.event_idx {
            self.queue.disable_notification(&*self.memory.memory())?;
        }
        Ok(())
    }

    /// The ring's entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Size and addresses, for a process that serves the ring in this one's stead.
    #[must_use]
    pub fn registers(&self) -> virtio_queue::QueueState {
        self.queue.state()
    }

    /// The queue itself, for devices that walk it themselves.
    pub fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// The guest's memory now.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestMemoryMmap> {
        self.memory.memory().into_inner()
    }

    /// The doorbell.
    #[must_use]
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    /// The descriptor that interrupts the guest for this queue.
    #[must_use]
    pub fn interrupt(&self) -> Option<&EventFd> {
        self.interrupts.descriptor(Some(self.index))
    }
}

#[cfg(test)]
mod tests {
    use crate::driver::{Driver, memory};

    #[test]
    fn chains_are_given_back_together_across_the_rings_end() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 4);
        let mut ring = driver.ring(true);
        driver.want_interrupt_after(2);
        ring.push_all(&[]).unwrap();
        ring.push_all(&[(3, 30), (2, 20)]).unwrap();
        assert_eq!(driver.used(), [(3, 30), (2, 20)]);
        ring.signal().unwrap();
        assert!(!driver.interrupted(), "the guest waits for the third");
        ring.push_all(&[(1, 10), (0, 5), (3, 1), (2, 7)]).unwrap();
        assert_eq!(driver.used(), [(1, 10), (0, 5), (3, 1), (2, 7)]);
        ring.signal().unwrap();
        assert!(driver.interrupted(), "the third was among them, though not the last");
        ring.push(1, 1).unwrap();
        ring.signal().unwrap();
        assert!(!driver.interrupted(), "that wish was fulfilled");
        assert!(ring.push_all(&[(1, 1), (4, 1)]).is_err(), "there is no such descriptor");
    }

    #[test]
    fn wishes_are_kept_where_the_index_wraps() {
        let memory = memory();
        let mut driver = Driver::new(&memory, 0, 4);
        let mut ring = driver.ring(true);
        let mut heard = Vec::new();
        driver.want_interrupt_after(65535);
        for round in 0..65536_u32 + 8 {
            ring.push(0, 0).unwrap();
            ring.signal().unwrap();
            driver.used();
            if driver.interrupted() {
                heard.push(round);
                driver.want_interrupt_after(3);
            }
        }
        assert_eq!(heard, [65535, 65536 + 3]);
    }
}

//! The guest's memory as its devices of the host's reach it: all that the guest has, and none that it has given back.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::Iommu;

/// See the module.
pub(crate) struct Reach {
    memory: GuestMemoryMmap,
    /// The memory device tells of what comes and goes, the control channel of devices; both on the main thread.
    state: Mutex<State>,
    /// How many address spaces there are: while there is one, the guest's memory must stay where it is.
    held: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    spaces: Vec<Weak<Space>>,
    /// Parts of the memory that the guest has: its address and its bytes.
    parts: BTreeMap<u64, u64>,
}

/// What some devices reach; there as long as one of them is.
pub(crate) struct Space {
    iommu: Iommu,
    held: Arc<AtomicUsize>,
}

impl Drop for Space {
    fn drop(&mut self) {
        self.held.fetch_sub(1, Ordering::Release);
    }
}

impl State {
    /// The address spaces that are there still.
    fn spaces(&mut self) -> Vec<Arc<Space>> {
        self.spaces.retain(|space| space.strong_count() > 0);
        self.spaces.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Reach {
    /// Of `memory`, of which the guest has `ram` from its start.
    pub(crate) fn new(memory: GuestMemoryMmap, ram: &GuestMemoryMmap) -> Self {
        let parts = ram.iter().map(|region| (region.start_addr().0, region.len())).collect();
        let state = State { spaces: Vec::new(), parts };
        Self { memory, state: Mutex::new(state), held: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many need the guest's memory where it is.
    pub(crate) fn held(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.held)
    }

    /// The address space of the devices of a kind.
    pub(crate) fn space(&self, by_iommufd: bool) -> Option<Arc<Space>> {
        self.state().spaces().into_iter().rfind(|space| matches!(space.iommu, Iommu::Iommufd(..)) == by_iommufd)
    }

    /// Another address space, from which all that the guest has is reached.
    pub(crate) fn add(&self, iommu: Iommu) -> io::Result<Arc<Space>> {
        self.held.fetch_add(1, Ordering::Release);
        // What is mapped of it goes with it, where not all can be.
        let space = Arc::new(Space { iommu, held: Arc::clone(&self.held) });
        let mut state = self.state();
        for (start, bytes) in &state.parts {
            self.map(&space.iommu, *start, *bytes)?;
        }
        state.spaces.push(Arc::downgrade(&space));
        Ok(space)
    }

    /// The guest has another part of its memory.
    pub(crate) fn gain(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        let spaces = state.spaces();
        for (done, space) in spaces.iter().enumerate() {
            if let Err(error) = self.map(&space.iommu, start, bytes) {
                for other in spaces.iter().take(done) {
                    let _ = other.iommu.unmap(start, bytes);
                }
                return Err(error);
            }
        }
        state.parts.insert(start, bytes);
        Ok(())
    }

    /// It has given a part back, as it has got it.
    pub(crate) fn lose(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        state.parts.remove(&start);
        state.spaces().iter().try_for_each(|space| space.iommu.unmap(start, bytes))
    }

    fn map(&self, iommu: &Iommu, start: u64, bytes: u64) -> io::Result<()> {
        let region = self.memory.find_region(GuestAddress(start)).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = start - region.start_addr().0;
        if offset.checked_add(bytes).is_none_or(|end| end > region.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let place = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
        iommu.map(start, place.addr() as u64, bytes)
    }
}

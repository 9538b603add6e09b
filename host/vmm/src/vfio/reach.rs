//! The guest's memory as its devices of the host's reach it: all that the guest has, and none that it has given back.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::iommu::Maps;

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
    iommu: Box<dyn Maps>,
    by_iommufd: bool,
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

    /// Parts of the memory that the guest has: each one's address and bytes.
    pub(crate) fn parts(&self) -> Vec<(u64, u64)> {
        self.state().parts.iter().map(|(start, bytes)| (*start, *bytes)).collect()
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
        self.state().spaces().into_iter().rfind(|space| space.by_iommufd == by_iommufd)
    }

    /// Another address space, from which all that the guest has is reached.
    pub(crate) fn add(&self, iommu: Box<dyn Maps>, by_iommufd: bool) -> io::Result<Arc<Space>> {
        self.held.fetch_add(1, Ordering::Release);
        // What is mapped of it goes with it, where not all can be.
        let space = Arc::new(Space { iommu, by_iommufd, held: Arc::clone(&self.held) });
        let mut state = self.state();
        for (start, bytes) in &state.parts {
            self.map(&*space.iommu, *start, *bytes)?;
        }
        state.spaces.push(Arc::downgrade(&space));
        Ok(space)
    }

    /// The guest has another part of its memory.
    pub(crate) fn gain(&self, start: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.state();
        let spaces = state.spaces();
        for (done, space) in spaces.iter().enumerate() {
            if let Err(error) = self.map(&*space.iommu, start, bytes) {
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
        let spaces = state.spaces();
        for (done, space) in spaces.iter().enumerate() {
            if let Err(error) = space.iommu.unmap(start, bytes) {
                for other in spaces.iter().take(done) {
                    let _ = self.map(&*other.iommu, start, bytes);
                }
                return Err(error);
            }
        }
        state.parts.remove(&start);
        Ok(())
    }

    fn map(&self, iommu: &dyn Maps, start: u64, bytes: u64) -> io::Result<()> {
        let region = self.memory.find_region(GuestAddress(start)).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = start - region.start_addr().0;
        if offset.checked_add(bytes).is_none_or(|end| end > region.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let place = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
        iommu.map(start, place.addr() as u64, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An address space that notes what is mapped, and refuses one address.
    #[derive(Clone, Default)]
    struct Noted {
        mapped: Arc<Mutex<BTreeMap<u64, u64>>>,
        refused: Option<u64>,
    }

    impl Maps for Noted {
        fn map(&self, start: u64, _: u64, bytes: u64) -> io::Result<()> {
            if self.refused == Some(start) {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            assert!(self.mapped.lock().unwrap().insert(start, bytes).is_none(), "mapped twice");
            Ok(())
        }

        fn unmap(&self, start: u64, bytes: u64) -> io::Result<()> {
            if self.refused == Some(start) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            assert_eq!(self.mapped.lock().unwrap().remove(&start), Some(bytes));
            Ok(())
        }
    }

    const MIB: u64 = 1 << 20;

    fn reach() -> Reach {
        let ram = [(GuestAddress(0), MIB as usize)];
        let all = [ram[0], (GuestAddress(4 * MIB), 4 * MIB as usize)];
        let map = |ranges: &[_]| GuestMemoryMmap::from_ranges(ranges).unwrap();
        Reach::new(map(&all), &map(&ram))
    }

    fn parts(space: &Noted) -> Vec<(u64, u64)> {
        space.mapped.lock().unwrap().iter().map(|(start, bytes)| (start / MIB, bytes / MIB)).collect()
    }

    #[test]
    fn devices_reach_what_the_guest_has() {
        let (reach, early, late) = (reach(), Noted::default(), Noted::default());
        let first = reach.add(Box::new(early.clone()), false).unwrap();
        reach.gain(5 * MIB, MIB).unwrap();
        let second = reach.add(Box::new(late.clone()), true).unwrap();
        for space in [&early, &late] {
            assert_eq!(parts(space), [(0, 1), (5, 1)]);
        }
        assert_eq!(reach.held().load(Ordering::Relaxed), 2);
        assert!(reach.space(false).is_some_and(|space| Arc::ptr_eq(&space, &first)));
        drop(second);
        assert!(reach.space(true).is_none());
        reach.lose(5 * MIB, MIB).unwrap();
        assert_eq!((parts(&early), parts(&late)), (vec![(0, 1)], vec![(0, 1), (5, 1)]), "who has gone is not asked");
        assert_eq!(reach.held().load(Ordering::Relaxed), 1);
        assert!(reach.gain(7 * MIB, 2 * MIB).is_err(), "beyond the end");
        assert!(reach.gain(2 * MIB, MIB).is_err(), "between");
    }

    #[test]
    fn what_one_refuses_no_other_keeps() {
        let (reach, willing) = (reach(), Noted::default());
        let refusing = Noted { refused: Some(6 * MIB), ..Noted::default() };
        let _spaces = [
            reach.add(Box::new(willing.clone()), false).unwrap(),
            reach.add(Box::new(refusing.clone()), false).unwrap(),
        ];
        assert!(reach.gain(6 * MIB, MIB).is_err());
        assert_eq!(parts(&willing), [(0, 1)]);
        willing.map(6 * MIB, 0, MIB).unwrap();
        assert!(reach.lose(6 * MIB, MIB).is_err());
        assert_eq!(parts(&willing), [(0, 1), (6, 1)], "it stays the guest's");
        let full = Noted { refused: Some(0), ..Noted::default() };
        assert!(reach.add(Box::new(full), false).is_err());
        assert_eq!(reach.held().load(Ordering::Relaxed), 2);
    }
}

//! Files of the host's that are memory of the guest's, from its start (virtio-pmem). All machines that have a file so read the same pages of
//! the host's, and none of them keeps a copy.
//!
//! What a guest writes there goes nowhere: KVM has the memory as read-only, and the write comes here as one to no device. A device that a guest
//! has write there writes into a copy that is this machine's alone: the mapping is private. Behind the end of a file are zeros up to the end
//! of its last [`UNIT_BYTES`]; a file must not become shorter while the machine is there, which would end it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::sync::Arc;

use coracle_monitor_api as api;
use kvm_bindings::KVM_MEM_READONLY;
use kvm_ioctls::VmFd;
use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::Error;
use crate::devices::Descriptors;
use crate::memory;

/// The unit in which a guest's kernel takes such memory (Linux: `PAGES_PER_SUBSECTION`).
const UNIT_BYTES: u64 = 2 << 20;
/// More than any host has of images; it keeps sums of addresses in their range.
const BYTES_MAX: u64 = 1 << 44;

/// The files of a machine.
#[derive(Debug, Default)]
pub(crate) struct Files {
    regions: Vec<Arc<GuestRegionMmap>>,
    /// Where each is, and its bytes, by its descriptor's number in the description.
    places: BTreeMap<i32, (u64, u64)>,
}

impl Files {
    /// Maps those among the devices, one behind the other from `start` on, a multiple of [`UNIT_BYTES`].
    pub(crate) fn map(devices: &[api::Device], start: u64, from: &mut Descriptors) -> Result<Self, Error> {
        let mut files = Self::default();
        for device in devices {
            let api::Device::Pmem { file_fd } = device else { continue };
            let failed = Error::system("map a file as the guest's memory");
            let (region, bytes) = private_region(from.take(*file_fd)?.into()).map_err(failed)?;
            let place = start + files.bytes();
            if files.bytes() + bytes > BYTES_MAX {
                return Err(Error::Invalid("files as memory are too large".into()));
            }
            let region = GuestRegionMmap::new(region, GuestAddress(place));
            let region = region.ok_or_else(|| Error::Invalid("memory beyond the end of the address space".into()))?;
            files.regions.push(Arc::new(region));
            files.places.insert(*file_fd, (place, bytes));
        }
        Ok(files)
    }

    /// The bytes of all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.places.values().map(|(_, bytes)| bytes).sum()
    }

    /// Where the file of this descriptor is, and its bytes. None of one that the machine has not from its start.
    pub(crate) fn place(&self, file_fd: i32) -> Option<(u64, u64)> {
        self.places.get(&file_fd).copied()
    }

    /// The guest's memory with these behind it, as its devices reach it.
    pub(crate) fn behind(&self, memory: &GuestMemoryMmap) -> Result<GuestMemoryMmap, Error> {
        let insert = |memory: GuestMemoryMmap, region: &Arc<GuestRegionMmap>| memory.insert_region(Arc::clone(region));
        let all = self.regions.iter().try_fold(memory.clone(), insert);
        all.map_err(|error| Error::Invalid(error.to_string()))
    }

    /// Gives them to the guest, under these numbers of KVM's and no more of them.
    pub(crate) fn give(&self, vm: &VmFd, numbers: std::ops::Range<u32>) -> Result<(), Error> {
        let mut numbers = numbers;
        for region in &self.regions {
            let slot = numbers.next().ok_or_else(|| Error::Invalid("too many files as memory".into()))?;
            memory::give(vm, region, slot, KVM_MEM_READONLY)?;
        }
        Ok(())
    }
}

/// The file, and zeros behind it up to the end of its last unit; how many bytes that are.
fn private_region(mut file: File) -> io::Result<(MmapRegion, u64)> {
    // A block device's size is where its end is.
    let length = file.seek(SeekFrom::End(0))?;
    if length == 0 || length > BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it has {length} bytes")));
    }
    let bytes = length.next_multiple_of(UNIT_BYTES);
    let (length, size) = (usize::try_from(length), usize::try_from(bytes));
    let (length, size) = (length.map_err(io::Error::other)?, size.map_err(io::Error::other)?);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let region =
        MmapRegion::build(None, size, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    let region = region.map_err(io::Error::other)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: `length` bytes from the region's start are in the mapping above, which nobody uses yet; the region goes on to own them.
    #[expect(unsafe_code, reason = "mappings are unsafe by declaration")]
    unsafe {
        rustix::mm::mmap(region.as_ptr().cast(), length, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)?;
    }
    Ok((region, bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::OwnedFd;

    use vm_memory::Bytes;

    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn map(files: &[&File]) -> Result<Files, Error> {
        let received = files.iter().map(|file| Some(OwnedFd::from(file.try_clone().unwrap())));
        let mut from = Descriptors::Received(received.collect());
        let devices: Vec<_> = (0..).take(files.len()).map(|file_fd| api::Device::Pmem { file_fd }).collect();
        Files::map(&devices, 4 << 30, &mut from)
    }

    #[test]
    fn files_lie_one_behind_the_other_with_zeros_behind_each() {
        let (one, other) = (file(&[7; 5000]), file(&vec![9; (2 << 20) + 1]));
        let files = map(&[&one, &other]).unwrap();
        let at = 4 << 30;
        assert_eq!([0, 1, 2].map(|fd| files.place(fd)), [Some((at, 2 << 20)), Some((at + (2 << 20), 4 << 20)), None]);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let memory = files.behind(&memory).unwrap();
        let byte = |place: u64| memory.read_obj::<u8>(GuestAddress(place)).unwrap();
        assert_eq!(
            [at + 4999, at + 5000, at + (2 << 20) - 1, at + (4 << 20), at + (6 << 20) - 1].map(byte),
            [7, 0, 0, 9, 0]
        );
        assert!(memory.read_obj::<u8>(GuestAddress(at + (6 << 20))).is_err());
    }

    #[test]
    fn what_a_device_writes_is_this_machines_alone() {
        let file = file(&[7; 8192]);
        let (one, other) = (map(&[&file]).unwrap(), map(&[&file]).unwrap());
        let none = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let (one, other) = (one.behind(&none).unwrap(), other.behind(&none).unwrap());
        one.write_obj(9_u8, GuestAddress(4 << 30)).unwrap();
        assert_eq!(one.read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), 9);
        assert_eq!(other.read_obj::<u8>(GuestAddress(4 << 30)).unwrap(), 7);
        let mut bytes = [0; 1];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [7]);
    }

    #[test]
    fn an_empty_file_is_no_memory() {
        assert!(map(&[&file(&[])]).is_err());
        let socket = std::os::unix::net::UnixStream::pair().unwrap().0;
        let devices = [api::Device::Pmem { file_fd: 0 }];
        assert!(Files::map(&devices, 0, &mut Descriptors::Received(vec![Some(socket.into())])).is_err());
    }
}

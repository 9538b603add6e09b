//! Device mapper: a device made of others by a table (Linux: include/uapi/linux/dm-ioctl.h).

use std::fs::File;
use std::os::fd::AsRawFd;

use crate::{Error, Result};

/// The kernel's control device.
const CONTROL: &str = "/dev/mapper/control";

/// `struct dm_ioctl`'s size, and where its parts lie: the version, the size of all, where the data begins, the number of targets,
/// flags, the device's number, its name.
const HEADER: usize = 312;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGETS: usize = 20;
const FLAGS: usize = 28;
const NUMBER: usize = 40;
const NAME: usize = 48;
const NAME_BYTES: usize = 128;
/// `struct dm_target_spec`'s size without its parameters.
const TARGET: usize = 40;

/// Requests: `_IOWR(0xfd, n, struct dm_ioctl)`.
const fn request(number: u64) -> u64 {
    3 << 30 | (HEADER as u64) << 16 | 0xfd << 8 | number
}
const CREATE: u64 = request(3);
const REMOVE: u64 = request(4);
/// Without [`SUSPEND`] in its flags it goes on.
const RESUME: u64 = request(6);
const LOAD: u64 = request(9);

const READ_ONLY: u32 = 1;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// A device that was made.
#[derive(Debug)]
pub(super) struct Device {
    name: String,
    minor: u32,
}

impl Device {
    /// Its device file.
    pub(super) fn path(&self) -> String {
        format!("/dev/dm-{}", self.minor)
    }

    /// Removes it as soon as nobody has it open.
    pub(super) fn remove_when_unused(self) {
        if let Ok(control) = File::open(CONTROL) {
            let _ = ask(&control, REMOVE, &self.name, DEFERRED_REMOVE, &[]);
        }
    }
}

/// Makes the read-only device `name` of `sectors` sectors, of one target of the type `kind` with `parameters`.
pub(super) fn create(name: &str, sectors: u64, kind: &str, parameters: &str) -> Result<Device> {
    let failed = |step: &str| Error::system::<std::io::Error>(format!("{step} the device {name} ({kind})"));
    let control = File::open(CONTROL).map_err(failed("open the control device for"))?;
    let number = ask(&control, CREATE, name, 0, &[]).map_err(failed("make"))?;
    // The number is the kernel's huge_encode_dev: the minor's lower 8 bits, 12 of the major, the rest of the minor.
    let minor = (number & 0xff) | (number >> 12 & 0xffff_ff00);
    let device = Device { name: name.to_owned(), minor: u32::try_from(minor).unwrap_or(u32::MAX) };
    let loaded = ask(&control, LOAD, name, READ_ONLY, &target(sectors, kind, parameters))
        .map_err(failed("describe"))
        .and_then(|_| ask(&control, RESUME, name, 0, &[]).map_err(failed("start")));
    match loaded {
        Ok(_) => Ok(device),
        Err(error) => {
            device.remove_when_unused();
            Err(error)
        }
    }
}

/// `struct dm_target_spec` with its parameters.
fn target(sectors: u64, kind: &str, parameters: &str) -> Vec<u8> {
    let mut bytes = vec![0; TARGET];
    put(&mut bytes, 8, &sectors.to_ne_bytes());
    put(&mut bytes, 24, kind.as_bytes());
    bytes.extend(parameters.as_bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let size = u32::try_from(bytes.len()).unwrap_or(0);
    put(&mut bytes, 20, &size.to_ne_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// Asks the kernel, and gives the device's number.
fn ask(control: &File, request: u64, name: &str, flags: u32, data: &[u8]) -> std::io::Result<u64> {
    if name.len() >= NAME_BYTES {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = vec![0; HEADER];
    bytes.extend(data);
    let size = u32::try_from(bytes.len()).map_err(std::io::Error::other)?;
    put(&mut bytes, 0, &4_u32.to_ne_bytes());
    put(&mut bytes, DATA_SIZE, &size.to_ne_bytes());
    put(&mut bytes, DATA_START, &u32::try_from(HEADER).unwrap_or(0).to_ne_bytes());
    put(&mut bytes, TARGETS, &u32::from(!data.is_empty()).to_ne_bytes());
    put(&mut bytes, FLAGS, &flags.to_ne_bytes());
    put(&mut bytes, NAME, name.as_bytes());
    // SAFETY: the buffer lives through the call and is as long as its own `data_size` says, which bounds what the kernel reads
    // and writes of it.
    #[expect(unsafe_code, reason = "ioctl")]
    let result = unsafe { libc::ioctl(control.as_raw_fd(), request as libc::Ioctl, bytes.as_mut_ptr()) };
    if result < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let number = bytes.get(NUMBER..NUMBER + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_ne_bytes);
    number.ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_kernels() {
        // As `strace` shows them of dmsetup 1.02.185.
        assert_eq!((CREATE, LOAD), (0xc138_fd03, 0xc138_fd09));
    }

    #[test]
    fn a_target_is_as_long_as_it_says() {
        let bytes = target(16, "verity", "1 2 3");
        assert_eq!(bytes.len(), 48);
        assert_eq!(&bytes[8..16], &16_u64.to_ne_bytes());
        assert_eq!(&bytes[20..24], &48_u32.to_ne_bytes());
        assert_eq!(&bytes[24..31], b"verity\0");
        assert_eq!(&bytes[40..46], b"1 2 3\0");
    }
}

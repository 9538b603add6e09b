//! Device nodes and links of `/dev` (runtime-spec, config-linux.md, "Default Devices" and "Default symbolic links").

use std::os::fd::BorrowedFd;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceType, Spec};
use rustix::fs::{FileType, Mode, makedev};
use rustix::io::Errno;

use crate::error::Step;
use crate::mount::directory_in;
use crate::{Error, Result};

/// Name, major and minor of the devices that every container has.
const DEFAULT: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Makes the devices below `root`. A `/dev` that is no mount of the container's own is left as the image has it.
pub(crate) fn create(root: BorrowedFd<'_>, spec: &Spec, terminal: bool) -> Result<()> {
    let own_dev = spec.mounts().iter().flatten().any(|mount| mount.destination() == Path::new("/dev"));
    if own_dev {
        let dev = directory_in(root, Path::new("/dev"))?;
        for (name, major, minor) in DEFAULT {
            node(&dev, name.as_ref(), FileType::CharacterDevice, 0o666, (major, minor))?;
        }
        for (target, name) in LINKS {
            match rustix::fs::symlinkat(target, &dev, name) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno).step(|| format!("link /dev/{name}")),
            }
        }
        if terminal {
            // A place for the terminal's bind mount.
            match rustix::fs::mknodat(&dev, "console", FileType::RegularFile, Mode::from_raw_mode(0o600), 0) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno).step(|| "make /dev/console".into()),
            }
        }
    }
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    for device in devices.into_iter().flatten() {
        let (Some(parent), Some(name)) = (device.path().parent(), device.path().file_name()) else {
            return Err(Error::Invalid(format!("{} is no place for a device", device.path().display())));
        };
        let kind = match device.typ() {
            LinuxDeviceType::B => FileType::BlockDevice,
            LinuxDeviceType::P => FileType::Fifo,
            _ => FileType::CharacterDevice,
        };
        let number = |value: i64| {
            u32::try_from(value).map_err(|_| Error::Invalid(format!("{}: bad number", device.path().display())))
        };
        let parent = directory_in(root, parent)?;
        let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
        node(&parent, Path::new(name), kind, mode, (number(device.major())?, number(device.minor())?))?;
        let owner = device.uid().map(rustix::fs::Uid::from_raw);
        let group = device.gid().map(rustix::fs::Gid::from_raw);
        rustix::fs::chownat(&parent, name, owner, group, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)
            .step(|| format!("own {}", device.path().display()))?;
    }
    Ok(())
}

fn node(parent: &std::os::fd::OwnedFd, name: &Path, kind: FileType, mode: u32, number: (u32, u32)) -> Result<()> {
    let step = || format!("make the device {}", name.display());
    match rustix::fs::mknodat(parent, name, kind, Mode::from_raw_mode(mode), makedev(number.0, number.1)) {
        // The mode of mknod is cut by the umask.
        Ok(()) => rustix::fs::chmodat(parent, name, Mode::from_raw_mode(mode), rustix::fs::AtFlags::empty()).step(step),
        Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno).step(step),
    }
}

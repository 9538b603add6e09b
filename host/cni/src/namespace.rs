//! A network namespace that stays without a process in it: a mount of it on a file.

use std::io;
use std::path::Path;

use rustix::mount::UnmountFlags;
use rustix::thread::UnshareFlags;

/// Makes a new one at `path`, a file that is not there yet.
///
/// # Errors
/// The kernel's: it takes `CAP_SYS_ADMIN`.
pub fn make(path: &Path) -> io::Result<()> {
    std::fs::File::create_new(path)?;
    let target = path.to_owned();
    // A thread of its own goes into the new namespace, and ends there.
    let made = std::thread::spawn(move || {
        // SAFETY: a network namespace of its own takes no memory or descriptor from anybody, and this thread ends with this closure.
        #[expect(unsafe_code, reason = "unshare is unsafe by declaration, for flags that this does not use")]
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        rustix::mount::mount_bind("/proc/thread-self/ns/net", &target)?;
        io::Result::Ok(())
    });
    let made = made.join().unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")));
    if made.is_err() {
        let _ = std::fs::remove_file(path);
    }
    made
}

/// Whether there is one at `path`.
#[must_use]
pub fn is_there(path: &Path) -> bool {
    /// `NSFS_MAGIC` (linux/magic.h).
    const NSFS: i64 = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|system| system.f_type == NSFS)
}

/// Takes it away. What is not there is as it should be.
///
/// # Errors
/// The kernel's.
pub fn remove(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        // No mount, after the host has started anew: the file only.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

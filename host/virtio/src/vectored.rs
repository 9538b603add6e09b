//! Reads and writes between descriptors and the guest's memory itself, without a copy on the way.
//!
//! The standard library's vectored calls take slices of bytes that nobody else changes. The guest changes its memory when it
//! likes, so only pointers go to the kernel here, and no reference to the guest's bytes is ever made.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;

/// The most pieces of one call (`UIO_MAXIOV`, linux/uio.h).
const PIECES_MAX: usize = 1024;

/// Writes `pieces` to `fd` in one call. Returns the bytes that were taken, which may be fewer.
///
/// # Errors
/// Those of writev(2).
pub fn write(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>]) -> io::Result<usize> {
    with_vectors(pieces, |vectors, count| {
        // SAFETY: `with_vectors` gives `count` vectors over memory that stays mapped during the call. The kernel only reads
        // it, and copes with bytes that change meanwhile.
        #[expect(unsafe_code, reason = "the safe wrappers take slices that nobody else changes")]
        unsafe {
            libc::writev(fd.as_raw_fd(), vectors, count)
        }
    })
}

/// Writes `pieces` to `fd` at `offset`. Returns the bytes that were taken, which may be fewer.
///
/// # Errors
/// Those of pwritev(2).
pub fn write_at(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    with_vectors(pieces, |vectors, count| {
        // SAFETY: as in `write`.
        #[expect(unsafe_code, reason = "the safe wrappers take slices that nobody else changes")]
        unsafe {
            libc::pwritev64(fd.as_raw_fd(), vectors, count, offset)
        }
    })
}

/// Fills `pieces` from `fd` at `offset`. Returns the bytes that were read, which may be fewer; none at the end of the file.
///
/// # Errors
/// Those of preadv(2).
pub fn read_at(fd: BorrowedFd<'_>, pieces: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    with_vectors(pieces, |vectors, count| {
        // SAFETY: `with_vectors` gives `count` vectors over memory that stays mapped during the call. It is the guest's,
        // which nobody holds a reference to: `VolatileSlice` gives none out.
        #[expect(unsafe_code, reason = "the safe wrappers take slices that nobody else changes")]
        unsafe {
            libc::preadv64(fd.as_raw_fd(), vectors, count, offset)
        }
    })
}

/// Calls with vectors over the first of the pieces, as many as a call may have. They are valid while `call` runs: a piece's
/// lifetime is that of the mapping that it lies in.
fn with_vectors(
    pieces: &[VolatileSlice<'_>],
    call: impl Fn(*const libc::iovec, libc::c_int) -> isize,
) -> io::Result<usize> {
    let guards: Vec<_> = pieces.iter().take(PIECES_MAX).map(VolatileSlice::ptr_guard_mut).collect();
    let vectors: Vec<_> =
        guards.iter().map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() }).collect();
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    loop {
        let result = call(vectors.as_ptr(), count);
        if let Ok(bytes) = usize::try_from(result) {
            return Ok(bytes);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

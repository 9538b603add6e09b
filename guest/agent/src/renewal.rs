//! What must not be the same in two guests that go on from one saved machine.
//!
//! A kernel that knows the generation of its machine has mixed that in by itself when the machine went on; others have not, and hand out
//! what their twins do until they next look for randomness, which takes minutes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use crate::{Error, Result};

/// The host's randomness, and the kernel's.
const SOURCE: &str = "/dev/hwrng";
const POOL: &str = "/dev/urandom";

/// Bytes that are taken: twice what the kernel's pool holds.
const SEED_BYTES: usize = 64;

/// `struct rand_pool_info` with its bytes (Linux: include/uapi/linux/random.h).
#[repr(C)]
struct Seed {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    buffer: [u8; SEED_BYTES],
}

/// `_IOW('R', 3, int[2])` and `_IO('R', 7)`.
const RNDADDENTROPY: u32 = 0x4008_5203;
const RNDRESEEDCRNG: u32 = 0x5207;

/// Has the kernel hand out nothing any more that another guest may be handed out, too.
///
/// # Errors
/// Where the host gives no randomness, or the kernel does not take it.
pub(crate) fn renew() -> Result<()> {
    let mut seed = Seed { entropy_bits: 0, bytes: 0, buffer: [0; SEED_BYTES] };
    let mut source = File::open(SOURCE).map_err(Error::system("open the host's randomness"))?;
    source.read_exact(&mut seed.buffer).map_err(Error::system("read the host's randomness"))?;
    let count = libc::c_int::try_from(SEED_BYTES).unwrap_or(0);
    (seed.entropy_bits, seed.bytes) = (count.saturating_mul(8), count);
    let pool = pool()?;
    // SAFETY: the structure has as many bytes behind its two numbers as the second of them says, and lives through the call.
    #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
    let added = unsafe { libc::ioctl(pool.as_raw_fd(), RNDADDENTROPY as libc::Ioctl, &raw const seed) };
    check(added)?;
    use_now(&pool)
}

/// Mixes bytes into the kernel's randomness, without crediting them.
///
/// # Errors
/// Where the kernel does not take them.
pub(crate) fn mix(bytes: &[u8]) -> Result<()> {
    let mut pool = pool()?;
    pool.write_all(bytes).map_err(Error::system("reseed"))?;
    use_now(&pool)
}

fn pool() -> Result<File> {
    File::options().write(true).open(POOL).map_err(Error::system("open the kernel's randomness"))
}

/// Has the kernel draw on what its pool has been given. It does so by itself only after a while.
fn use_now(pool: &File) -> Result<()> {
    // SAFETY: the request takes no argument.
    #[expect(unsafe_code, reason = "an ioctl without a safe wrapper")]
    let used = unsafe { libc::ioctl(pool.as_raw_fd(), RNDRESEEDCRNG as libc::Ioctl) };
    check(used)
}

fn check(result: libc::c_int) -> Result<()> {
    if result < 0 { Err(Error::system("reseed")(std::io::Error::last_os_error())) } else { Ok(()) }
}

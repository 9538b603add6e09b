//! `vsock CID PATH`: the server of a guest's sockets, a process of its own. It finds two listening sockets: the monitor's at
//! descriptor 3, host programs' (whose path is PATH) at 4.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use coracle_process::leave_vsock_calls;

pub(crate) fn run(words: &[String]) -> Result<()> {
    let [cid, path] = words else { bail!("usage: vsock CID PATH") };
    let cid = cid.parse().context("the context identifier")?;
    let monitor = inherited(3);
    let programs = inherited(4);
    leave_vsock_calls().context("give up system calls")?;
    coracle_virtio::vhost_user::serve_vsock(cid, Path::new(path), programs.into(), monitor.into())
        .context("serve vsock")
}

/// Takes over a descriptor that this word of the program was started with.
pub(crate) fn inherited(number: i32) -> OwnedFd {
    // SAFETY: whoever starts this word passes exactly these descriptors, and each is taken once.
    #[expect(unsafe_code, reason = "an inherited descriptor has no safe constructor")]
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fd
}

//! `vsock CID PATH`: the server of a guest's sockets, a process of its own. It finds two listening sockets: the monitor's at
//! descriptor 3, host programs' (whose path is PATH) at 4.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use coracle_process::{Role, keep_only, leave_vsock_calls};

pub(crate) fn run(words: &[String]) -> Result<()> {
    let [cid, path] = words else { bail!("usage: vsock CID PATH") };
    let cid = cid.parse().context("the context identifier")?;
    let monitor = inherited(3);
    let programs = inherited(4);
    let path = jailed(Path::new(path))?;
    coracle_virtio::vhost_user::serve_vsock(cid, &path, programs.into(), monitor.into()).context("serve vsock")
}

/// Leaves the host's files, where root may: the pod's folder with its sockets is all that there is. Then capabilities go, and system calls. The
/// path, as it is from there on.
fn jailed(path: &Path) -> Result<PathBuf> {
    let mut path = path.to_owned();
    if rustix::process::geteuid().is_root()
        && let (Some(folder), Some(name)) = (path.parent(), path.file_name())
    {
        rustix::process::chroot(folder).context("make the pod's folder the root")?;
        rustix::process::chdir("/").context("enter the pod's folder")?;
        path = Path::new("/").join(name);
    }
    keep_only(Role::Vsock.bounds().capabilities).context("give up capabilities")?;
    leave_vsock_calls().context("give up system calls")?;
    Ok(path)
}

/// Takes over a descriptor that this word of the program was started with.
pub(crate) fn inherited(number: i32) -> OwnedFd {
    // SAFETY: whoever starts this word passes exactly these descriptors, and each is taken once.
    #[expect(unsafe_code, reason = "an inherited descriptor has no safe constructor")]
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fd
}

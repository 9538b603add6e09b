//! A terminal of the container's own devpts.

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

use crate::Result;
use crate::error::Step;
use crate::user::Identity;

nix::ioctl_write_ptr_bad!(set_pty_lock, libc::TIOCSPTLCK, libc::c_int);
nix::ioctl_read_bad!(get_pty_number, libc::TIOCGPTN, libc::c_uint);
nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);
nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);

/// Makes a terminal, takes its slave as the standard streams and gives the master back. For the container's first
/// process the slave becomes `/dev/console` too.
pub(crate) fn open(size: Option<oci_spec::runtime::Box>, console: bool) -> Result<OwnedFd> {
    let open = |path: &Path| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
            .open(path)
            .step(|| format!("open {}", path.display()))
    };
    let master: OwnedFd = open(Path::new("/dev/pts/ptmx"))?.into();
    let (unlocked, mut number) = (0, 0);
    // SAFETY: the descriptor is a terminal's master and both pointers are to live integers of the size that the kernel
    // reads and writes.
    #[expect(unsafe_code, reason = "ioctl")]
    unsafe {
        set_pty_lock(master.as_raw_fd(), &raw const unlocked).step(|| "unlock the terminal".into())?;
        get_pty_number(master.as_raw_fd(), &raw mut number).step(|| "name the terminal".into())?;
    }
    let path = PathBuf::from(format!("/dev/pts/{number}"));
    let slave = open(&path)?;
    if let Some(size) = size.filter(|size| size.height() > 0 && size.width() > 0) {
        let size = libc::winsize {
            ws_row: u16::try_from(size.height()).unwrap_or(u16::MAX),
            ws_col: u16::try_from(size.width()).unwrap_or(u16::MAX),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the pointer is to a live structure of the type that the request takes.
        #[expect(unsafe_code, reason = "ioctl")]
        unsafe { set_window_size(master.as_raw_fd(), &raw const size) }.step(|| "size the terminal".into())?;
    }
    if console {
        bind_console(&path)?;
    }
    // SAFETY: the request takes an integer; the process leads a session without a terminal.
    #[expect(unsafe_code, reason = "ioctl")]
    unsafe { set_controlling_terminal(slave.as_raw_fd(), 0) }.step(|| "take the terminal".into())?;
    nix::unistd::dup2_stdin(&slave).step(|| "take the terminal as stdin".into())?;
    nix::unistd::dup2_stdout(&slave).step(|| "take the terminal as stdout".into())?;
    nix::unistd::dup2_stderr(&slave).step(|| "take the terminal as stderr".into())?;
    Ok(master)
}

fn bind_console(slave: &Path) -> Result<()> {
    let console = Path::new("/dev/console");
    if !console.exists() {
        OpenOptions::new().write(true).create_new(true).open(console).step(|| "make /dev/console".into())?;
    }
    rustix::mount::mount_bind(slave, console).step(|| "mount /dev/console".into())
}

/// Lets the process's user open its own standard streams again (`/dev/stdout` and the like).
pub(crate) fn give_to(identity: &Identity) {
    fn give(stream: impl std::os::fd::AsFd, identity: &Identity) {
        let null = std::fs::metadata("/dev/null").map(|null| null.rdev()).ok();
        let Ok(stream) = stream.as_fd().try_clone_to_owned() else { return };
        let file = std::fs::File::from(stream);
        let Ok(metadata) = file.metadata() else { return };
        if metadata.uid() == identity.uid || Some(metadata.rdev()) == null {
            return;
        }
        // Where that is refused the stream keeps its owner, and the process still has it open.
        let _ = fchown(&file, Some(identity.uid), None);
    }
    give(std::io::stdin(), identity);
    give(std::io::stdout(), identity);
    give(std::io::stderr(), identity);
}

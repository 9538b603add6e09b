//! Pid 1 of the guest.
//!
//! It makes the place that the agent needs (file systems, kernel modules, the loopback link), starts the agent as its
//! child, and reaps. It serves nothing and decides nothing. When the agent ends, whatever the reason, the machine ends:
//! a guest without its agent can't be reached, and the host hears of it at once.

#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing))]

mod modules;
mod mounts;

pub use modules::load_more as load_modules;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Runs the guest. `arguments` start the agent: this program, with these words.
pub fn run(arguments: &[&str]) -> ! {
    let end = match prepare().and_then(|()| supervise(arguments)) {
        Ok(status) => format!("the agent ended: {status}"),
        Err(error) => error,
    };
    say(&end);
    // SAFETY: sync takes nothing and touches no memory of ours.
    #[expect(unsafe_code, reason = "libc has no safe sync")]
    unsafe {
        libc::sync();
    }
    // The monitor is told not to reboot, so a restart is the machine's end; it works on every machine type.
    let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
    say(&format!("can't end the machine: {errno}"));
    std::process::exit(1);
}

/// One line on the console, from where the host takes the reason of a failure.
fn say(text: &str) {
    println!("coracle-init: {text}");
}

fn prepare() -> Result<(), String> {
    mounts::make()?;
    modules::load()?;
    loopback_up().map_err(|error| format!("can't bring the loopback link up: {error}"))
}

fn supervise(arguments: &[&str]) -> Result<ExitStatus, String> {
    let agent = Command::new("/proc/self/exe")
        .args(arguments)
        .env_clear()
        .spawn()
        .map_err(|error| format!("can't start the agent: {error}"))?;
    let agent = i32::try_from(agent.id()).map_err(|_| "the agent's pid is out of range".to_owned())?;
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == Pid::from_raw(agent) => {
                return Ok(ExitStatus::from_raw(code << 8));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == Pid::from_raw(agent) => {
                return Ok(ExitStatus::from_raw(signal as i32));
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(format!("can't wait for the agent: {errno}")),
        }
    }
}

fn loopback_up() -> nix::Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is a valid value of that plain C structure.
    #[expect(unsafe_code, reason = "a C structure with a union")]
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the pointer is to a live structure of the type that the request reads.
    #[expect(unsafe_code, reason = "ioctl")]
    let result =
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS, &raw const request) };
    Errno::result(result).map(drop)
}

//! The monitor's jail: what a guest that has taken the monitor over can still reach.
//!
//! [`enter`] is called before the machine is made, while the process has one thread: namespaces, an empty root, no
//! privileges. [`confine`] is called on each thread before the guest first runs: the system calls of that kind of thread,
//! and no others. What the machine needs of the host was opened by whoever started the monitor.

mod files;
mod namespaces;
mod requests;
mod syscalls;

use coracle_monitor_api::Jail;

pub(crate) use syscalls::{Kind, confine};

use crate::Error;

/// Leaves the host behind.
pub(crate) fn enter(jail: &Jail) -> Result<(), Error> {
    rustix::thread::set_no_new_privs(true).map_err(Error::system("give up new privileges"))?;
    namespaces::enter(jail)?;
    // After the root has changed: the rules forbid to open whatever would be there.
    files::forbid()
}

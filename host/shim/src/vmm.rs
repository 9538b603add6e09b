//! `vmm FOLDER`: the built-in machine monitor of the pod whose machine has that folder, a process of its own. It finds its control socket at descriptor 3.

use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail};

/// Messages go to standard error, which the driver keeps the last of.
struct Messages;

impl log::Log for Messages {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("coracle")
    }

    fn log(&self, record: &log::Record<'_>) {
        use std::io::Write;
        if self.enabled(record.metadata()) {
            // A reader that is slow loses lines; a device does not wait for it.
            let _ = writeln!(std::io::stderr(), "{}", record.args());
        }
    }

    fn flush(&self) {}
}

pub(crate) fn run(words: &[String]) -> Result<()> {
    // The folder tells whoever lists processes which pod this is. It is not opened.
    let [_folder] = words else { bail!("usage: vmm FOLDER, with a control socket at descriptor 3") };
    let number = coracle_monitor_api::CONTROL_FD;
    rustix::io::ioctl_fionbio(std::io::stderr(), true).context("prepare standard error")?;
    log::set_logger(&Messages).context("start the log")?;
    log::set_max_level(log::LevelFilter::Warn);
    // SAFETY: whoever starts this word passes exactly this descriptor, and it is taken once.
    #[expect(unsafe_code, reason = "an inherited descriptor has no safe constructor")]
    let control = unsafe { OwnedFd::from_raw_fd(number) };
    coracle_vmm::run(control.into()).context("run a machine")
}

//! `vmm FOLDER`: the built-in machine monitor of the pod whose machine has that folder, a process of its own. It finds its control socket at descriptor 3.

use anyhow::{Context, Result, bail};

use crate::vsock::inherited;

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
    rustix::io::ioctl_fionbio(std::io::stderr(), true).context("prepare standard error")?;
    log::set_logger(&Messages).context("start the log")?;
    log::set_max_level(log::LevelFilter::Warn);
    let control = inherited(coracle_monitor_api::CONTROL_FD);
    coracle_vmm::run(control.into()).context("run a machine")
}

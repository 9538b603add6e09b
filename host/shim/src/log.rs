//! The daemon's log: lines to the pipe `log` in the bundle, which containerd reads, or to a file of that name.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Mutex;
use std::time::SystemTime;

struct Log(Mutex<File>);

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        // The libraries' own chatter is theirs.
        metadata.target().starts_with("coracle") || metadata.target().starts_with("containerd_shim_coracle")
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let level = record.level().as_str().to_ascii_lowercase();
        let line = format!(
            "time={}.{:03} level={level} msg={:?}\n",
            time.as_secs(),
            time.subsec_millis(),
            record.args().to_string()
        );
        // A pipe that nobody empties takes no more: the line is lost, and the pod goes on.
        if let Ok(mut file) = self.0.lock() {
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts the log where there is a place for it.
pub(crate) fn start(debug: bool) {
    // Opened for both directions, so that neither the open nor a write waits for a reader.
    let opened = File::options().read(true).append(true).custom_flags(libc::O_NONBLOCK).open("log");
    let Ok(file) = opened else { return };
    let level = if debug { log::LevelFilter::Debug } else { log::LevelFilter::Info };
    if log::set_boxed_logger(Box::new(Log(Mutex::new(file)))).is_ok() {
        log::set_max_level(level);
    }
}

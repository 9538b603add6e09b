use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The last bytes of an output. Clones share them.
#[derive(Debug, Clone)]
pub struct Ring {
    // Shared between the pump that writes and whoever reports a failure; held for a copy only.
    bytes: Arc<Mutex<VecDeque<u8>>>,
    capacity: usize,
    /// As whose lines they are logged, too.
    target: Option<&'static str>,
    // As above: the beginning of a line whose end has not come yet, and how many were logged of late.
    begun: Arc<Mutex<Begun>>,
}

/// See [`Ring::logged`].
#[derive(Debug, Default)]
struct Begun {
    line: Vec<u8>,
    /// The second that is counted, since when, and what was logged and left out in it.
    second: Option<Instant>,
    logged: u32,
    left_out: u64,
}

impl Begun {
    /// Whether one more line may be logged now; and how many were left out before, where that is to be told.
    fn admit(&mut self) -> (bool, u64) {
        let is_new = self.second.is_none_or(|since| since.elapsed() >= Duration::from_secs(1));
        let told = if is_new { std::mem::take(&mut self.left_out) } else { 0 };
        if is_new {
            (self.second, self.logged) = (Some(Instant::now()), 0);
        }
        if self.logged >= LINES_MAX {
            self.left_out += 1;
            return (false, told);
        }
        self.logged += 1;
        (true, told)
    }
}

/// How many lines are logged within a second: who prints without end must not fill the host's disk.
const LINES_MAX: u32 = 200;

/// The longest line that is logged as one, in bytes.
const LINE_BYTES: usize = 1024;

impl Ring {
    /// Keeps the last `capacity` bytes.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { bytes: Arc::default(), capacity, target: None, begun: Arc::default() }
    }

    /// Logs each line as well, at the level debug, as of `target`.
    #[must_use]
    pub fn logged(self, target: &'static str) -> Self {
        Self { target: Some(target), ..self }
    }

    /// Adds bytes; the oldest make room.
    pub fn push(&self, chunk: &[u8]) {
        self.log(chunk);
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let chunk = &chunk[chunk.len().saturating_sub(self.capacity)..];
        let surplus = (bytes.len() + chunk.len()).saturating_sub(self.capacity);
        bytes.drain(..surplus);
        bytes.extend(chunk);
    }

    fn log(&self, chunk: &[u8]) {
        let Some(target) = self.target.filter(|target| log::log_enabled!(target: target, log::Level::Debug)) else {
            return;
        };
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        for part in chunk.split_inclusive(|byte| *byte == b'\n') {
            begun.line.extend(&part[..part.len().min(LINE_BYTES)]);
            if part.ends_with(b"\n") || begun.line.len() >= LINE_BYTES {
                let line = clean(&String::from_utf8_lossy(&begun.line));
                begun.line.clear();
                if line.trim().is_empty() {
                    continue;
                }
                let (is_admitted, left_out) = begun.admit();
                if left_out > 0 {
                    log::debug!(target: target, "{left_out} lines were left out");
                }
                if is_admitted {
                    log::debug!(target: target, "{line}");
                }
            }
        }
    }

    /// The last `count` lines, with control characters (but tabs) left out: what a guest prints may be hostile to a
    /// terminal.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&bytes.iter().copied().collect::<Vec<u8>>()).into_owned();
        let lines: Vec<String> = text.lines().map(clean).filter(|line| !line.trim().is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
}

/// A line without what could be hostile to a terminal.
fn clean(line: &str) -> String {
    line.chars().filter(|c| !c.is_control() || *c == '\t').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_make_room() {
        let ring = Ring::new(8);
        ring.push(b"one\n");
        ring.push(b"o\nthree\n");
        assert_eq!(ring.last_lines(9), ["o", "three"]);
        ring.push(&[b'x'; 100]);
        assert_eq!(ring.last_lines(1), ["x".repeat(8)]);
    }

    #[test]
    fn lines_are_logged_whole() {
        struct Lines(Mutex<Vec<String>>);
        impl log::Log for Lines {
            fn enabled(&self, _: &log::Metadata<'_>) -> bool {
                true
            }
            fn log(&self, record: &log::Record<'_>) {
                if record.target() == "test_console" {
                    self.0.lock().unwrap().push(record.args().to_string());
                }
            }
            fn flush(&self) {}
        }
        static LINES: Lines = Lines(Mutex::new(Vec::new()));
        log::set_logger(&LINES).unwrap();
        log::set_max_level(log::LevelFilter::Debug);
        let ring = Ring::new(8).logged("test_console");
        for chunk in ["on", "e\r\n\n\x1b[1mtw", "o\nrest"] {
            ring.push(chunk.as_bytes());
        }
        assert_eq!(*LINES.0.lock().unwrap(), ["one", "[1mtwo"]);
        ring.push(&[b'x'; 5000]);
        assert_eq!(LINES.0.lock().unwrap().len(), 3, "a line without an end is cut");
        ring.push("x\n".repeat(5000).as_bytes());
        assert!(LINES.0.lock().unwrap().len() < 1000, "a flood is left out");
    }

    #[test]
    fn control_characters_do_not_pass() {
        let ring = Ring::new(100);
        ring.push(b"a\x1b[31mred\r\nb\tc\n\n");
        assert_eq!(ring.last_lines(2), ["a[31mred", "b\tc"]);
    }
}

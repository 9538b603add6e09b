use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// The last bytes of an output. Clones share them.
#[derive(Debug, Clone)]
pub struct Ring {
    // Shared between the pump that writes and whoever reports a failure; held for a copy only.
    bytes: Arc<Mutex<VecDeque<u8>>>,
    capacity: usize,
}

impl Ring {
    /// Keeps the last `capacity` bytes.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self { bytes: Arc::default(), capacity }
    }

    /// Adds bytes; the oldest make room.
    pub fn push(&self, chunk: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let chunk = &chunk[chunk.len().saturating_sub(self.capacity)..];
        let surplus = (bytes.len() + chunk.len()).saturating_sub(self.capacity);
        bytes.drain(..surplus);
        bytes.extend(chunk);
    }

    /// The last `count` lines, with control characters (but tabs) left out: what a guest prints may be hostile to a
    /// terminal.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&bytes.iter().copied().collect::<Vec<u8>>()).into_owned();
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.chars().filter(|c| !c.is_control() || *c == '\t').collect::<String>())
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
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
    fn control_characters_do_not_pass() {
        let ring = Ring::new(100);
        ring.push(b"a\x1b[31mred\r\nb\tc\n\n");
        assert_eq!(ring.last_lines(2), ["a[31mred", "b\tc"]);
    }
}

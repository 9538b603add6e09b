//! Network namespaces and links for tests, by iproute2.

use std::process::Command;

use crate::{Host, Outcome};

/// A network namespace with nothing but loopback, as long as it lives.
#[derive(Debug)]
pub struct Netns(String);

impl Netns {
    /// One that is known by the host's mark and `word`.
    ///
    /// # Panics
    /// Where it can't be made.
    #[must_use]
    pub fn new(host: &Host, word: &str) -> Self {
        let name = format!("{}{word}", host.mark());
        let _ = ip(&format!("netns add {name}"));
        Self(name)
    }

    /// Its name for `ip`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Where it is found.
    #[must_use]
    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.0)
    }

    /// What `ip` prints in it.
    ///
    /// # Panics
    /// As [`ip`].
    pub fn ip(&self, words: &str) -> String {
        ip(&format!("-netns {} {words}", self.0))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

/// What `ip` prints, in the namespace of this thread.
///
/// # Panics
/// Where it fails.
pub fn ip(words: &str) -> String {
    let outcome = try_ip(words);
    assert_eq!(outcome.code, 0, "ip {words}: {outcome:?}");
    outcome.stdout
}

/// As [`ip`], whatever comes of it.
#[must_use]
pub fn try_ip(words: &str) -> Outcome {
    let mut command = Command::new("ip");
    command.args(words.split_whitespace());
    Outcome::of(command, b"")
}

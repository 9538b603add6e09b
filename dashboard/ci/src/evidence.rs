//! What the stored results show: worked out anew after each collection, all of it in one go, so that a page reads rows and counts nothing.

mod clusters;
mod costs;
mod flakes;
mod jobs;
mod renames;

use std::sync::LazyLock;

use regex::Regex;

use crate::error::Result;
use crate::settings::Settings;
use crate::store::Store;
use crate::times;

pub use jobs::Dot;
pub use renames::{Rename, decide, renames};

/// Says when all lists were read to their ends last: how old the data are.
///
/// # Errors
/// [`crate::error::Error::Database`].
pub fn set_collected(store: &mut Store, moment: i64) -> Result<()> {
    store.set_fact("collected", &times::moment(moment))
}

/// Works out everything, as of `now`.
///
/// # Errors
/// [`crate::error::Error::Database`]; then what was worked out before stays.
pub fn derive(store: &mut Store, settings: &Settings, now: i64) -> Result<()> {
    store.change(|transaction| {
        renames::propose(transaction)?;
        flakes::derive(transaction)?;
        jobs::derive(transaction, settings, now)?;
        clusters::derive(transaction, settings)?;
        costs::derive(transaction)?;
        let generation =
            "INSERT INTO fact VALUES ('generation', '1') ON CONFLICT DO UPDATE SET value = CAST(value AS INTEGER) + 1";
        transaction.execute(generation, [])?;
        Ok(())
    })
}

static CHANGING: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?i)\b0x[0-9a-f]+\b|\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b|\b[0-9a-f]*[0-9][0-9a-f]{7,}\b|\d+(?:\.\d+)*").ok()
});

/// What failures with one cause have in common: the first two lines that say something, with what changes from run to run (numbers, identifiers)
/// taken out.
#[must_use]
pub fn signature(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).take(2).collect();
    let head: String = lines.join(" ⏎ ").chars().take(400).collect();
    let plain =
        CHANGING.as_ref().map_or_else(|| head.clone(), |changing| changing.replace_all(&head, "#").into_owned());
    plain.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_from_run_to_run_is_left_out() {
        let one = "pod 3fa85f64-5717-4562-b3fc-2c963f66afa6: timeout after 30.5s (attempt 2)\nat 0xdeadbeef\nmore";
        let two = "pod 11111111-2222-3333-4444-555555555555: timeout after 7s  (attempt 11)\nat 0x1";
        assert_eq!(signature(one), "pod #: timeout after #s (attempt #) ⏎ at #");
        assert_eq!(signature(one), signature(two));
        assert_ne!(signature(one), signature("pod x: refused"));
        assert_eq!(signature(" \n "), "");
        assert!(signature(&"ä".repeat(10_000)).chars().count() <= 200);
    }
}

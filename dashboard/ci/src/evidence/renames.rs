//! Jobs that are called otherwise now: proposed by how alike their names are, and by one ending when the other begins; decided by a person.

use std::collections::BTreeMap;

use rusqlite::{OptionalExtension as _, Transaction, params};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::store::Store;
use crate::times::{self, DAY};

/// How alike names must be, from 0 to 1.
const LIKENESS: f64 = 0.7;
/// How long after the old name's last run the new one's first may be.
const GAP: i64 = 7 * DAY;

/// A rename.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct Rename {
    /// The job's number under its old name.
    pub old: i64,
    /// Under its new one.
    pub new: i64,
    /// The old name.
    pub old_name: String,
    /// The new one.
    pub new_name: String,
    /// How alike they are, from 0 to 1.
    pub likeness: f64,
    /// proposed, confirmed, refused.
    pub state: String,
}

/// How alike two names are: the share of their pairs of letters that both have (L. R. Dice, 1945).
fn likeness(one: &str, two: &str) -> f64 {
    let pairs = |text: &str| {
        let letters: Vec<char> =
            text.chars().filter(|letter| letter.is_alphanumeric()).flat_map(char::to_lowercase).collect();
        let mut counts: BTreeMap<[char; 2], i64> = BTreeMap::new();
        for pair in letters.windows(2) {
            if let [first, second] = pair {
                *counts.entry([*first, *second]).or_default() += 1;
            }
        }
        counts
    };
    let (one, two) = (pairs(one), pairs(two));
    let both: i64 = one.iter().map(|(pair, count)| count.min(two.get(pair).unwrap_or(&0))).sum();
    let all: i64 = one.values().sum::<i64>() + two.values().sum::<i64>();
    if all == 0 { 0.0 } else { 2.0 * both as f64 / all as f64 }
}

struct Life {
    job: i64,
    workflow: i64,
    name: String,
    first: i64,
    last: i64,
}

pub(super) fn propose(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    let lives = {
        let mut find = transaction.prepare(
            "SELECT j.id, j.workflow, j.name, min(r.created), max(r.created) FROM job j
             JOIN execution e ON e.job = j.id JOIN run r ON r.id = e.run GROUP BY j.id",
        )?;
        let rows = find.query_map([], |row| {
            Ok(Life {
                job: row.get(0)?,
                workflow: row.get(1)?,
                name: row.get(2)?,
                first: row.get(3)?,
                last: row.get(4)?,
            })
        })?;
        rows.collect::<rusqlite::Result<Vec<_>>>()?
    };
    let mut newest: BTreeMap<i64, i64> = BTreeMap::new();
    for life in &lives {
        let last = newest.entry(life.workflow).or_default();
        *last = life.last.max(*last);
    }
    let mut propose = transaction.prepare("INSERT OR IGNORE INTO rename VALUES (?1, ?2, ?3, 'proposed', NULL)")?;
    for old in lives.iter().filter(|life| newest.get(&life.workflow).is_some_and(|newest| life.last < *newest)) {
        let best = lives
            .iter()
            .filter(|new| new.workflow == old.workflow && new.first > old.last && new.first - old.last <= GAP)
            .map(|new| (new.job, likeness(&old.name, &new.name)))
            .filter(|(_, likeness)| *likeness >= LIKENESS)
            .max_by(|one, two| one.1.total_cmp(&two.1));
        if let Some((new, likeness)) = best {
            propose.execute(params![old.job, new, likeness])?;
        }
    }
    Ok(())
}

/// All renames, those to be decided first.
///
/// # Errors
/// [`Error::Database`].
pub fn renames(store: &Store) -> Result<Vec<Rename>> {
    store.read(|connection| {
        let mut find = connection.prepare(
            "SELECT n.old, n.new, a.name, b.name, n.likeness, n.state FROM rename n JOIN job a ON a.id = n.old JOIN job b ON b.id = n.new
             ORDER BY n.state <> 'proposed', n.likeness DESC",
        )?;
        let rows = find.query_map([], |row| {
            Ok(Rename {
                old: row.get(0)?,
                new: row.get(1)?,
                old_name: row.get(2)?,
                new_name: row.get(3)?,
                likeness: row.get(4)?,
                state: row.get(5)?,
            })
        })?;
        rows.collect()
    })
}

/// Decides a rename: confirmed, the old name's results count as the new one's; refused, they no longer do. What they were called stays stored.
///
/// # Errors
/// [`Error::Missing`] where the two are no jobs of one workflow, or the new one counts as the old one already.
pub fn decide(store: &mut Store, old: i64, new: i64, confirm: bool) -> Result<()> {
    let is_done = store.change(|transaction| {
        let workflow = |job: i64| {
            let find = "SELECT workflow FROM job WHERE id = ?1";
            transaction.query_row(find, [job], |row| row.get::<_, i64>(0)).optional()
        };
        let (Some(one), Some(two)) = (workflow(old)?, workflow(new)?) else { return Ok(false) };
        let is_circle = crate::store::counts_as(transaction, new)? == old;
        if one != two || old == new || (confirm && is_circle) {
            return Ok(false);
        }
        let state = if confirm { "confirmed" } else { "refused" };
        if confirm {
            // A job is called one thing at a time.
            let other = "UPDATE rename SET state = 'refused', decided = ?2 WHERE old = ?1 AND state = 'confirmed'";
            transaction.execute(other, params![old, times::now()])?;
        }
        transaction.execute(
            "INSERT INTO rename VALUES (?1, ?2, 1, ?3, ?4) ON CONFLICT DO UPDATE SET state = excluded.state, decided = excluded.decided",
            params![old, new, state, times::now()],
        )?;
        recount(transaction, one)?;
        Ok(true)
    })?;
    if is_done {
        Ok(())
    } else {
        Err(Error::Missing(format!("pair of jobs {old} and {new} of one workflow that could be one")))
    }
}

/// Has each attempt of a workflow count as what its job is called now, by all decisions; alerts and mutes go with it.
fn recount(transaction: &Transaction<'_>, workflow: i64) -> rusqlite::Result<()> {
    let jobs = {
        let mut find = transaction.prepare("SELECT id FROM job WHERE workflow = ?1")?;
        let rows = find.query_map([workflow], |row| row.get::<_, i64>(0))?;
        rows.collect::<rusqlite::Result<Vec<_>>>()?
    };
    for named in jobs {
        let job = crate::store::counts_as(transaction, named)?;
        transaction.execute("UPDATE execution SET job = ?2 WHERE named = ?1 AND job <> ?2", [named, job])?;
        if job != named {
            transaction.execute("UPDATE alert SET job = ?2 WHERE job = ?1 AND recovered IS NULL", [named, job])?;
            transaction.execute("UPDATE OR IGNORE mute SET job = ?2 WHERE job = ?1", [named, job])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_people_would_take_for_one_are_alike() {
        let old = "run-kata-coco-tests / run-k8s-tests-on-tdx (qemu-tdx)";
        assert!(likeness(old, "run-kata-coco-tests / run-k8s-tests-on-tee (qemu-tdx)") > 0.9);
        assert!(likeness(old, "build-static-tarball (agent)") < 0.5);
        assert!((likeness("a b", "ab") - 1.0).abs() < 1e-9);
        assert!(likeness("", "") == 0.0);
    }
}

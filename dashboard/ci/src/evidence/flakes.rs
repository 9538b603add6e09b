//! What has failed and passed on the same commit.

use coracle_ci_statistics::{Flakes, flakes};
use rusqlite::{Transaction, params};

/// How many commits are kept as evidence.
const EVIDENCE: usize = 20;

pub(super) fn derive(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM evidence_flake", [])?;
    jobs(transaction)?;
    tests(transaction)
}

/// Jobs, by all their attempts on whatever branch: one end for each attempt, also where two jobs of it have one name. What failed to set up is no end.
fn jobs(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    let mut find = transaction.prepare(
        "SELECT e.job, r.sha, max(e.outcome IN (1, 5)), r.created FROM execution e JOIN run r ON r.id = e.run
         WHERE e.outcome IN (0, 1, 5) AND e.retold = 0 AND r.sha <> '' GROUP BY e.job, e.run, e.attempt ORDER BY e.job",
    )?;
    let mut rows = find.query([])?;
    let (mut own, mut last) = (None, 0);
    let mut ends: Vec<(String, bool)> = Vec::new();
    while let Some(row) = rows.next()? {
        let (job, sha, outcome, at): (i64, String, i64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
        if let Some(other) = own.filter(|other| *other != job) {
            store(transaction, 0, other, &ends, last)?;
            ends.clear();
            last = 0;
        }
        own = Some(job);
        ends.push((sha, outcome == 0));
        last = at.max(last);
    }
    own.map_or(Ok(()), |job| store(transaction, 0, job, &ends, last))
}

/// Tests, each by the jobs it runs in: only those that failed where they have also passed on that commit are looked at whole.
fn tests(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    let candidates = {
        let mut find = transaction.prepare(
            "SELECT DISTINCT f.test, e.job FROM result f JOIN execution e ON e.id = f.execution JOIN run r ON r.id = e.run
             WHERE f.outcome = 1 AND e.retold = 0 AND r.sha <> '' AND EXISTS (
                SELECT 1 FROM run r2 JOIN execution e2 ON e2.run = r2.id AND e2.job = e.job
                JOIN result p ON p.test = f.test AND p.execution = e2.id AND p.outcome = 0 WHERE r2.sha = r.sha)",
        )?;
        let rows = find.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))?;
        rows.collect::<rusqlite::Result<Vec<_>>>()?
    };
    let mut find = transaction.prepare(
        "SELECT r.sha, t.outcome, r.created FROM result t JOIN execution e ON e.id = t.execution JOIN run r ON r.id = e.run
         WHERE t.test = ?1 AND e.job = ?2 AND t.outcome IN (0, 1) AND e.retold = 0 AND r.sha <> ''",
    )?;
    for (test, job) in candidates {
        let mut last = 0;
        let rows = find.query_map(params![test, job], |row| {
            last = row.get::<_, i64>(2)?.max(last);
            Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)? == 0))
        })?;
        let ends = rows.collect::<rusqlite::Result<Vec<_>>>()?;
        store(transaction, test, job, &ends, last)?;
    }
    Ok(())
}

fn store(
    transaction: &Transaction<'_>,
    test: i64,
    job: i64,
    ends: &[(String, bool)],
    last: i64,
) -> rusqlite::Result<()> {
    let Flakes { commits, failures, mut evidence } = flakes(ends.iter().map(|(sha, passed)| (sha.as_str(), *passed)));
    if commits.of == 0 {
        return Ok(());
    }
    evidence.truncate(EVIDENCE);
    transaction
        .prepare_cached("INSERT OR REPLACE INTO evidence_flake VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
        .execute(params![
            test,
            job,
            commits.count as i64,
            commits.of as i64,
            failures.count as i64,
            failures.of as i64,
            evidence.join(" "),
            last
        ])?;
    Ok(())
}

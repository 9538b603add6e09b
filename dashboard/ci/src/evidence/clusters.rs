//! Failures that say the same.

use rusqlite::{Transaction, params};

use crate::settings::Settings;

pub(super) fn derive(transaction: &Transaction<'_>, settings: &Settings) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM evidence_cluster", [])?;
    transaction.execute(
        "INSERT INTO evidence_cluster
         SELECT f.signature, count(*), count(DISTINCT e.job), count(DISTINCT nullif(f.test, 0)), min(r.created), max(r.created), max(f.execution), ''
         FROM failure f JOIN execution e ON e.id = f.execution JOIN run r ON r.id = e.run WHERE e.retold = 0 GROUP BY f.signature",
        [],
    )?;
    if settings.known_issues.is_empty() {
        return Ok(());
    }
    let mut find = transaction.prepare("SELECT c.signature, f.text FROM evidence_cluster c JOIN failure f ON f.signature = c.signature AND f.execution = c.example")?;
    let rows = find.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, String>(1)?)))?;
    for (signature, text) in rows.collect::<rusqlite::Result<Vec<_>>>()? {
        if let Some((_, link)) = settings.known_issues.iter().find(|(pattern, _)| pattern.is_match(&text)) {
            let update = "UPDATE evidence_cluster SET issue = ?2 WHERE signature = ?1";
            transaction.prepare_cached(update)?.execute(params![signature, link])?;
        }
    }
    Ok(())
}

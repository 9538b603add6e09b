//! What runners were used for. Times that a wrong clock makes impossible are left out, as everywhere ([`crate::times::between`]).

use rusqlite::Transaction;

pub(super) fn derive(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    transaction.execute_batch(
        "DELETE FROM evidence_cost_label;
         DELETE FROM evidence_cost_job;
         DELETE FROM evidence_cost_pull;
         CREATE TEMP TABLE IF NOT EXISTS used (execution INTEGER PRIMARY KEY, run INTEGER, job INTEGER, label TEXT, created INTEGER, seconds INTEGER, queue INTEGER, is_rerun INTEGER, failed INTEGER);
         DELETE FROM used;
         INSERT INTO used SELECT e.id, e.run, e.job, e.label, r.created,
                CASE WHEN e.completed - e.started BETWEEN 0 AND 5184000 THEN e.completed - e.started ELSE 0 END,
                CASE WHEN e.started - e.created BETWEEN 0 AND 5184000 THEN e.started - e.created END,
                e.attempt > 1, e.outcome IN (1, 2, 5)
         FROM execution e JOIN run r ON r.id = e.run
         WHERE e.started IS NOT NULL AND e.outcome <> 4 AND e.retold = 0;
         INSERT INTO evidence_cost_label SELECT created / 86400, label, count(*), sum(is_rerun), sum(seconds), sum(seconds * is_rerun), coalesce(sum(queue), 0), count(queue), coalesce(max(queue), 0)
         FROM used GROUP BY created / 86400, label;
         INSERT INTO evidence_cost_job SELECT created / 604800, job, count(*), sum(seconds), sum(seconds * is_rerun) FROM used GROUP BY created / 604800, job;
         INSERT INTO evidence_cost_pull SELECT p.name, r.pull, count(DISTINCT u.run), count(*), sum(u.seconds), sum(u.seconds * u.is_rerun), sum(u.failed), max(r.created), (SELECT n.title FROM run n JOIN workflow v ON v.id = n.workflow WHERE n.pull = r.pull AND v.repository = w.repository ORDER BY n.created DESC LIMIT 1)
         FROM used u JOIN run r ON r.id = u.run JOIN workflow w ON w.id = r.workflow JOIN repository p ON p.id = w.repository
         WHERE r.pull IS NOT NULL GROUP BY p.name, r.pull;
         DROP TABLE used;",
    )
}

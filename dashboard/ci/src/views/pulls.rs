//! Pull requests.

use schemars::JsonSchema;
use serde::Serialize;

use super::{Filter, all};
use crate::error::{Error, Result};
use crate::outcome::Outcome;
use crate::store::Store;

/// A pull request, as a row.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Pull {
    /// Owner and name.
    pub repository: String,
    /// Its number.
    pub pull: i64,
    /// Its title, as its last run has it.
    pub title: String,
    /// How many runs it had.
    pub runs: i64,
    /// Attempts of jobs that failed.
    pub failed: i64,
    /// Minutes of runners.
    pub minutes: i64,
    /// When it ran last.
    pub last: i64,
}

/// All pull requests, the ones that ran last first; at most 300.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Pulls {
    /// They.
    pub pulls: Vec<Pull>,
}

/// All pull requests.
///
/// # Errors
/// [`Error::Database`].
pub fn pulls(store: &Store, filter: &Filter) -> Result<Pulls> {
    filter.validate()?;
    let sql = "SELECT repository, pull, title, runs, failed, seconds / 60, last FROM evidence_cost_pull
         WHERE instr(lower(title || ' ' || pull), lower(?1)) > 0 ORDER BY last DESC LIMIT 300";
    Ok(Pulls { pulls: all(store, sql, &[&filter.q], row)? })
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Pull> {
    Ok(Pull {
        repository: row.get(0)?,
        pull: row.get(1)?,
        title: row.get(2)?,
        runs: row.get(3)?,
        failed: row.get(4)?,
        minutes: row.get(5)?,
        last: row.get(6)?,
    })
}

/// One attempt of a job of a pull request that did not pass, or passed only when it was tried again.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct PullRun {
    /// The job.
    pub job: i64,
    /// Its name.
    pub name: String,
    /// How the job is on the branch: what is red there is not the pull request's fault.
    pub on_branch: String,
    /// How it ended here.
    pub outcome: Outcome,
    /// Which attempt.
    pub attempt: i64,
    /// On which commit.
    pub sha: String,
    /// When.
    pub at: i64,
    /// Whether it has also passed on this commit.
    pub is_flake: bool,
    /// The attempt's page at GitHub.
    pub link: String,
}

/// A pull request's page.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct PullPage {
    /// The pull request.
    pub pull: Pull,
    /// What did not pass, the newest first; at most 300.
    pub runs: Vec<PullRun>,
}

/// A pull request.
///
/// # Errors
/// [`Error::Missing`], [`Error::Database`].
pub fn pull(store: &Store, repository: &str, number: i64) -> Result<PullPage> {
    let sql = "SELECT repository, pull, title, runs, failed, seconds / 60, last FROM evidence_cost_pull WHERE repository = ?1 AND pull = ?2";
    let found = all(store, sql, &[&repository, &number], row)?.into_iter().next();
    let pull = found.ok_or_else(|| Error::Missing(format!("pull request {number} of {repository}")))?;
    let runs = all(
        store,
        "SELECT e.job, j.name, coalesce(v.state, 'none'), e.outcome, e.attempt, r.sha, r.created, e.link,
                EXISTS (SELECT 1 FROM execution o JOIN run q ON q.id = o.run WHERE o.job = e.job AND q.sha = r.sha AND o.outcome = 0)
         FROM run r JOIN execution e ON e.run = r.id JOIN job j ON j.id = e.job LEFT JOIN evidence_job v ON v.job = e.job
         JOIN workflow w ON w.id = r.workflow JOIN repository p ON p.id = w.repository
         WHERE r.pull = ?2 AND p.name = ?1 AND e.outcome IN (1, 2, 5) ORDER BY r.created DESC, e.id DESC LIMIT 300",
        &[&repository, &number],
        |row| {
            Ok(PullRun {
                job: row.get(0)?,
                name: row.get(1)?,
                on_branch: row.get(2)?,
                outcome: Outcome::from_number(row.get(3)?),
                attempt: row.get(4)?,
                sha: row.get(5)?,
                at: row.get(6)?,
                link: row.get(7)?,
                is_flake: row.get(8)?,
            })
        },
    )?;
    Ok(PullPage { pull, runs })
}

//! Failures that say the same, and flakes.

use schemars::JsonSchema;
use serde::Serialize;

use super::{Filter, Rate, all, one};
use crate::error::Result;
use crate::store::Store;

/// Failures that say the same.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Cluster {
    /// Their number.
    pub id: i64,
    /// What they have in common.
    pub pattern: String,
    /// How many there are.
    pub failures: i64,
    /// In how many jobs.
    pub jobs: i64,
    /// Of how many tests.
    pub tests: i64,
    /// When it was seen first.
    pub first: i64,
    /// And last.
    pub last: i64,
    /// Where it is spoken about; empty where nobody has said.
    pub issue: String,
}

const COLUMNS: &str = "c.signature, s.pattern, c.failures, c.jobs, c.tests, c.first, c.last, c.issue FROM evidence_cluster c JOIN signature s ON s.id = c.signature";

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Cluster> {
    Ok(Cluster {
        id: row.get(0)?,
        pattern: row.get(1)?,
        failures: row.get(2)?,
        jobs: row.get(3)?,
        tests: row.get(4)?,
        first: row.get(5)?,
        last: row.get(6)?,
        issue: row.get(7)?,
    })
}

/// All clusters, the ones seen last first.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Failures {
    /// How many there are in all.
    pub all: usize,
    /// At most 300 of them.
    pub clusters: Vec<Cluster>,
}

/// Failures by what they say.
///
/// # Errors
/// [`crate::error::Error::Database`].
pub fn failures(store: &Store, filter: &Filter) -> Result<Failures> {
    filter.validate()?;
    let sql = format!(
        "SELECT {COLUMNS} WHERE instr(lower(s.pattern), lower(?1)) > 0 ORDER BY c.last DESC, c.failures DESC LIMIT 300"
    );
    let count = "SELECT count(*) FROM evidence_cluster";
    let all_of_them: i64 = store.read(|connection| connection.query_row(count, [], |row| row.get(0)))?;
    Ok(Failures { all: usize::try_from(all_of_them).unwrap_or(0), clusters: all(store, &sql, &[&filter.q], row)? })
}

/// One failure.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Failure {
    /// The job.
    pub job: i64,
    /// Its name.
    pub job_name: String,
    /// The test; 0 where the whole job failed.
    pub test: i64,
    /// Its name.
    pub test_name: String,
    /// When.
    pub at: i64,
    /// On which commit.
    pub sha: String,
    /// What it said.
    pub text: String,
    /// The attempt's page at GitHub.
    pub link: String,
}

/// A cluster's page.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct ClusterPage {
    /// The cluster.
    pub cluster: Cluster,
    /// At most 100 of its failures, the newest first.
    pub failures: Vec<Failure>,
}

/// Failures that say the same.
///
/// # Errors
/// [`crate::error::Error::Missing`], [`crate::error::Error::Database`].
pub fn cluster(store: &Store, id: i64) -> Result<ClusterPage> {
    let cluster = one(store, "cluster", &format!("SELECT {COLUMNS} WHERE c.signature = ?1"), id, row)?;
    let failures = all(
        store,
        "SELECT e.job, j.name, f.test, coalesce(t.name, ''), r.created, r.sha, f.text, e.link
         FROM failure f JOIN execution e ON e.id = f.execution JOIN run r ON r.id = e.run JOIN job j ON j.id = e.job LEFT JOIN test t ON t.id = f.test
         WHERE f.signature = ?1 ORDER BY r.created DESC LIMIT 100",
        &[&id],
        |row| {
            Ok(Failure {
                job: row.get(0)?,
                job_name: row.get(1)?,
                test: row.get(2)?,
                test_name: row.get(3)?,
                at: row.get(4)?,
                sha: row.get(5)?,
                text: row.get(6)?,
                link: row.get(7)?,
            })
        },
    )?;
    Ok(ClusterPage { cluster, failures })
}

/// A job or a test that has failed and passed on the same commit.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Flake {
    /// The job.
    pub job: i64,
    /// Its name.
    pub job_name: String,
    /// The test; 0 where it is the job as a whole.
    pub test: i64,
    /// Its name.
    pub test_name: String,
    /// Commits on which both was seen, of those with more than one end.
    pub commits: Rate,
    /// Failures of all ends on those commits.
    pub failures: Rate,
    /// When it ran last.
    pub last: i64,
    /// The commits: the evidence.
    pub evidence: Vec<String>,
}

/// All flakes.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Flakes {
    /// Jobs as a whole.
    pub jobs: Vec<Flake>,
    /// Tests.
    pub tests: Vec<Flake>,
}

/// What is flaky, by evidence; the worst first, at most 200 of each.
///
/// # Errors
/// [`crate::error::Error::Database`].
pub fn flakes(store: &Store, filter: &Filter) -> Result<Flakes> {
    filter.validate()?;
    let read = |what: &str| {
        let sql = format!(
            "SELECT k.job, j.name, k.test, coalesce(t.name, ''), k.flaky, k.compared, k.failures, k.runs, k.last, k.commits
             FROM evidence_flake k JOIN job j ON j.id = k.job LEFT JOIN test t ON t.id = k.test
             WHERE k.flaky > 0 AND {what} AND instr(lower(coalesce(t.name, '') || ' ' || j.name), lower(?1)) > 0
             ORDER BY k.flaky DESC, k.compared LIMIT 200"
        );
        all(store, &sql, &[&filter.q], |row| {
            let evidence: String = row.get(9)?;
            Ok(Flake {
                job: row.get(0)?,
                job_name: row.get(1)?,
                test: row.get(2)?,
                test_name: row.get(3)?,
                commits: Rate::new(row.get(4)?, row.get(5)?),
                failures: Rate::new(row.get(6)?, row.get(7)?),
                last: row.get(8)?,
                evidence: evidence.split_whitespace().map(str::to_owned).collect(),
            })
        })
    };
    Ok(Flakes { jobs: read("k.test = 0")?, tests: read("k.test <> 0")? })
}

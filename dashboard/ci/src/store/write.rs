//! What is stored of what was collected. Each of these writes a thing again without harm: newer figures take the place of older ones, and what the
//! source no longer tells stays.

use rusqlite::{OptionalExtension as _, Transaction, params};

use super::Store;
use crate::error::Result;
use crate::github::{Job, Run};
use crate::outcome::Outcome;
use crate::times;

/// The longest name that is kept, in characters.
const NAME_MAX: usize = 300;
/// The longest text of a failure that is kept, in characters.
const TEXT_MAX: usize = 2_000;

/// A run, and what is known of it beside the API's own words.
#[derive(Debug)]
pub struct RunToStore<'a> {
    /// Owner and name.
    pub repository: &'a str,
    /// The API's.
    pub run: &'a Run,
    /// The pull request it was for.
    pub pull: Option<i64>,
}

/// Where an attempt of a job is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredJob {
    /// Its row.
    pub execution: i64,
    /// How it ended.
    pub outcome: Outcome,
    /// Whether its log has been read before.
    pub has_log: bool,
}

/// How one test ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestResult {
    /// Its name, with the suite's before it.
    pub name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How long it took.
    pub millis: Option<i64>,
    /// What it said, where it failed.
    pub text: String,
}

/// One figure of a series.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// What the figures belong to.
    pub suite: String,
    /// What is measured.
    pub name: String,
    /// In what.
    pub unit: String,
    /// When.
    pub at: i64,
    /// On which commit.
    pub sha: String,
    /// Where, as JSON.
    pub environment: String,
    /// The figure: the median of the raw ones.
    pub value: f64,
    /// All that was measured.
    pub raw: Vec<f64>,
}

/// Text as it is kept: no control characters (they have no place in a name), at most `max` characters.
fn kept(text: &str, max: usize) -> String {
    text.chars().filter(|character| !character.is_control() || *character == '\n').take(max).collect()
}

/// Says a fact of the whole database.
pub(crate) fn set_fact(transaction: &Transaction<'_>, name: &str, value: &str) -> rusqlite::Result<()> {
    transaction
        .execute("INSERT INTO fact VALUES (?1, ?2) ON CONFLICT DO UPDATE SET value = excluded.value", [name, value])?;
    Ok(())
}

fn id(transaction: &Transaction<'_>, find: &str, make: &str, values: &[&dyn rusqlite::ToSql]) -> rusqlite::Result<i64> {
    if let Some(id) = transaction.prepare_cached(find)?.query_row(values, |row| row.get(0)).optional()? {
        return Ok(id);
    }
    transaction.prepare_cached(make)?.execute(values)?;
    Ok(transaction.last_insert_rowid())
}

pub(crate) fn repository(transaction: &Transaction<'_>, name: &str) -> rusqlite::Result<i64> {
    id(transaction, "SELECT id FROM repository WHERE name = ?1", "INSERT INTO repository (name) VALUES (?1)", &[&name])
}

fn workflow(transaction: &Transaction<'_>, repository: i64, path: &str, name: &str) -> rusqlite::Result<i64> {
    let id = id(
        transaction,
        "SELECT id FROM workflow WHERE repository = ?1 AND path = ?2",
        "INSERT INTO workflow (repository, path, name) VALUES (?1, ?2, '')",
        &[&repository, &path],
    )?;
    // Its file is what it is; its name may change.
    transaction.prepare_cached("UPDATE workflow SET name = ?2 WHERE id = ?1")?.execute(params![id, name])?;
    Ok(id)
}

impl Store {
    /// Stores a run; gives its row, and whether all jobs of this attempt are stored already.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn store_run(&mut self, given: &RunToStore<'_>) -> Result<(i64, bool)> {
        self.change(|transaction| store_run(transaction, given))
    }

    /// Stores attempts of a run's jobs, all or none.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn store_jobs<'a>(
        &mut self,
        run: i64,
        jobs: impl Iterator<Item = (&'a Job, Outcome)>,
    ) -> Result<Vec<StoredJob>> {
        self.change(|transaction| {
            let stored = jobs.map(|(job, outcome)| store_job(transaction, run, job, outcome));
            let stored = stored.collect::<rusqlite::Result<_>>()?;
            transaction
                .prepare_cached(
                    "UPDATE execution SET retold = attempt > 1 AND started IS NOT NULL AND EXISTS (
                        SELECT 1 FROM execution o WHERE o.run = execution.run AND o.job = execution.job
                        AND o.attempt < execution.attempt AND o.started = execution.started) WHERE run = ?1",
                )?
                .execute([run])?;
            Ok(stored)
        })
    }

    /// Says that everything of a run's latest attempt is stored.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn set_whole(&mut self, run: i64) -> Result<()> {
        self.change(|transaction| transaction.execute("UPDATE run SET whole = attempt WHERE id = ?1", [run]).map(drop))
    }

    /// Which of these numbers are known as those of jobs of another run: they would take their place.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn of_other_runs(&self, run: i64, jobs: &[i64]) -> Result<Vec<i64>> {
        self.read(|connection| {
            let mut find = connection
                .prepare_cached("SELECT EXISTS (SELECT 1 FROM execution WHERE external = ?1 AND run <> ?2)")?;
            let mut other = Vec::new();
            for job in jobs {
                if find.query_row([job, &run], |row| row.get(0))? {
                    other.push(*job);
                }
            }
            Ok(other)
        })
    }

    /// Stores the results of an attempt's tests. A test that is named twice has failed where it failed once. `said` is what the job as a whole said when it
    /// failed: it counts where no test says why.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn store_results(&mut self, execution: i64, results: &[TestResult], is_log: bool, said: &str) -> Result<()> {
        self.change(|transaction| {
            let find = "SELECT w.repository FROM execution e JOIN run r ON r.id = e.run JOIN workflow w ON w.id = r.workflow WHERE e.id = ?1";
            let repository: i64 = transaction.prepare_cached(find)?.query_row([execution], |row| row.get(0))?;
            for result in results {
                store_result(transaction, repository, execution, result)?;
            }
            let find = "SELECT EXISTS (SELECT 1 FROM result WHERE execution = ?1 AND outcome = 1)";
            let has_failed: bool = transaction.prepare_cached(find)?.query_row([execution], |row| row.get(0))?;
            if has_failed {
                // Where a test says why, what the job said as a whole says no more; and a job in which one failed did not fail to set up.
                transaction.prepare_cached("DELETE FROM failure WHERE execution = ?1 AND test = 0")?.execute([execution])?;
                transaction.prepare_cached("UPDATE execution SET outcome = 1 WHERE id = ?1 AND outcome = 2")?.execute([execution])?;
            } else if !said.is_empty() {
                store_failure(transaction, execution, 0, said)?;
            }
            if is_log {
                transaction.prepare_cached("UPDATE execution SET has_log = 1 WHERE id = ?1")?.execute([execution])?;
            }
            Ok(())
        })
    }

    /// Says which checks are required, all of a repository's at once.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn store_required(&mut self, repository_name: &str, names: &[String]) -> Result<()> {
        self.change(|transaction| {
            let repository = repository(transaction, repository_name)?;
            transaction.execute("DELETE FROM required WHERE repository = ?1", [repository])?;
            for name in names {
                let name = kept(name, NAME_MAX);
                transaction.execute("INSERT OR IGNORE INTO required VALUES (?1, ?2)", params![repository, name])?;
            }
            Ok(())
        })
    }

    /// Stores figures of a repository.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn store_points(&mut self, repository_name: &str, points: &[Point], execution: Option<i64>) -> Result<()> {
        self.change(|transaction| {
            let repository = repository(transaction, repository_name)?;
            for point in points {
                store_point(transaction, repository, point, execution)?;
            }
            Ok(())
        })
    }

    /// Stores what a gate has found: `state` is passed, failed or not run.
    ///
    /// # Errors
    /// [`crate::error::Error::Database`].
    pub fn store_assessment(
        &mut self,
        repository_name: &str,
        gate: &str,
        at: i64,
        sha: &str,
        state: &str,
        summary: &str,
    ) -> Result<()> {
        self.change(|transaction| {
            let repository = repository(transaction, repository_name)?;
            let (gate, summary) = (kept(gate, NAME_MAX), kept(summary, TEXT_MAX));
            transaction.execute(
                "INSERT OR REPLACE INTO assessment VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![repository, gate, at, kept(sha, 64), kept(state, 20), summary],
            )?;
            Ok(())
        })
    }
}

fn store_run(transaction: &Transaction<'_>, given: &RunToStore<'_>) -> rusqlite::Result<(i64, bool)> {
    let run = given.run;
    let text = |text: &Option<String>| kept(text.as_deref().unwrap_or_default(), NAME_MAX);
    let moment = |text: &Option<String>| text.as_deref().and_then(times::parse);
    let repository = repository(transaction, given.repository)?;
    // The file may have the branch behind it.
    let path =
        run.path.as_deref().and_then(|path| path.split('@').next()).or(run.name.as_deref()).unwrap_or("workflow");
    let name = run.name.as_deref().or(run.path.as_deref()).unwrap_or("workflow");
    let workflow = workflow(transaction, repository, &kept(path, NAME_MAX), &kept(name, NAME_MAX))?;
    let attempt = run.run_attempt.unwrap_or(1).clamp(1, 1000);
    let title =
        run.display_title.clone().or_else(|| run.head_commit.as_ref().and_then(|commit| commit.message.clone()));
    transaction
        .prepare_cached(
            "INSERT INTO run (external, workflow, number, event, branch, sha, pull, title, attempt, status, conclusion, created, updated, link)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)
             ON CONFLICT (external) DO UPDATE SET attempt = excluded.attempt, status = excluded.status, conclusion = excluded.conclusion,
                 updated = excluded.updated, title = excluded.title, pull = coalesce(excluded.pull, pull)",
        )?
        .execute(params![
            run.id,
            workflow,
            run.run_number,
            text(&run.event),
            text(&run.head_branch),
            text(&run.head_sha),
            given.pull,
            kept(title.as_deref().and_then(|title| title.lines().next()).unwrap_or_default(), NAME_MAX),
            attempt,
            text(&run.status),
            run.conclusion.as_deref().map(|conclusion| kept(conclusion, 40)),
            moment(&run.created_at).or_else(|| moment(&run.run_started_at)).unwrap_or(0),
            moment(&run.updated_at),
            text(&run.html_url),
        ])?;
    if let (Some(sha), Some(commit)) = (&run.head_sha, &run.head_commit) {
        let title = commit.message.as_deref().and_then(|message| message.lines().next()).unwrap_or_default();
        let author = commit.author.as_ref().and_then(|author| author.name.as_deref()).unwrap_or_default();
        transaction.prepare_cached("INSERT OR IGNORE INTO commits VALUES (?1, ?2, ?3, ?4)")?.execute(params![
            kept(sha, 64),
            kept(title, NAME_MAX),
            kept(author, NAME_MAX),
            moment(&commit.timestamp)
        ])?;
    }
    let find = "SELECT id, whole = attempt AND status = 'completed' FROM run WHERE external = ?1";
    transaction.prepare_cached(find)?.query_row([run.id], |row| Ok((row.get(0)?, row.get(1)?)))
}

fn store_job(transaction: &Transaction<'_>, run: i64, job: &Job, outcome: Outcome) -> rusqlite::Result<StoredJob> {
    let workflow: i64 =
        transaction.prepare_cached("SELECT workflow FROM run WHERE id = ?1")?.query_row([run], |row| row.get(0))?;
    let name = kept(&job.name, NAME_MAX);
    let named = id(
        transaction,
        "SELECT id FROM job WHERE workflow = ?1 AND name = ?2",
        "INSERT INTO job (workflow, name) VALUES (?1, ?2)",
        &[&workflow, &name],
    )?;
    let counts_as = counts_as(transaction, named)?;
    let moment = |text: &Option<String>| text.as_deref().and_then(times::parse);
    let mut labels = job.labels.clone();
    labels.sort();
    transaction
        .prepare_cached(
            "INSERT INTO execution (external, run, job, named, attempt, outcome, created, started, completed, label, runner, link)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)
             ON CONFLICT (external) DO UPDATE SET outcome = CASE WHEN excluded.outcome = 2 AND outcome = 1 THEN 1 ELSE excluded.outcome END,
                 started = excluded.started, completed = excluded.completed,
                 runner = excluded.runner, label = excluded.label",
        )?
        .execute(params![
            job.id,
            run,
            counts_as,
            named,
            job.run_attempt.unwrap_or(1).clamp(1, 1000),
            outcome.number(),
            moment(&job.created_at),
            moment(&job.started_at),
            moment(&job.completed_at),
            kept(&labels.join(", "), NAME_MAX),
            kept(job.runner_name.as_deref().unwrap_or_default(), NAME_MAX),
            kept(job.html_url.as_deref().unwrap_or_default(), NAME_MAX),
        ])?;
    let find = "SELECT id, has_log FROM execution WHERE external = ?1";
    let (execution, has_log) =
        transaction.prepare_cached(find)?.query_row([job.id], |row| Ok((row.get::<_, i64>(0)?, row.get(1)?)))?;
    let mut step = transaction.prepare_cached(
        "INSERT INTO step VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT DO UPDATE SET outcome = excluded.outcome, completed = excluded.completed",
    )?;
    for one in job.steps.iter().take(500) {
        let end = match one.conclusion.as_deref() {
            None => Outcome::Running,
            Some("success") => Outcome::Passed,
            Some("skipped") => Outcome::Skipped,
            Some("cancelled") => Outcome::Cancelled,
            Some(_) => Outcome::Failed,
        };
        let (started, completed) = (moment(&one.started_at), moment(&one.completed_at));
        step.execute(params![execution, one.number, kept(&one.name, NAME_MAX), end.number(), started, completed])?;
    }
    Ok(StoredJob { execution, outcome, has_log })
}

/// What a job is called now: the end of the renames that a person has confirmed.
pub(crate) fn counts_as(transaction: &Transaction<'_>, named: i64) -> rusqlite::Result<i64> {
    let mut job = named;
    let mut find = transaction.prepare_cached("SELECT new FROM rename WHERE old = ?1 AND state = 'confirmed'")?;
    // A chain is at most as long as there are renames; a circle is never confirmed.
    for _ in 0..100 {
        match find.query_row([job], |row| row.get(0)).optional()? {
            Some(new) => job = new,
            None => break,
        }
    }
    Ok(job)
}

fn store_result(
    transaction: &Transaction<'_>,
    repository: i64,
    execution: i64,
    result: &TestResult,
) -> rusqlite::Result<()> {
    let name = kept(&result.name, NAME_MAX);
    let test = id(
        transaction,
        "SELECT id FROM test WHERE repository = ?1 AND name = ?2",
        "INSERT INTO test (repository, name) VALUES (?1, ?2)",
        &[&repository, &name],
    )?;
    let changed = transaction
        .prepare_cached("INSERT INTO result VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET outcome = 1 WHERE excluded.outcome = 1 AND outcome <> 1")?
        .execute(params![test, execution, result.outcome.number(), result.millis])?;
    if changed > 0 && result.outcome == Outcome::Failed {
        store_failure(transaction, execution, test, &result.text)?;
    }
    Ok(())
}

fn store_failure(transaction: &Transaction<'_>, execution: i64, test: i64, text: &str) -> rusqlite::Result<()> {
    let text = kept(text, TEXT_MAX);
    let pattern = crate::evidence::signature(&text);
    if pattern.is_empty() {
        return Ok(());
    }
    let signature = id(
        transaction,
        "SELECT id FROM signature WHERE pattern = ?1",
        "INSERT INTO signature (pattern) VALUES (?1)",
        &[&pattern],
    )?;
    transaction
        .prepare_cached("INSERT OR REPLACE INTO failure VALUES (?1, ?2, ?3, ?4)")?
        .execute(params![execution, test, signature, text])?;
    Ok(())
}

fn store_point(
    transaction: &Transaction<'_>,
    repository: i64,
    point: &Point,
    execution: Option<i64>,
) -> rusqlite::Result<()> {
    let (suite, name, unit) = (kept(&point.suite, 80), kept(&point.name, NAME_MAX), kept(&point.unit, 40));
    let series = id(
        transaction,
        "SELECT id FROM series WHERE repository = ?1 AND suite = ?2 AND name = ?3 AND unit = ?4",
        "INSERT INTO series (repository, suite, name, unit) VALUES (?1, ?2, ?3, ?4)",
        &[&repository, &suite, &name, &unit],
    )?;
    let environment = id(
        transaction,
        "SELECT id FROM environment WHERE fingerprint = ?1",
        "INSERT INTO environment (fingerprint) VALUES (?1)",
        &[&kept(&point.environment, TEXT_MAX)],
    )?;
    let raw = serde_json::to_string(&point.raw).unwrap_or_default();
    transaction
        .prepare_cached("INSERT OR REPLACE INTO point VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)")?
        .execute(params![series, point.at, kept(&point.sha, 64), environment, point.value, raw, execution])?;
    Ok(())
}

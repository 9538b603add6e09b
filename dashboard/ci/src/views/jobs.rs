//! Jobs and tests.

use schemars::JsonSchema;
use serde::Serialize;

use super::{Filter, Rate, all, one};
use crate::error::Result;
use crate::evidence::Dot;
use crate::outcome::Outcome;
use crate::store::Store;
use crate::times;

/// A job, as a row.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Job {
    /// Its number.
    pub id: i64,
    /// Owner and name of its repository.
    pub repository: String,
    /// Its workflow.
    pub workflow: String,
    /// Its name.
    pub name: String,
    /// Whether a change must pass it.
    pub required: bool,
    /// Who looks after it; empty where nobody does.
    pub owner: String,
    /// How to reach them.
    pub contact: String,
    /// On the branch: passed, failed, not run; on changes where it never ran there; gone where its workflow runs without it.
    pub state: String,
    /// Since when.
    pub since: Option<i64>,
    /// For how many runs.
    pub streak: i64,
    /// Where it is red: the first commit on which it was.
    pub first_bad: Option<String>,
    /// The last commit on which it was green.
    pub last_good: Option<String>,
    /// Failures of the last 30 runs that ended.
    pub failures: Rate,
    /// Commits on which it failed and passed, of those on which it ended more than once.
    pub flaky: Rate,
    /// How many of the last 30 runs passed when they were tried again.
    pub rerun_passes: i64,
    /// What it takes, in seconds: the middle of the last 20 passes.
    pub seconds: Option<i64>,
    /// By which factor that has changed, where it has.
    pub trend: Option<f64>,
    /// Since when.
    pub trend_since: Option<String>,
    /// Its last results, the newest last.
    pub dots: Vec<Dot>,
    /// promote, demote, or nothing.
    pub advice: String,
    /// Why.
    pub advice_reason: String,
}

impl Job {
    /// Since when, for people.
    #[must_use]
    pub fn since_text(&self) -> String {
        self.since.map(times::day).unwrap_or_default()
    }

    /// What it takes, for people.
    #[must_use]
    pub fn time_text(&self) -> String {
        self.seconds.map(times::span).unwrap_or_default()
    }

    /// How its time has changed, for people.
    #[must_use]
    pub fn trend_text(&self) -> String {
        match (self.trend, &self.trend_since) {
            (Some(factor), Some(since)) => format!("{:+.0} % since {since}", 100.0 * (factor - 1.0)),
            _ => String::new(),
        }
    }

    /// The commits between which it broke, as GitHub shows them.
    #[must_use]
    pub fn compare_link(&self) -> Option<String> {
        let (good, bad) = (self.last_good.as_ref()?, self.first_bad.as_ref()?);
        Some(format!("https://github.com/{}/compare/{good}...{bad}", self.repository))
    }
}

const COLUMNS: &str =
    "job, repository, workflow, name, is_required, owner, contact, state, since, streak, first_bad, last_good,
    failures, verdicts, flaky, compared, rerun_passes, median_seconds, trend, trend_since, dots, advice, advice_reason";

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Job> {
    let dots: String = row.get(20)?;
    Ok(Job {
        id: row.get(0)?,
        repository: row.get(1)?,
        workflow: row.get(2)?,
        name: row.get(3)?,
        required: row.get(4)?,
        owner: row.get(5)?,
        contact: row.get(6)?,
        state: row.get(7)?,
        since: row.get(8)?,
        streak: row.get(9)?,
        first_bad: row.get(10)?,
        last_good: row.get(11)?,
        failures: Rate::new(row.get(12)?, row.get(13)?),
        flaky: Rate::new(row.get(14)?, row.get(15)?),
        rerun_passes: row.get(16)?,
        seconds: row.get(17)?,
        trend: row.get(18)?,
        trend_since: row.get(19)?,
        dots: serde_json::from_str(&dots).unwrap_or_default(),
        advice: row.get(21)?,
        advice_reason: row.get(22)?,
    })
}

/// All jobs, or those that a filter leaves.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Overview {
    /// How many are red, whatever the filter.
    pub failed: usize,
    /// How many of these are required.
    pub failed_required: usize,
    /// How many are green.
    pub passed: usize,
    /// How many did not run, or failed before they tested anything.
    pub not_run: usize,
    /// How many never ran on the branch.
    pub on_changes: usize,
    /// How many there are.
    pub all: usize,
    /// How many became slower.
    pub slower: usize,
    /// All who look after one.
    pub owners: Vec<String>,
    /// All repositories.
    pub repositories: Vec<String>,
    /// What the filter leaves.
    pub jobs: Vec<Job>,
}

fn is_slower(job: &Job) -> bool {
    job.trend.is_some_and(|factor| factor > 1.0)
}

/// What is red, since when, whose.
///
/// # Errors
/// [`crate::error::Error::Database`]; [`crate::error::Error::Query`] for a filter's choice that there is not.
pub fn overview(store: &Store, filter: &Filter) -> Result<Overview> {
    filter.validate()?;
    let order = match filter.sort.as_str() {
        "name" => "name",
        "failures" => "failures DESC, name",
        "flaky" => "flaky DESC, name",
        "time" => "median_seconds DESC, name",
        _ => "state = 'gone', state = 'on changes', state = 'passed', state = 'not run', NOT is_required, since, name",
    };
    let jobs = all(store, &format!("SELECT {COLUMNS} FROM evidence_job ORDER BY {order}"), &[], row)?;
    let count = |is: &dyn Fn(&Job) -> bool| jobs.iter().filter(|job| is(job)).count();
    let names = |of: &dyn Fn(&Job) -> &String| {
        let names: std::collections::BTreeSet<&String> = jobs.iter().map(of).filter(|name| !name.is_empty()).collect();
        names.into_iter().cloned().collect::<Vec<_>>()
    };
    let (owners, repositories) = (names(&|job| &job.owner), names(&|job| &job.repository));
    let failed = count(&|job| job.state == "failed");
    let failed_required = count(&|job| job.state == "failed" && job.required);
    let passed = count(&|job| job.state == "passed");
    let (slower, not_run) = (count(&is_slower), count(&|job| job.state == "not run"));
    let all_of_them = jobs.len();
    let on_changes = count(&|job| job.state == "on changes");
    let q = filter.q.to_lowercase();
    let is_left = |job: &Job| {
        let status = match filter.status.as_str() {
            "" => true,
            "slower" => is_slower(job),
            state => job.state == state,
        };
        status
            && (filter.kind.is_empty() || job.required == (filter.kind == "required"))
            && (filter.owner.is_empty() || job.owner == filter.owner)
            && (filter.repository.is_empty() || job.repository == filter.repository)
            && (q.is_empty() || job.name.to_lowercase().contains(&q))
    };
    let jobs = jobs.into_iter().filter(is_left).collect();
    Ok(Overview {
        failed,
        failed_required,
        passed,
        not_run,
        on_changes,
        all: all_of_them,
        slower,
        owners,
        repositories,
        jobs,
    })
}

/// A test that failed in an attempt.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct FailedTest {
    /// Its number; 0 where the whole job failed.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// What it said.
    pub text: String,
    /// The failures that say the same.
    pub cluster: i64,
}

/// One attempt of a job.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Execution {
    /// Its number here.
    pub id: i64,
    /// Which attempt.
    pub attempt: i64,
    /// How it ended.
    pub outcome: Outcome,
    /// When its run was made.
    pub at: i64,
    /// Its commit.
    pub sha: String,
    /// The commit's first line.
    pub title: String,
    /// The branch, and what started it.
    pub branch: String,
    /// See above.
    pub event: String,
    /// What it took, in seconds; none where a clock was wrong.
    pub seconds: Option<i64>,
    /// How long it was queued, in seconds.
    pub queue_seconds: Option<i64>,
    /// Who ran it.
    pub runner: String,
    /// Its page at GitHub.
    pub link: String,
    /// The step that failed.
    pub failed_step: String,
    /// What failed in it.
    pub failed: Vec<FailedTest>,
}

/// A job's page.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct JobPage {
    /// The job.
    pub job: Job,
    /// Its last attempts on any branch, the newest first.
    pub executions: Vec<Execution>,
    /// The commits on which it failed and passed.
    pub flaky_commits: Vec<String>,
    /// Names that it had.
    pub names: Vec<String>,
    /// What is known of the first bad commit: its title and who made it.
    pub first_bad: Option<(String, String)>,
    /// Until when nothing is told of it, and why.
    pub muted: Option<(String, String)>,
}

/// How many attempts a page shows.
const SHOWN: i64 = 120;

/// A job.
///
/// # Errors
/// [`crate::error::Error::Missing`], [`crate::error::Error::Database`].
pub fn job(store: &Store, id: i64) -> Result<JobPage> {
    let job = one(store, "job", &format!("SELECT {COLUMNS} FROM evidence_job WHERE job = ?1"), id, row)?;
    // The marks of the row lead to theirs, whatever ran since.
    let shown =
        serde_json::to_string(&job.dots.iter().map(|dot| dot.execution).collect::<Vec<_>>()).unwrap_or_default();
    let mut executions = all(
        store,
        "SELECT e.id, e.attempt, e.outcome, r.created, r.sha, coalesce(c.title, r.title), r.branch, r.event, e.created, e.started, e.completed, e.runner, e.link,
                (SELECT s.name FROM step s WHERE s.execution = e.id AND s.outcome = 1 ORDER BY s.number LIMIT 1)
         FROM execution e JOIN run r ON r.id = e.run LEFT JOIN commits c ON c.sha = r.sha
         WHERE e.job = ?1 AND (e.id IN (SELECT id FROM execution WHERE job = ?1 ORDER BY created DESC, id DESC LIMIT ?2)
             OR e.id IN (SELECT value FROM json_each(?3)))
         ORDER BY e.created DESC, e.id DESC",
        &[&id, &SHOWN, &shown],
        |row| {
            let (created, started, completed) = (row.get(8)?, row.get(9)?, row.get(10)?);
            Ok(Execution {
                id: row.get(0)?,
                attempt: row.get(1)?,
                outcome: Outcome::from_number(row.get(2)?),
                at: row.get(3)?,
                sha: row.get(4)?,
                title: row.get(5)?,
                branch: row.get(6)?,
                event: row.get(7)?,
                seconds: times::between(started, completed),
                queue_seconds: times::between(created, started),
                runner: row.get(11)?,
                link: row.get(12)?,
                failed_step: row.get::<_, Option<String>>(13)?.unwrap_or_default(),
                failed: Vec::new(),
            })
        },
    )?;
    for execution in executions.iter_mut().filter(|execution| execution.outcome != Outcome::Passed) {
        execution.failed = failed(store, execution.id)?;
    }
    let commits = "SELECT commits FROM evidence_flake WHERE test = 0 AND job = ?1 AND flaky > 0";
    let commits = all(store, commits, &[&id], |row| row.get::<_, String>(0))?;
    let flaky_commits = commits.iter().flat_map(|commits| commits.split_whitespace()).map(str::to_owned).collect();
    let names =
        "SELECT DISTINCT j.name FROM rename n JOIN job j ON j.id = n.old WHERE n.new = ?1 AND n.state = 'confirmed'";
    let names = all(store, names, &[&id], |row| row.get(0))?;
    let muted = "SELECT until, reason FROM mute WHERE job = ?1";
    let muted = all(store, muted, &[&id], |row| Ok((times::moment(row.get(0)?), row.get(1)?)))?.into_iter().next();
    let commit = "SELECT title, author FROM commits WHERE sha = ?1";
    let first_bad = all(store, commit, &[&job.first_bad], |row| Ok((row.get(0)?, row.get(1)?)))?.into_iter().next();
    Ok(JobPage { job, executions, flaky_commits, names, first_bad, muted })
}

/// What failed in an attempt; a failed test that said nothing is one, too.
fn failed(store: &Store, execution: i64) -> Result<Vec<FailedTest>> {
    all(
        store,
        "SELECT x.test, coalesce(t.name, ''), coalesce(f.text, ''), coalesce(f.signature, 0)
         FROM (SELECT test FROM result WHERE execution = ?1 AND outcome = 1 UNION SELECT test FROM failure WHERE execution = ?1) x
         LEFT JOIN failure f ON f.execution = ?1 AND f.test = x.test LEFT JOIN test t ON t.id = x.test LIMIT 100",
        &[&execution],
        |row| Ok(FailedTest { id: row.get(0)?, name: row.get(1)?, text: row.get(2)?, cluster: row.get(3)? }),
    )
}

/// One end of a test.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct TestResult {
    /// The job that ran it.
    pub job: i64,
    /// Its name.
    pub job_name: String,
    /// How it ended.
    pub outcome: Outcome,
    /// What it took, in milliseconds.
    pub millis: Option<i64>,
    /// When.
    pub at: i64,
    /// On which commit.
    pub sha: String,
    /// What it said.
    pub text: String,
    /// The attempt's page at GitHub.
    pub link: String,
}

/// A test's page.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct TestPage {
    /// Its number.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// Failures among what is shown.
    pub failures: Rate,
    /// When it failed first, of all that is stored.
    pub first_failed: Option<i64>,
    /// By job: the share of commits on which it failed and passed.
    pub flakes: Vec<(String, Rate)>,
    /// Its last ends in whatever job, the newest first.
    pub results: Vec<TestResult>,
}

/// A test.
///
/// # Errors
/// As [`job`].
pub fn test(store: &Store, id: i64) -> Result<TestPage> {
    let name = one(store, "test", "SELECT name FROM test WHERE id = ?1", id, |row| row.get::<_, String>(0))?;
    let mut results = all(
        store,
        "SELECT e.job, j.name, t.outcome, t.millis, r.created, r.sha, coalesce(f.text, ''), e.link
         FROM result t JOIN execution e ON e.id = t.execution JOIN run r ON r.id = e.run JOIN job j ON j.id = e.job
         LEFT JOIN failure f ON f.execution = t.execution AND f.test = t.test
         WHERE t.test = ?1 ORDER BY t.execution DESC LIMIT ?2",
        &[&id, &(2 * SHOWN)],
        |row| {
            Ok(TestResult {
                job: row.get(0)?,
                job_name: row.get(1)?,
                outcome: Outcome::from_number(row.get(2)?),
                millis: row.get(3)?,
                at: row.get(4)?,
                sha: row.get(5)?,
                text: row.get(6)?,
                link: row.get(7)?,
            })
        },
    )?;
    results.sort_by_key(|result| std::cmp::Reverse(result.at));
    let ended = results.iter().filter_map(|result| result.outcome.verdict());
    let (count, failures) = ended.fold((0, 0), |(count, failures), good| (count + 1, failures + i64::from(!good)));
    let flakes = all(
        store,
        "SELECT j.name, k.flaky, k.compared FROM evidence_flake k JOIN job j ON j.id = k.job WHERE k.test = ?1",
        &[&id],
        |row| Ok((row.get(0)?, Rate::new(row.get(1)?, row.get(2)?))),
    )?;
    let first = "SELECT min(r.created) FROM result t JOIN execution e ON e.id = t.execution JOIN run r ON r.id = e.run WHERE t.test = ?1 AND t.outcome = 1";
    let first_failed = one(store, "test", first, id, |row| row.get(0))?;
    Ok(TestPage { id, name, failures: Rate::new(failures, count), first_failed, flakes, results })
}

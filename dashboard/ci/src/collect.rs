//! From a source to the store: what is new, and what has changed. It can be broken off at any point and goes on from there: each run is stored by
//! itself, and is whole once all jobs of its latest attempt are.

mod api;
mod files;
mod zipped;

use std::io::BufRead;

pub use api::{Api, ApiOptions};
pub use files::Files;

use crate::error::{Error, Result};
use crate::github::{Job, Run};
use crate::outcome::{self, Outcome};
use crate::results;
use crate::settings::{Repository, Settings};
use crate::store::{RunToStore, Store, StoredJob};
use crate::times;

/// Something that a job or a run has left behind.
pub struct Report {
    /// Its name in errors.
    pub what: String,
    /// The file's name, by whose end it is known.
    pub name: String,
    /// What is in it.
    pub body: Box<dyn BufRead>,
}

/// What a gate has found.
#[derive(Debug, Clone, serde::Deserialize)]
pub struct Assessment {
    /// Which.
    pub gate: String,
    /// When.
    pub at: String,
    /// On which commit.
    #[serde(default)]
    pub commit: String,
    /// passed, failed, or not run.
    pub state: String,
    /// In a sentence.
    #[serde(default)]
    pub summary: String,
}

/// Where results come from. What one does not know of is none, as below.
pub trait Source {
    /// The runs of a repository that were made since then, a page of them (from 1); none after the last page.
    ///
    /// # Errors
    /// What the source has.
    fn runs(&mut self, repository: &Repository, page: u32, since: i64) -> Result<Option<Vec<Run>>>;

    /// All attempts of a run's jobs; none where the source does not know them (yet).
    ///
    /// # Errors
    /// What the source has.
    fn jobs(&mut self, repository: &Repository, run: i64) -> Result<Option<Vec<Job>>>;

    /// A job's log, to be read as it comes; none where there is none (any more).
    ///
    /// # Errors
    /// What the source has.
    fn log(&mut self, _repository: &Repository, _job: i64) -> Result<Option<Box<dyn BufRead>>> {
        Ok(None)
    }

    /// Whether logs of jobs that passed should be read, too.
    fn has_all_logs(&self) -> bool {
        false
    }

    /// Reports of a run, each with the job it belongs to.
    ///
    /// # Errors
    /// What the source has.
    fn reports(&mut self, _repository: &Repository, _run: i64, _jobs: &[(i64, String)]) -> Result<Vec<(i64, Report)>> {
        Ok(Vec::new())
    }

    /// The checks that a repository requires; none where the source does not know.
    ///
    /// # Errors
    /// What the source has.
    fn required(&mut self, _repository: &Repository) -> Result<Option<Vec<String>>> {
        Ok(None)
    }

    /// What gates have found.
    ///
    /// # Errors
    /// What the source has.
    fn assessments(&mut self, _repository: &Repository) -> Result<Vec<Assessment>> {
        Ok(Vec::new())
    }

    /// The pull request of a commit, where a run does not say it.
    ///
    /// # Errors
    /// What the source has.
    fn pull(&mut self, _repository: &Repository, _sha: &str) -> Result<Option<i64>> {
        Ok(None)
    }
}

/// What a collection has done.
#[derive(Debug, Default, serde::Serialize)]
pub struct Collected {
    /// Runs that were new or had changed.
    pub runs: u64,
    /// Attempts of jobs that were stored.
    pub jobs: u64,
    /// Logs that were read.
    pub logs: u64,
    /// Results of tests.
    pub results: u64,
    /// Figures.
    pub points: u64,
    /// What could not be read; the next collection tries it again.
    pub problems: Vec<String>,
}

/// Whether a name is owner and name, with the characters that GitHub has in them.
#[must_use]
pub fn is_repository(name: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.chars().all(|one| one.is_ascii_alphanumeric() || matches!(one, '-' | '_' | '.'))
    };
    name.split_once('/').is_some_and(|(owner, name)| is_part(owner) && is_part(name))
}

/// Collects everything of a repository since a moment.
///
/// # Errors
/// [`Error::Database`], and [`Error::Limited`] where the source gives no more: what was read before is stored. Everything else becomes one of the
/// problems.
pub fn collect(
    store: &mut Store,
    source: &mut dyn Source,
    settings: &Settings,
    repository: &Repository,
    since: i64,
    collected: &mut Collected,
) -> Result<()> {
    let required = if repository.required.is_empty() {
        source.required(repository)
    } else {
        Ok(Some(repository.required.clone()))
    };
    if let Some(Some(required)) = unless_fatal(required, collected)? {
        store.store_required(&repository.name, &required)?;
    }
    for page in 1.. {
        let Some(Some(runs)) = unless_fatal(source.runs(repository, page, since), collected)? else { break };
        for run in runs.iter().filter(|run| made(run).is_none_or(|made| made >= since)) {
            let done = one_run(store, source, settings, repository, run, collected);
            unless_fatal(done, collected)?;
        }
    }
    if let Some(assessments) = unless_fatal(source.assessments(repository), collected)? {
        for found in assessments {
            let Some(at) = times::parse(&found.at) else {
                collected.problems.push(format!("the assessment {}: {:?} is no moment", found.gate, found.at));
                continue;
            };
            store.store_assessment(&repository.name, &found.gate, at, &found.commit, &found.state, &found.summary)?;
        }
    }
    Ok(())
}

/// A problem of one thing is noted; one of the store, or a source that gives no more, ends the collection.
fn unless_fatal<T>(result: Result<T>, collected: &mut Collected) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error @ (Error::Database { .. } | Error::Limited { .. })) => Err(error),
        Err(error) => {
            collected.problems.push(error.to_string());
            Ok(None)
        }
    }
}

fn made(run: &Run) -> Option<i64> {
    run.created_at.as_deref().and_then(times::parse)
}

fn one_run(
    store: &mut Store,
    source: &mut dyn Source,
    settings: &Settings,
    repository: &Repository,
    run: &Run,
    collected: &mut Collected,
) -> Result<()> {
    let is_wanted = |run: &Run| {
        let path = run.path.as_deref().unwrap_or_default();
        repository.workflows.is_empty()
            || repository.workflows.iter().any(|workflow| path == workflow || path.ends_with(&format!("/{workflow}")))
    };
    if !is_wanted(run) {
        return Ok(());
    }
    let (row, is_whole) =
        store.store_run(&RunToStore { repository: &repository.name, run, pull: own_pull(repository, run) })?;
    if is_whole {
        return Ok(());
    }
    collected.runs += 1;
    if run.event.as_deref().is_some_and(|event| event.starts_with("pull_request"))
        && own_pull(repository, run).is_none()
    {
        let sha = run.head_sha.clone().unwrap_or_default();
        if let Some(pull) = source.pull(repository, &sha)? {
            store.store_run(&RunToStore { repository: &repository.name, run, pull: Some(pull) })?;
        }
    }
    let Some(jobs) = source.jobs(repository, run.id)? else { return Ok(()) };
    let attempt = run.run_attempt.unwrap_or(1);
    let judged: Vec<(Job, Outcome)> = jobs
        .into_iter()
        .map(|job| (outcome::of_job(&job, &settings.test_steps), job))
        .map(|(end, job)| (job, end))
        .collect();
    let has_ended =
        run.status.as_deref() == Some("completed") && judged.iter().all(|(_, end)| *end != Outcome::Running);
    // Not whole before the logs and reports have been read, too: what breaks off here is read again.
    let stored = store.store_jobs(row, &judged, None)?;
    collected.jobs += stored.len() as u64;
    let problems = collected.problems.len();
    read_reports(store, source, repository, run.id, &judged, &stored, collected)?;
    for ((job, _), stored) in judged.iter().zip(&stored) {
        let is_read = source.has_all_logs()
            || matches!(stored.outcome, Outcome::Failed | Outcome::SetupFailed | Outcome::TimedOut);
        if is_read && !stored.has_log && stored.outcome != Outcome::Running {
            let read = read_log(store, source, repository, job, *stored, collected);
            unless_fatal(read, collected)?;
        }
    }
    if has_ended && collected.problems.len() == problems {
        store.store_jobs(row, &[], Some(attempt))?;
    }
    Ok(())
}

/// The pull request that a run was for. What the API lists for a run of a branch are pull requests of forks.
fn own_pull(repository: &Repository, run: &Run) -> Option<i64> {
    if !run.event.as_deref()?.starts_with("pull_request") {
        return None;
    }
    let own = format!("/repos/{}", repository.name);
    let is_own = |base: &crate::github::Base| {
        base.repo.as_ref().and_then(|repo| repo.url.as_deref()).is_none_or(|url| url.ends_with(&own))
    };
    run.pull_requests.iter().find(|pull| pull.base.as_ref().is_none_or(is_own)).map(|pull| pull.number)
}

fn read_log(
    store: &mut Store,
    source: &mut dyn Source,
    repository: &Repository,
    job: &Job,
    stored: StoredJob,
    collected: &mut Collected,
) -> Result<()> {
    let Some(body) = source.log(repository, job.id)? else { return Ok(()) };
    let found = results::log(body, &format!("the log of job {}", job.id))?;
    collected.logs += 1;
    collected.results += found.results.len() as u64;
    store.store_results(stored.execution, &found.results, true)?;
    // Where a test says why, the log's last lines say no more.
    if stored.outcome != Outcome::Passed && !found.error.is_empty() && !store.has_failed_tests(stored.execution)? {
        store.store_failure(stored.execution, &found.error)?;
    }
    Ok(())
}

fn read_reports(
    store: &mut Store,
    source: &mut dyn Source,
    repository: &Repository,
    run: i64,
    judged: &[(Job, Outcome)],
    stored: &[StoredJob],
    collected: &mut Collected,
) -> Result<()> {
    let jobs: Vec<(i64, String)> = judged.iter().map(|(job, _)| (job.id, job.name.clone())).collect();
    let Some(reports) = unless_fatal(source.reports(repository, run, &jobs), collected)? else { return Ok(()) };
    for (job, report) in reports {
        let Some(execution) =
            jobs.iter().zip(stored).find(|((id, _), _)| *id == job).map(|(_, stored)| stored.execution)
        else {
            continue;
        };
        let read = read_report(store, repository, execution, report, collected);
        unless_fatal(read, collected)?;
    }
    Ok(())
}

fn read_report(
    store: &mut Store,
    repository: &Repository,
    execution: i64,
    report: Report,
    collected: &mut Collected,
) -> Result<()> {
    use std::io::Read as _;
    let end = report.name.rsplit('.').next().unwrap_or_default().to_ascii_lowercase();
    let found = match end.as_str() {
        "xml" => results::junit(report.body, &report.what)?,
        "tap" => results::log(report.body, &report.what)?.results,
        "json" => {
            let fault = |reason: String| Error::Malformed { what: report.what.clone(), reason };
            let document =
                serde_json::from_reader(report.body.take(64 << 20)).map_err(|error| fault(error.to_string()))?;
            if results::is_bench(&document) {
                let points = results::points(document, &report.what)?;
                collected.points += points.len() as u64;
                store.store_points(&repository.name, &points, Some(execution))?;
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    collected.results += found.len() as u64;
    store.store_results(execution, &found, false)
}

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

/// The most bytes of a report of figures.
const FIGURES_MAX: u64 = 8 << 20;

/// Something that a job or a run has left behind.
pub struct Report {
    /// Its name in errors.
    pub what: String,
    /// The file's name, by whose end it is known.
    pub name: String,
    /// What is in it.
    pub body: Box<dyn BufRead>,
}

/// Takes a report, or what is wrong with one.
pub type TakeReport<'a> = dyn FnMut(Result<(i64, Report)>) -> Result<()> + 'a;

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

    /// Hands over the reports of a run, one after another, each with the number of the job it belongs to; and what is wrong with one that cannot be
    /// read, or is not.
    ///
    /// # Errors
    /// What the source has, and what `take` gives.
    fn reports(
        &mut self,
        _repository: &Repository,
        _run: i64,
        _jobs: &[Job],
        _take: &mut TakeReport<'_>,
    ) -> Result<()> {
        Ok(())
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

    /// The pull request that a run was for, where the run does not say it: that is so where its branch is a fork's.
    ///
    /// # Errors
    /// What the source has.
    fn pull(&mut self, _repository: &Repository, _run: &Run) -> Result<Option<i64>> {
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
    /// What could not be read. What may be there the next time is tried again then.
    pub problems: Vec<String>,
    /// Whether every list of runs was read to its end.
    pub is_whole: bool,
    /// How many of the problems may be none the next time.
    #[serde(skip)]
    passing: u64,
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
    collected.is_whole = false;
    for page in 1.. {
        let runs = match unless_fatal(source.runs(repository, page, since), collected)? {
            Some(Some(runs)) => runs,
            Some(None) => {
                collected.is_whole = true;
                break;
            }
            None => break,
        };
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
            // What is no report today is none tomorrow.
            collected.passing += u64::from(!matches!(error, Error::Malformed { .. }));
            collected.problems.push(error.to_string());
            Ok(None)
        }
    }
}

fn made(run: &Run) -> Option<i64> {
    run.created_at.as_deref().and_then(times::parse)
}

/// Whether a workflow's file is one that is to be collected.
fn is_wanted(repository: &Repository, run: &Run) -> bool {
    let path = run.path.as_deref().unwrap_or_default();
    let is_it = |workflow: &String| path == workflow || path.ends_with(&format!("/{workflow}"));
    repository.workflows.is_empty() || repository.workflows.iter().any(is_it)
}

fn one_run(
    store: &mut Store,
    source: &mut dyn Source,
    settings: &Settings,
    repository: &Repository,
    run: &Run,
    collected: &mut Collected,
) -> Result<()> {
    if !is_wanted(repository, run) {
        return Ok(());
    }
    let own = own_pull(repository, run);
    let (row, is_whole) = store.store_run(&RunToStore { repository: &repository.name, run, pull: own })?;
    if is_whole {
        return Ok(());
    }
    collected.runs += 1;
    let passing = collected.passing;
    if is_of_change(run) && own.is_none() {
        let found = source.pull(repository, run);
        if let Some(Some(pull)) = unless_fatal(found, collected)? {
            store.store_run(&RunToStore { repository: &repository.name, run, pull: Some(pull) })?;
        }
    }
    let Some(jobs) = source.jobs(repository, run.id)? else { return Ok(()) };
    let numbers: Vec<i64> = jobs.iter().map(|job| job.id).collect();
    if let Some(other) = store.of_other_runs(row, &numbers)?.first() {
        let reason = format!("job {other} is known as one of another run: numbers of jobs must be unique");
        return Err(Error::Malformed { what: format!("run {}", run.id), reason });
    }
    // Not whole before the logs and reports have been read, too: what breaks off here is read again.
    let judged = jobs.iter().map(|job| (job, outcome::of_job(job, &settings.test_steps)));
    let stored = store.store_jobs(row, judged)?;
    collected.jobs += stored.len() as u64;
    let is_of_branch = !is_of_change(run) && run.head_branch.as_deref() == Some(settings.branch(&repository.name));
    read_reports(store, source, repository, (run.id, is_of_branch), &jobs, &stored, collected)?;
    for (job, stored) in jobs.iter().zip(&stored) {
        // A pass after a failure is read, too: what it passed is what was flaky.
        let is_read = source.has_all_logs()
            || stored.outcome.verdict() == Some(false)
            || stored.outcome == Outcome::SetupFailed
            || job.run_attempt > Some(1);
        if is_read && !stored.has_log && stored.outcome != Outcome::Running {
            let read = read_log(store, source, repository, job, *stored, collected);
            unless_fatal(read, collected)?;
        }
    }
    let has_ended =
        run.status.as_deref() == Some("completed") && stored.iter().all(|stored| stored.outcome != Outcome::Running);
    if has_ended && collected.passing == passing {
        store.set_whole(row)?;
    }
    Ok(())
}

/// Whether a run looks at a change that is not on its branch yet.
fn is_of_change(run: &Run) -> bool {
    run.event.as_deref().is_some_and(|event| event.starts_with("pull_request") || event == "merge_group")
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
    let said = if stored.outcome == Outcome::Passed { "" } else { found.error.as_str() };
    store.store_results(stored.execution, &found.results, true, said)
}

fn read_reports(
    store: &mut Store,
    source: &mut dyn Source,
    repository: &Repository,
    (run, is_of_branch): (i64, bool),
    jobs: &[Job],
    stored: &[StoredJob],
    collected: &mut Collected,
) -> Result<()> {
    let read = source.reports(repository, run, jobs, &mut |report| {
        let read = report.and_then(|(job, report)| {
            let found = jobs.iter().zip(stored).find(|(known, _)| known.id == job);
            let Some(execution) = found.map(|(_, stored)| stored.execution) else { return Ok(()) };
            read_report(store, repository, execution, is_of_branch, report, collected)
        });
        unless_fatal(read, collected).map(drop)
    });
    unless_fatal(read, collected).map(drop)
}

fn read_report(
    store: &mut Store,
    repository: &Repository,
    execution: i64,
    is_of_branch: bool,
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
                serde_json::from_reader(report.body.take(FIGURES_MAX)).map_err(|error| fault(error.to_string()))?;
            // A change's figures are not the project's.
            if results::is_bench(&document) && is_of_branch {
                let points = results::points(document, &report.what)?;
                collected.points += points.len() as u64;
                store.store_points(&repository.name, &points, Some(execution))?;
            }
            return Ok(());
        }
        _ => return Ok(()),
    };
    collected.results += found.len() as u64;
    store.store_results(execution, &found, false, "")
}

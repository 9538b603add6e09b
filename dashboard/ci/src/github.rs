//! The API's answers, as far as they are used (GitHub REST API, version 2022-11-28, "Actions"). What is not known is left out; what is missing is
//! taken as not told.

use serde::{Deserialize, Deserializer, Serialize};

/// A list that may be told as `null`.
fn listed<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Vec<T>, D::Error> {
    Option::deserialize(from).map(Option::unwrap_or_default)
}

/// `GET /repos/{repository}/actions/runs`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
pub struct Runs {
    /// How many there are on all pages.
    #[serde(default)]
    pub total_count: u64,
    /// Those of this page.
    pub workflow_runs: Vec<Run>,
}

/// A run of a workflow.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Run {
    /// Its number in all of GitHub.
    pub id: i64,
    /// The workflow's name.
    pub name: Option<String>,
    /// The workflow's file.
    pub path: Option<String>,
    /// What started it: schedule, push, pull_request, pull_request_target, workflow_dispatch, ...
    pub event: Option<String>,
    /// The branch of its commit.
    pub head_branch: Option<String>,
    /// Its commit.
    pub head_sha: Option<String>,
    /// What is told of the commit.
    pub head_commit: Option<Commit>,
    /// The workflow's count of runs.
    pub run_number: Option<i64>,
    /// How often it has been tried.
    pub run_attempt: Option<i64>,
    /// queued, in_progress, completed, ...
    pub status: Option<String>,
    /// How it ended.
    pub conclusion: Option<String>,
    /// When it was made.
    pub created_at: Option<String>,
    /// When its last attempt began.
    pub run_started_at: Option<String>,
    /// When something of it changed last.
    pub updated_at: Option<String>,
    /// What it is called in lists.
    pub display_title: Option<String>,
    /// Its page.
    pub html_url: Option<String>,
    /// The pull requests that have its commit as their head. Of a run on the default branch these are the ones of forks, which are not its own.
    #[serde(deserialize_with = "listed")]
    pub pull_requests: Vec<Pull>,
    /// Where it belongs to.
    pub repository: Option<Repository>,
    /// Where its branch is: another one's, for a fork's pull request.
    pub head_repository: Option<Repository>,
}

/// A commit.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Commit {
    /// Its message.
    pub message: Option<String>,
    /// When it was made.
    pub timestamp: Option<String>,
    /// Who made it.
    pub author: Option<Author>,
}

/// Who made a commit.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Author {
    /// As the commit says.
    pub name: Option<String>,
}

/// A pull request, as a run names it.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Pull {
    /// Its number.
    pub number: i64,
    /// Where it goes to.
    pub base: Option<Base>,
}

/// Where a pull request goes to.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Base {
    /// The repository, by its short name.
    pub repo: Option<BaseRepository>,
}

/// A repository, as a pull request names it.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct BaseRepository {
    /// Its address in the API, which ends with owner and name.
    pub url: Option<String>,
}

/// A repository.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Repository {
    /// Owner and name.
    pub full_name: Option<String>,
}

/// `GET /repos/{repository}/actions/runs/{run}/jobs?filter=all`.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
pub struct Jobs {
    /// How many there are on all pages.
    #[serde(default)]
    pub total_count: u64,
    /// Those of this page.
    pub jobs: Vec<Job>,
}

/// One attempt of a job.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Job {
    /// Its number in all of GitHub; each attempt has its own.
    pub id: i64,
    /// The run it belongs to.
    pub run_id: i64,
    /// Which attempt of the run.
    pub run_attempt: Option<i64>,
    /// Its name with the matrix' values; of more than 100 characters the end is cut.
    pub name: String,
    /// Its commit.
    pub head_sha: Option<String>,
    /// The workflow's name.
    pub workflow_name: Option<String>,
    /// queued, in_progress, completed, ...
    pub status: Option<String>,
    /// success, failure, cancelled, skipped, timed_out, neutral, action_required; none as long as it runs.
    pub conclusion: Option<String>,
    /// When it was queued.
    pub created_at: Option<String>,
    /// When a runner began it.
    pub started_at: Option<String>,
    /// When it ended.
    pub completed_at: Option<String>,
    /// What it asked of a runner.
    #[serde(deserialize_with = "listed")]
    pub labels: Vec<String>,
    /// Who ran it.
    pub runner_name: Option<String>,
    /// Its page.
    pub html_url: Option<String>,
    /// What it did.
    #[serde(deserialize_with = "listed")]
    pub steps: Vec<Step>,
}

/// A step of a job.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Step {
    /// Its place.
    pub number: i64,
    /// Its name.
    pub name: String,
    /// queued, in_progress, completed.
    pub status: Option<String>,
    /// As a job's.
    pub conclusion: Option<String>,
    /// When it began.
    pub started_at: Option<String>,
    /// When it ended.
    pub completed_at: Option<String>,
}

//! What pages show and the API gives: one structure for both, read from the store.

mod costs;
mod failures;
mod jobs;
mod performance;
mod pulls;
mod security;

use coracle_ci_statistics::Share;
use rusqlite::OptionalExtension as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use costs::{Cost, CostJob, CostLabel, CostPull, cost};
pub use failures::{Cluster, ClusterPage, Failure, Failures, Flake, Flakes, cluster, failures, flakes};
pub use jobs::{Execution, FailedTest, Job, JobPage, Overview, TestPage, TestResult, job, overview, test};
pub use performance::{Changed, Compared, Performance, Point, Series, SeriesPage, performance, series};
pub use pulls::{Pull, PullPage, PullRun, Pulls, pull, pulls};
pub use security::{Assessment, Security, security};

use crate::error::{Error, Result};
use crate::store::Store;
use crate::times;

/// What a page was asked to show: a permalink's query.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// Jobs: failed, passed, not run, on changes, gone, slower.
    pub status: String,
    /// Jobs: required, optional.
    pub kind: String,
    /// Jobs: whose.
    pub owner: String,
    /// One repository.
    pub repository: String,
    /// What a name contains.
    pub q: String,
    /// Jobs: state, name, failures, flaky, time.
    pub sort: String,
    /// Costs: over how many days.
    pub days: String,
    /// Two commits of a series: the first one.
    pub a: String,
    /// And the second.
    pub b: String,
}

impl Filter {
    /// Whether a choice is one of those there are.
    ///
    /// # Errors
    /// [`Error::Query`], naming the choices.
    fn check(value: &str, name: &str, choices: &[&str]) -> Result<()> {
        if value.is_empty() || choices.contains(&value) {
            return Ok(());
        }
        Err(Error::Query(format!("{name} {value:?}: it is one of {}", choices.join(", "))))
    }

    /// Checks all choices.
    ///
    /// # Errors
    /// As above.
    pub fn validate(&self) -> Result<()> {
        Self::check(&self.status, "status", &["failed", "passed", "not run", "on changes", "gone", "slower"])?;
        Self::check(&self.kind, "kind", &["required", "optional"])?;
        Self::check(&self.sort, "sort", &["state", "name", "failures", "flaky", "time"])?;
        Self::check(&self.days, "days", &["7", "30", "90", "365"])
    }
}

/// How old the data are.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Age {
    /// When they were collected last.
    pub collected: Option<String>,
    /// How long ago that is, in seconds.
    pub seconds: Option<i64>,
    /// What could not be read then.
    pub problems: Vec<String>,
}

impl Age {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        match (&self.collected, self.seconds) {
            (Some(collected), Some(seconds)) => format!("{collected} ({} ago)", times::span(seconds.max(0))),
            _ => "nothing was collected yet".to_owned(),
        }
    }

    /// Whether they are older than a day.
    #[must_use]
    pub fn is_old(&self) -> bool {
        self.seconds.is_none_or(|seconds| seconds > times::DAY)
    }
}

/// How old the data are, at `now`.
///
/// # Errors
/// [`Error::Database`].
pub fn age(store: &Store, now: i64) -> Result<Age> {
    let collected = store.fact("collected")?;
    let seconds = collected.as_deref().and_then(times::parse).map(|moment| now - moment);
    let problems = store.fact("problems")?.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default();
    Ok(Age { collected, seconds, problems })
}

/// A number that changes whenever a collection has changed anything.
///
/// # Errors
/// [`Error::Database`].
pub fn generation(store: &Store) -> Result<i64> {
    Ok(store.fact("generation")?.and_then(|text| text.parse().ok()).unwrap_or(0))
}

/// So many of so many, with the interval in which the true share lies with 95 %.
#[derive(Debug, Clone, Copy, Serialize, JsonSchema)]
pub struct Rate {
    /// How many.
    pub count: u64,
    /// Of how many.
    pub of: u64,
    /// The lower end of the interval, in percent.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl Rate {
    fn new(count: i64, of: i64) -> Self {
        let share = Share { count: u64::try_from(count).unwrap_or(0), of: u64::try_from(of).unwrap_or(0) };
        let (low, high) = share.bounds();
        Self { count: share.count, of: share.of, low: 100.0 * low, high: 100.0 * high }
    }

    /// For people: the share, out of what, and how sure.
    #[must_use]
    pub fn text(&self) -> String {
        if self.of == 0 {
            return "nothing to go by".to_owned();
        }
        let rate = 100.0 * self.count as f64 / self.of as f64;
        format!("{rate:.1} % ({} of {}; {:.1} to {:.1} %)", self.count, self.of, self.low, self.high)
    }
}

/// A commit's first letters.
#[must_use]
pub fn short(sha: &str) -> String {
    sha.chars().take(10).collect()
}

/// A page's row by its number.
fn one<T>(
    store: &Store,
    what: &str,
    sql: &str,
    id: i64,
    read: impl FnOnce(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> Result<T> {
    let found = store.read(|connection| connection.prepare_cached(sql)?.query_row([id], read).optional())?;
    found.ok_or_else(|| Error::Missing(format!("{what} {id}")))
}

/// All rows.
fn all<T>(
    store: &Store,
    sql: &str,
    values: &[&dyn rusqlite::ToSql],
    read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>> {
    store.read(|connection| connection.prepare_cached(sql)?.query_map(values, read)?.collect())
}

//! What runners were used for.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;

use super::{Filter, all};
use crate::error::Result;
use crate::store::Store;
use crate::times::DAY;

/// One label of runners.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct CostLabel {
    /// It, or several, as jobs ask for them.
    pub label: String,
    /// Attempts of jobs.
    pub executions: i64,
    /// How many were tried again.
    pub reruns: i64,
    /// Minutes in all.
    pub minutes: i64,
    /// Minutes of what was tried again.
    pub rerun_minutes: i64,
    /// The mean time in the queue, in seconds.
    pub queue_seconds: i64,
    /// The longest.
    pub queue_worst: i64,
    /// What the minutes cost, where the settings say what one does.
    pub cost: Option<f64>,
}

/// One job.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct CostJob {
    /// Its number.
    pub job: i64,
    /// Its name.
    pub name: String,
    /// Attempts.
    pub executions: i64,
    /// Minutes in all.
    pub minutes: i64,
    /// Minutes of what was tried again.
    pub rerun_minutes: i64,
}

/// One pull request.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct CostPull {
    /// Owner and name.
    pub repository: String,
    /// Its number.
    pub pull: i64,
    /// Its title.
    pub title: String,
    /// Minutes in all.
    pub minutes: i64,
    /// Minutes of what was tried again.
    pub rerun_minutes: i64,
}

/// Costs.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Cost {
    /// Over how many days, to the newest run's.
    pub days: i64,
    /// Minutes in all.
    pub minutes: i64,
    /// The share of them that was for what was tried again, in percent.
    pub rerun_percent: f64,
    /// By day: the day's first moment, minutes, mean seconds in the queue.
    pub by_day: Vec<(i64, i64, i64)>,
    /// By label.
    pub labels: Vec<CostLabel>,
    /// By job, in whole weeks: the 50 that took most.
    pub jobs: Vec<CostJob>,
    /// By pull request: the 50 that took most.
    pub pulls: Vec<CostPull>,
}

/// What runners were used for.
///
/// # Errors
/// [`crate::error::Error::Database`].
pub fn cost(store: &Store, filter: &Filter, minute_costs: &BTreeMap<String, f64>) -> Result<Cost> {
    filter.validate()?;
    let days = filter.days.parse().unwrap_or(30);
    let newest: i64 = store.read(|connection| {
        connection.query_row("SELECT coalesce(max(day), 0) FROM evidence_cost_label", [], |row| row.get(0))
    })?;
    let since = newest - days + 1;
    let labels = all(
        store,
        "SELECT label, sum(executions), sum(reruns), sum(seconds), sum(rerun_seconds), sum(queue_seconds), sum(queued), max(queue_worst)
         FROM evidence_cost_label WHERE day >= ?1 GROUP BY label ORDER BY sum(seconds) DESC",
        &[&since],
        |row| {
            let label: String = row.get(0)?;
            let (seconds, queue, queued): (i64, i64, i64) = (row.get(3)?, row.get(5)?, row.get(6)?);
            Ok(CostLabel {
                cost: minute_costs.get(&label).map(|cost| cost * seconds as f64 / 60.0),
                label,
                executions: row.get(1)?,
                reruns: row.get(2)?,
                minutes: seconds / 60,
                rerun_minutes: row.get::<_, i64>(4)? / 60,
                queue_seconds: queue.checked_div(queued).unwrap_or(0),
                queue_worst: row.get(7)?,
            })
        },
    )?;
    let by_day = "SELECT day, sum(seconds) / 60, coalesce(sum(queue_seconds) / nullif(sum(queued), 0), 0) FROM evidence_cost_label WHERE day >= ?1 GROUP BY day ORDER BY day";
    let by_day = all(store, by_day, &[&since], |row| Ok((row.get::<_, i64>(0)? * DAY, row.get(1)?, row.get(2)?)))?;
    let jobs = all(
        store,
        "SELECT c.job, j.name, sum(c.executions), sum(c.seconds) / 60, sum(c.rerun_seconds) / 60 FROM evidence_cost_job c JOIN job j ON j.id = c.job
         WHERE c.week >= ?1 / 7 GROUP BY c.job ORDER BY sum(c.seconds) DESC LIMIT 50",
        &[&since],
        |row| {
            Ok(CostJob {
                job: row.get(0)?,
                name: row.get(1)?,
                executions: row.get(2)?,
                minutes: row.get(3)?,
                rerun_minutes: row.get(4)?,
            })
        },
    )?;
    let pulls = all(
        store,
        "SELECT repository, pull, title, seconds / 60, rerun_seconds / 60 FROM evidence_cost_pull WHERE last >= ?1 * 86400 ORDER BY seconds DESC LIMIT 50",
        &[&since],
        |row| {
            Ok(CostPull {
                repository: row.get(0)?,
                pull: row.get(1)?,
                title: row.get(2)?,
                minutes: row.get(3)?,
                rerun_minutes: row.get(4)?,
            })
        },
    )?;
    let minutes: i64 = labels.iter().map(|label| label.minutes).sum();
    let again: i64 = labels.iter().map(|label| label.rerun_minutes).sum();
    let rerun_percent = if minutes > 0 { 100.0 * again as f64 / minutes as f64 } else { 0.0 };
    Ok(Cost { days, minutes, rerun_percent, by_day, labels, jobs, pulls })
}

//! Series of figures.

use coracle_ci_statistics::{change_points, compare};
use schemars::JsonSchema;
use serde::Serialize;

use super::{Filter, all, one, short};
use crate::error::{Error, Result};
use crate::store::Store;

/// A series, as a row.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Series {
    /// Its number.
    pub id: i64,
    /// Whose.
    pub repository: String,
    /// What it belongs to.
    pub suite: String,
    /// What is measured.
    pub name: String,
    /// In what.
    pub unit: String,
    /// How many points it has.
    pub points: i64,
    /// The newest figure.
    pub newest: f64,
    /// When that was.
    pub at: i64,
}

/// All series.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Performance {
    /// They, by suite and name.
    pub series: Vec<Series>,
}

const COLUMNS: &str = "s.id, p.name, s.suite, s.name, s.unit, count(*), (SELECT value FROM point n WHERE n.series = s.id ORDER BY n.at DESC LIMIT 1), max(t.at)
    FROM series s JOIN repository p ON p.id = s.repository JOIN point t ON t.series = s.id";

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Series> {
    Ok(Series {
        id: row.get(0)?,
        repository: row.get(1)?,
        suite: row.get(2)?,
        name: row.get(3)?,
        unit: row.get(4)?,
        points: row.get(5)?,
        newest: row.get(6)?,
        at: row.get(7)?,
    })
}

/// All series.
///
/// # Errors
/// [`Error::Database`].
pub fn performance(store: &Store, filter: &Filter) -> Result<Performance> {
    filter.validate()?;
    let sql = format!(
        "SELECT {COLUMNS} WHERE instr(lower(s.suite || ' ' || s.name), lower(?1)) > 0 GROUP BY s.id ORDER BY s.suite, s.name LIMIT 1000"
    );
    Ok(Performance { series: all(store, &sql, &[&filter.q], row)? })
}

/// A figure of a series.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Point {
    /// When.
    pub at: i64,
    /// On which commit.
    pub sha: String,
    /// In which environment, by its place in the page's list.
    pub environment: usize,
    /// The middle of the raw figures.
    pub value: f64,
    /// All of them.
    pub raw: Vec<f64>,
}

/// A change of a series.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Changed {
    /// Since when.
    pub at: i64,
    /// On which commit it was seen first.
    pub sha: String,
    /// The middle before.
    pub before: f64,
    /// And after.
    pub after: f64,
    /// How probable so sharp a change is where there is none.
    pub probability: f64,
}

/// Two commits of a series, compared.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct Compared {
    /// The first.
    pub a: String,
    /// The second.
    pub b: String,
    /// By which factor the second's figures are larger; none where there is too little to compare.
    pub factor: Option<f64>,
    /// How probable so large a difference is where there is none (permutation test, one side).
    pub probability: Option<f64>,
    /// In words.
    pub verdict: String,
}

/// A series' page.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub struct SeriesPage {
    /// The series.
    pub series: Series,
    /// The environments, as JSON.
    pub environments: Vec<String>,
    /// The last 400 points, the oldest first.
    pub points: Vec<Point>,
    /// Where the series of the newest point's environment changed.
    pub changes: Vec<Changed>,
    /// Two commits compared, where two were asked for.
    pub compared: Option<Compared>,
}

/// A series.
///
/// # Errors
/// [`Error::Missing`], [`Error::Database`].
pub fn series(store: &Store, id: i64, filter: &Filter) -> Result<SeriesPage> {
    let series = one(store, "series", &format!("SELECT {COLUMNS} WHERE s.id = ?1 GROUP BY s.id"), id, row)?;
    let mut environments: Vec<String> = Vec::new();
    let sql = "SELECT t.at, t.sha, e.fingerprint, t.value, t.raw FROM point t JOIN environment e ON e.id = t.environment WHERE t.series = ?1 ORDER BY t.at DESC LIMIT 400";
    let mut points = all(store, sql, &[&id], |row| {
        let (fingerprint, raw): (String, String) = (row.get(2)?, row.get(4)?);
        let place = environments.iter().position(|known| *known == fingerprint).unwrap_or_else(|| {
            environments.push(fingerprint);
            environments.len() - 1
        });
        let raw = serde_json::from_str(&raw).unwrap_or_default();
        Ok(Point { at: row.get(0)?, sha: row.get(1)?, environment: place, value: row.get(3)?, raw })
    })?;
    points.reverse();
    // What was measured elsewhere says nothing of a change.
    let newest = points.last().map(|point| point.environment);
    let own: Vec<&Point> = points.iter().filter(|point| Some(point.environment) == newest).collect();
    let figures: Vec<f64> = own.iter().map(|point| point.value).collect();
    let changes = change_points(&figures, 0.01, 1)
        .into_iter()
        .filter_map(|change| {
            let point = own.get(change.at)?;
            let (before, after) = (change.before, change.after);
            Some(Changed { at: point.at, sha: short(&point.sha), before, after, probability: change.probability })
        })
        .collect();
    let compared = match (filter.a.is_empty(), filter.b.is_empty()) {
        (true, true) => None,
        (false, false) => Some(compared(&points, &filter.a, &filter.b)?),
        _ => return Err(Error::Query("two commits are compared: give both a and b".to_owned())),
    };
    Ok(SeriesPage { series, environments, points, changes, compared })
}

/// The most figures of a commit that are compared: each with each of the other's.
const COMPARED: usize = 300;

/// Every so manieth figure, so that there are no more than that.
fn sample(raw: &[f64]) -> Vec<f64> {
    raw.iter().step_by(raw.len().div_ceil(COMPARED).max(1)).copied().collect()
}

/// Compares two commits in the newest environment that both were measured in.
fn compared(points: &[Point], a: &str, b: &str) -> Result<Compared> {
    let of = |sha: &str| points.iter().rev().filter(move |point| point.sha.starts_with(sha)).collect::<Vec<_>>();
    let (first, second) = (of(a), of(b));
    for (sha, found) in [(a, &first), (b, &second)] {
        if found.is_empty() {
            return Err(Error::Query(format!("commit {sha:?} is not in this series")));
        }
    }
    let both = second.iter().find_map(|point| {
        first.iter().find(|other| other.environment == point.environment).map(|other| (*other, *point))
    });
    let Some((one, two)) = both else {
        let verdict = "not comparable: they were measured in different environments".to_owned();
        return Ok(Compared { a: a.to_owned(), b: b.to_owned(), factor: None, probability: None, verdict });
    };
    let found = compare(&sample(&one.raw), &sample(&two.raw), 1);
    let verdict = match found {
        None => "too few figures to compare".to_owned(),
        Some(found) if found.probability <= 0.01 => format!("larger, by {:+.1} %", 100.0 * (found.factor - 1.0)),
        Some(found) if found.probability >= 0.99 => format!("smaller, by {:+.1} %", 100.0 * (found.factor - 1.0)),
        Some(_) => "no difference can be told".to_owned(),
    };
    let (factor, probability) = (found.map(|found| found.factor), found.map(|found| found.probability));
    Ok(Compared { a: short(&one.sha), b: short(&two.sha), factor, probability, verdict })
}

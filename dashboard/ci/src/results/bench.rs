//! Figures of benchmarks: this project's form, and the one that Kata Containers' metrics had.
//!
//! ```json
//! { "at": "2026-11-27T12:00:00Z", "commit": "…", "environment": { … },
//!   "series": [ { "suite": "start", "name": "run true", "unit": "ms", "raw": [ 1, 2, 3 ] } ] }
//! ```

use coracle_ci_statistics::median;
use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::store::Point;
use crate::times;

/// The most series of a report, and figures of a series.
const SERIES_MAX: usize = 10_000;
const RAW_MAX: usize = 10_000;

#[derive(Deserialize)]
struct Report {
    at: String,
    commit: String,
    #[serde(default)]
    environment: Value,
    series: Vec<Series>,
}

#[derive(Deserialize)]
struct Series {
    suite: String,
    name: String,
    unit: String,
    raw: Vec<f64>,
}

/// Whether a document is one of figures, in one of the two forms.
#[must_use]
pub fn is_bench(document: &Value) -> bool {
    (document.get("series").is_some() && document.get("commit").is_some())
        || (document.get("test").is_some() && document.get("env").is_some())
}

/// The figures of a report. `what` names it in errors.
///
/// # Errors
/// [`Error::Malformed`]: neither form, a moment that is none, figures that are no numbers, or too many.
pub fn points(document: Value, what: &str) -> Result<Vec<Point>> {
    let fault = |reason: &str| Error::Malformed { what: what.to_owned(), reason: reason.to_owned() };
    if document.get("test").is_some() && document.get("env").is_some() {
        return kata(&document).ok_or_else(|| fault("no figures in the form of Kata's metrics"));
    }
    let report: Report = serde_json::from_value(document).map_err(|error| fault(&error.to_string()))?;
    let at = times::parse(&report.at).ok_or_else(|| fault("at: no moment"))?;
    if report.series.len() > SERIES_MAX || report.series.iter().any(|series| series.raw.len() > RAW_MAX) {
        return Err(fault("more than 10,000 series, or figures of one"));
    }
    let environment = report.environment.to_string();
    let point = |series: Series| {
        let value = middle(&series.raw)?;
        Some(Point {
            suite: series.suite,
            name: series.name,
            unit: series.unit,
            at,
            sha: report.commit.clone(),
            environment: environment.clone(),
            value,
            raw: series.raw,
        })
    };
    report.series.into_iter().map(|series| point(series).ok_or_else(|| fault("a series without figures"))).collect()
}

/// Kata's: `{"@timestamp", "env": {"RuntimeCommit", ...}, "test": {"testname"}, "<name>": {"Results": [{"<metric>": {"Result", "Units"}}]}}`.
fn kata(document: &Value) -> Option<Vec<Point>> {
    let suite = document.get("test")?.get("testname")?.as_str()?;
    let env = document.get("env")?;
    let sha = env.get("RuntimeCommit").and_then(Value::as_str).unwrap_or_default();
    let stamp = document.get("@timestamp")?;
    let at = stamp.as_i64().map(|millis| millis / 1000).or_else(|| stamp.as_str().and_then(times::parse))?;
    let mut by_name: std::collections::BTreeMap<(String, String), Vec<f64>> = std::collections::BTreeMap::new();
    for (name, value) in document.as_object()? {
        for result in value.get("Results").and_then(Value::as_array).into_iter().flatten().take(RAW_MAX) {
            for (metric, figure) in result.as_object().into_iter().flatten() {
                let Some(value) = figure.get("Result").and_then(|result| {
                    result.as_f64().or_else(|| result.as_str().and_then(|text| text.trim().parse().ok()))
                }) else {
                    continue;
                };
                let unit = figure.get("Units").and_then(Value::as_str).unwrap_or_default().to_owned();
                by_name.entry((format!("{name}: {metric}"), unit)).or_default().push(value);
            }
        }
    }
    let points = by_name.into_iter().filter_map(|((name, unit), raw)| {
        Some(Point {
            suite: suite.to_owned(),
            name,
            unit,
            at,
            sha: sha.to_owned(),
            environment: env.to_string(),
            value: middle(&raw)?,
            raw,
        })
    });
    let points: Vec<Point> = points.collect();
    (!points.is_empty()).then_some(points)
}

/// The median; none of nothing, or of what is no number.
fn middle(raw: &[f64]) -> Option<f64> {
    if raw.iter().any(|figure| !figure.is_finite()) {
        return None;
    }
    median(&mut raw.to_vec())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_forms_are_read() {
        let ours = json!({ "at": "2026-11-27T12:00:00Z", "commit": "abc", "environment": { "cpu": "x" },
            "series": [{ "suite": "start", "name": "run true", "unit": "ms", "raw": [3, 1, 2.5, 2] }] });
        assert!(is_bench(&ours));
        let found = points(ours, "x").unwrap();
        assert_eq!(
            (found[0].value, found[0].sha.as_str(), found[0].environment.as_str()),
            (2.25, "abc", "{\"cpu\":\"x\"}")
        );
        let kata_form = json!({ "@timestamp": 1_700_000_000_000_i64, "env": { "RuntimeCommit": "def" },
            "test": { "testname": "boot-times" },
            "boot-times": { "Results": [ { "total": { "Result": 0.5, "Units": "s" } }, { "total": { "Result": "0.7", "Units": "s" } } ] } });
        assert!(is_bench(&kata_form));
        let found = points(kata_form, "x").unwrap();
        assert_eq!((found.len(), found[0].name.as_str(), found[0].at), (1, "boot-times: total", 1_700_000_000));
        assert!((found[0].value - 0.6).abs() < 1e-9);
    }

    #[test]
    fn what_is_no_figure_is_refused() {
        for wrong in [
            json!({ "at": "x", "commit": "", "series": [] }),
            json!({ "at": "2026-11-27T12:00:00Z", "commit": "", "series": [{ "suite": "", "name": "", "unit": "", "raw": [] }] }),
            json!({ "test": {}, "env": {} }),
            json!([]),
        ] {
            assert!(points(wrong.clone(), "x").is_err(), "{wrong}");
        }
    }
}

//! A report as the board takes it: one series for each figure.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::suite;
use crate::board;

/// Gives a report's figures to the board.
pub(super) fn give(report: &Value) -> Result<()> {
    let mut series = Vec::new();
    for (part, value) in report.as_object().context("a report")?.iter().filter(|(part, _)| *part != "environment") {
        figures(part, part, value, &mut series);
    }
    let mut environment = report["environment"].clone();
    // What it was measured of is not where.
    environment.as_object_mut().map(|facts| facts.remove("commit"));
    board::figures(&environment, &series)
}

/// All figures below a value: numbers, and lists of numbers.
fn figures(part: &str, name: &str, value: &Value, series: &mut Vec<Value>) {
    match value {
        // What it may be at most is no figure.
        Value::Number(figure) if !name.contains("at_most") => series.push(one(part, name, vec![figure.clone().into()])),
        Value::Array(list) if !list.is_empty() && list.iter().all(Value::is_number) => {
            series.push(one(part, name, list.clone()));
        }
        Value::Object(fields) => {
            for (key, value) in fields {
                figures(part, &format!("{name}.{key}"), value, series);
            }
        }
        _ => {}
    }
}

fn one(part: &str, name: &str, raw: Vec<Value>) -> Value {
    let units = [
        ("bytes", "B"),
        ("kib", "KiB"),
        ("_ms", "ms"),
        ("seconds", "s"),
        ("instructions", "instructions"),
        ("percent", "%"),
    ];
    let unit = units.iter().find(|(word, _)| name.contains(word)).map_or("", |(_, unit)| unit);
    json!({ "suite": suite(part), "name": name, "unit": unit, "raw": raw })
}

#[test]
fn each_figure_is_a_series_with_its_unit() {
    let mut found = Vec::new();
    let report = json!({ "shim": { "stripped": 7, "at_most": 9 }, "names": ["a"], "series": [1, 2, 3] });
    figures("sizes_bytes", "sizes_bytes", &report, &mut found);
    let named: Vec<_> = found
        .iter()
        .map(|one| (one["name"].as_str().unwrap(), one["unit"].as_str().unwrap(), one["raw"].clone()))
        .collect();
    assert_eq!(named, [("sizes_bytes.series", "B", json!([1, 2, 3])), ("sizes_bytes.shim.stripped", "B", json!([7]))]);
    assert_eq!((found[0]["suite"].as_str(), suite("none")), (Some("size"), "other"));
}

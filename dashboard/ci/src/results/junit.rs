//! JUnit's XML, in the forms that test runners write.

use std::io::BufRead;

use junit_parser::{TestStatus, TestSuite};

use super::{Found, millis};
use crate::error::{Error, Result};
use crate::outcome::Outcome;
use crate::store::TestResult;

/// The most bytes of a report.
const REPORT_MAX: u64 = 64 << 20;

/// Reads a report. `what` names it in errors.
///
/// # Errors
/// [`Error::Malformed`].
pub fn read(from: impl BufRead, what: &str) -> Result<Vec<TestResult>> {
    let report = junit_parser::from_reader(from.take(REPORT_MAX))
        .map_err(|error| Error::Malformed { what: what.to_owned(), reason: error.to_string() })?;
    let mut found = Found::default();
    // Suites lie in suites; a list of what is to come, so that no depth of them is one of calls.
    let mut rest: Vec<(String, &TestSuite)> = report.suites.iter().map(|suite| (String::new(), suite)).collect();
    while let Some((before, suite)) = rest.pop() {
        let path = match (before.is_empty(), suite.name.is_empty()) {
            (true, _) => suite.name.clone(),
            (false, true) => before,
            (false, false) => format!("{before} / {}", suite.name),
        };
        rest.extend(suite.suites.iter().map(|inner| (path.clone(), inner)));
        for case in &suite.cases {
            let (outcome, text) = match &case.status {
                TestStatus::Success => (Outcome::Passed, None),
                TestStatus::Skipped(_) => (Outcome::Skipped, None),
                TestStatus::Error(error) => (Outcome::Failed, Some((&error.message, &error.text))),
                TestStatus::Failure(failure) => (Outcome::Failed, Some((&failure.message, &failure.text))),
            };
            let name =
                if path.is_empty() { case.original_name.clone() } else { format!("{path} / {}", case.original_name) };
            let place = found.add(&name, outcome, millis(case.time));
            if let (Some(place), Some((message, text))) = (place, text) {
                found.text(place, if message.is_empty() { text } else { message });
            }
        }
    }
    Ok(found.results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_cases_and_their_ends_are_read() {
        let text = r#"<?xml version="1.0"?>
            <testsuites><testsuite name="unit" tests="3">
              <testcase name="a &lt;script&gt;" classname="x" time="0.5"/>
              <testcase name="b" time="nan"><failure message="wrong: 1 &amp; 2">trace</failure></testcase>
              <testcase name="c"><skipped/></testcase>
              <testcase name="b"/>
            </testsuite></testsuites>"#;
        let found = read(text.as_bytes(), "x").unwrap();
        let ends: Vec<_> =
            found.iter().map(|result| (result.name.as_str(), result.outcome, result.text.as_str())).collect();
        assert_eq!(
            ends,
            [
                ("unit / a <script>", Outcome::Passed, ""),
                ("unit / b", Outcome::Failed, "wrong: 1 & 2"),
                ("unit / c", Outcome::Skipped, "")
            ]
        );
        assert_eq!(found[0].millis, Some(500));
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        for text in ["<testsuites><testsuite name='a'><testcase name='b'>", "{}", "<testsuites><testsuite></wrong>"] {
            let error = read(text.as_bytes(), "job 7's report.xml");
            match error {
                Err(error) => assert!(error.to_string().starts_with("job 7's report.xml: "), "{error}"),
                Ok(found) => assert!(found.is_empty(), "{text}: {found:?}"),
            }
        }
    }
}

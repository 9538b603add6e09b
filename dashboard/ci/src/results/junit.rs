//! JUnit's XML, in the forms that test runners write.

use std::io::{BufRead, Read as _};

use junit_parser::{TestStatus, TestSuite};

use super::{Found, millis};
use crate::error::{Error, Result};
use crate::outcome::Outcome;
use crate::store::TestResult;

/// The most bytes of a report.
const REPORT_MAX: u64 = 64 << 20;

/// How deep elements may lie in elements.
const DEPTH_MAX: usize = 64;

/// How deep elements lie in elements; what is no XML has the depth up to there.
fn deepest(text: &[u8]) -> usize {
    let mut reader = quick_xml::Reader::from_reader(text);
    let (mut depth, mut most) = (0_usize, 0);
    loop {
        match reader.read_event() {
            Ok(quick_xml::events::Event::Start(_)) => {
                depth += 1;
                most = depth.max(most);
                if most > DEPTH_MAX {
                    return most;
                }
            }
            Ok(quick_xml::events::Event::End(_)) => depth = depth.saturating_sub(1),
            Ok(quick_xml::events::Event::Eof) | Err(_) => return most,
            Ok(_) => {}
        }
    }
}

/// Reads a report. `what` names it in errors.
///
/// # Errors
/// [`Error::Malformed`].
pub fn read(from: impl BufRead, what: &str) -> Result<Vec<TestResult>> {
    let fault = |reason: String| Error::Malformed { what: what.to_owned(), reason };
    let mut text = Vec::new();
    from.take(REPORT_MAX + 1).read_to_end(&mut text).map_err(crate::error::of(what))?;
    if text.len() as u64 > REPORT_MAX {
        return Err(fault(format!("larger than {} MiB", REPORT_MAX >> 20)));
    }
    // The library reads a suite in a suite by calling itself.
    if deepest(&text) > DEPTH_MAX {
        return Err(fault(format!("suites in suites, more than {DEPTH_MAX} deep")));
    }
    let report = junit_parser::from_reader(text.as_slice()).map_err(|error| fault(error.to_string()))?;
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
            // A class tells tests of one name apart, where it says more than the suite does.
            let class = case
                .classname
                .as_deref()
                .filter(|class| *class != suite.name && !case.original_name.starts_with(*class));
            let parts = [path.as_str(), class.unwrap_or_default(), case.original_name.as_str()];
            let name = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" / ");
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
                ("unit / x / a <script>", Outcome::Passed, ""),
                ("unit / b", Outcome::Failed, "wrong: 1 & 2"),
                ("unit / c", Outcome::Skipped, "")
            ]
        );
        assert_eq!(found[0].millis, Some(500));
    }

    #[test]
    fn tests_of_one_name_are_told_apart_by_their_classes() {
        let text = "<testsuite name='pytest'><testcase classname='tests.a' name='test_x'/><testcase classname='tests.b' name='test_x'><failure/></testcase></testsuite>";
        let ends: Vec<_> =
            read(text.as_bytes(), "x").unwrap().into_iter().map(|result| (result.name, result.outcome)).collect();
        let expected = [("pytest / tests.a / test_x", Outcome::Passed), ("pytest / tests.b / test_x", Outcome::Failed)];
        assert_eq!(ends, expected.map(|(name, outcome)| (name.to_owned(), outcome)));
    }

    #[test]
    fn suites_in_suites_without_end_are_refused() {
        for text in ["<testsuite>".repeat(500_000), format!("<testsuites>{}", "<testsuite name='a'>".repeat(100_000))] {
            let error = read(text.as_bytes(), "x").unwrap_err().to_string();
            assert!(error.contains("64 deep"), "{error}");
        }
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

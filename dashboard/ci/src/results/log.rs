//! Logs of jobs: results of tests in the forms that runners print them (TAP; Go's; cargo's and nextest's), and what a job said when it failed.

use std::collections::VecDeque;
use std::io::BufRead;
use std::sync::LazyLock;

use regex::Regex;

use super::{Found, millis, next_line};
use crate::error::Result;
use crate::outcome::Outcome;
use crate::store::TestResult;

/// What a log tells.
#[derive(Debug, Default)]
pub struct LogResults {
    /// The tests' results, in the order in which they came first.
    pub results: Vec<TestResult>,
    /// What the job said that made it fail: the lines that its runner marks as errors, or the last ones before its end.
    pub error: String,
    /// How many lines there were.
    pub lines: u64,
}

/// How many lines before a job's end are kept, for one that marks none.
const LAST_LINES: usize = 8;

static STAMP: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\u{feff}?\d{4}-\d\d-\d\dT[\d:.]+Z ").ok());
static COLOUR: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new("\u{1b}\\[[0-9;]*[A-Za-z]").ok());
static TAP: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\s*(not )?ok \d+\s*(?:- )?(.*)$").ok());
static TAP_END: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"(?i)\s+(?:#\s*(skip|todo)\b.*|(?:#\s*)?in (\d+) ?(ms|sec|s))\s*$").ok());
static GO: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^\s*--- (PASS|FAIL|SKIP): (\S+) \((\d+(?:\.\d+)?)s\)").ok());
static CARGO: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^test (.+?) \.\.\. (?:.*\b)?(ok|FAILED|ignored)(?:[ ,<(].*)?$").ok());
static CARGO_PROGRAM: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"^\s*(?:Running (?:unittests )?(\S+) \(\S*?([^/\s]+?)(?:-[0-9a-f]{16})?\)|Doc-tests (\S+))\s*$").ok()
});
static NEXTEST: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^\s*(PASS|FAIL|TIMEOUT) \[\s*([\d.]+)s\](?: \([^)]*\))? (\S+) (\S+)\s*$").ok());
static OUTPUT: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^---- (.+?) (?:stdout|stderr) ----$").ok());

/// What the lines that follow belong to.
enum Follows {
    Nothing,
    /// TAP: lines that begin with `#`.
    Comments(usize),
    /// Go: lines that are indented.
    Indented(usize),
    /// Cargo: all lines up to the next headline.
    All(usize),
}

/// Reads a log of any length, a line at a time.
///
/// # Errors
/// [`crate::error::Error::File`], where it cannot be read to its end.
pub fn read(mut from: impl BufRead, what: &str) -> Result<LogResults> {
    let mut reader = Reader { found: Found::default(), program: String::new(), follows: Follows::Nothing };
    let mut errors: Vec<String> = Vec::new();
    let mut last: VecDeque<String> = VecDeque::new();
    let (mut line, mut lines) = (String::new(), 0_u64);
    while next_line(&mut from, &mut line).map_err(crate::error::of(what))? {
        lines += 1;
        let bare = bare(&line);
        if let Some(error) = bare.strip_prefix("##[error]").or_else(|| bare.strip_prefix("::error::")) {
            if !error.starts_with("Process completed with exit code") && errors.len() < LAST_LINES {
                errors.push(error.to_owned());
            }
            continue;
        }
        if !bare.trim().is_empty() && !bare.starts_with("##[") {
            if last.len() == LAST_LINES {
                last.pop_front();
            }
            last.push_back(bare.chars().take(500).collect());
        }
        reader.line(&bare);
    }
    let error = if errors.is_empty() { last.into_iter().collect::<Vec<_>>().join("\n") } else { errors.join("\n") };
    Ok(LogResults { results: reader.found.results, error, lines })
}

/// A line without its time stamp and colours.
fn bare(line: &str) -> String {
    let line = STAMP.as_ref().map_or_else(|| line.into(), |stamp| stamp.replace(line, ""));
    if !line.contains('\u{1b}') {
        return line.trim_end().to_owned();
    }
    COLOUR.as_ref().map_or_else(|| line.to_string(), |colour| colour.replace_all(&line, "").trim_end().to_owned())
}

struct Reader {
    found: Found,
    /// Cargo's program of tests whose results come.
    program: String,
    follows: Follows,
}

impl Reader {
    fn line(&mut self, line: &str) {
        if self.tap(line) || self.go(line) || self.cargo(line) || self.nextest(line) {
            return;
        }
        match self.follows {
            Follows::Comments(place) if line.trim_start().starts_with('#') => {
                self.found.text(place, line.trim_start().trim_start_matches('#').trim());
            }
            Follows::Indented(place) if line.starts_with(' ') => self.found.text(place, line.trim()),
            Follows::All(place) => {
                if line == "failures:" || line.starts_with("test result:") {
                    self.follows = Follows::Nothing;
                } else if !line.is_empty() {
                    self.found.text(place, line);
                }
            }
            Follows::Comments(_) | Follows::Indented(_) => self.follows = Follows::Nothing,
            Follows::Nothing => {}
        }
    }

    fn tap(&mut self, line: &str) -> bool {
        let Some(captures) = TAP.as_ref().and_then(|tap| tap.captures(line)) else { return false };
        let mut outcome = if captures.get(1).is_some() { Outcome::Failed } else { Outcome::Passed };
        let mut name = captures.get(2).map_or("", |name| name.as_str()).to_owned();
        let mut took = None;
        while let Some(end) = TAP_END.as_ref().and_then(|end| end.captures(&name)) {
            if end.get(1).is_some() {
                outcome = Outcome::Skipped;
            }
            if let (Some(count), Some(unit)) = (end.get(2), end.get(3)) {
                let count = count.as_str().parse::<i64>().ok();
                took =
                    count.and_then(|count| if unit.as_str() == "ms" { Some(count) } else { count.checked_mul(1000) });
            }
            let Some(start) = end.get(0).map(|all| all.start()) else { break };
            name.truncate(start);
        }
        let place = self.found.add(&name, outcome, took);
        self.follows = place.map_or(Follows::Nothing, Follows::Comments);
        true
    }

    fn go(&mut self, line: &str) -> bool {
        let Some(captures) = GO.as_ref().and_then(|go| go.captures(line)) else { return false };
        let part = |number| captures.get(number).map_or("", |part| part.as_str());
        let outcome = match part(1) {
            "PASS" => Outcome::Passed,
            "FAIL" => Outcome::Failed,
            _ => Outcome::Skipped,
        };
        let place = self.found.add(part(2), outcome, part(3).parse().ok().and_then(millis));
        self.follows = place.map_or(Follows::Nothing, Follows::Indented);
        true
    }

    fn cargo(&mut self, line: &str) -> bool {
        if let Some(captures) = CARGO_PROGRAM.as_ref().and_then(|program| program.captures(line)) {
            let part = |number| captures.get(number).map_or("", |part| part.as_str());
            self.program = match (part(2), part(3)) {
                ("", documents) => format!("{documents} documents"),
                // A unit test's program is named by its crate, another by its own file.
                (program, _) => program.to_owned(),
            };
            self.follows = Follows::Nothing;
            return true;
        }
        if let Some(captures) = OUTPUT.as_ref().and_then(|output| output.captures(line)) {
            let name = self.name(captures.get(1).map_or("", |name| name.as_str()));
            self.follows = self.found.places.get(&name).map_or(Follows::Nothing, |place| Follows::All(*place));
            return true;
        }
        let Some(captures) = CARGO.as_ref().and_then(|cargo| cargo.captures(line)) else { return false };
        let part = |number| captures.get(number).map_or("", |part| part.as_str());
        let outcome = match part(2) {
            "ok" => Outcome::Passed,
            "FAILED" => Outcome::Failed,
            _ => Outcome::Skipped,
        };
        let name = self.name(part(1).trim_end_matches(" - should panic"));
        self.found.add(&name, outcome, None);
        true
    }

    fn name(&self, test: &str) -> String {
        if self.program.is_empty() { test.to_owned() } else { format!("{}::{test}", self.program) }
    }

    fn nextest(&mut self, line: &str) -> bool {
        let Some(captures) = NEXTEST.as_ref().and_then(|nextest| nextest.captures(line)) else { return false };
        let part = |number| captures.get(number).map_or("", |part| part.as_str());
        let outcome = if part(1) == "PASS" { Outcome::Passed } else { Outcome::Failed };
        let name = format!("{}::{}", part(3), part(4));
        self.found.add(&name, outcome, part(2).parse().ok().and_then(millis));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(text: &str) -> Vec<(String, Outcome, Option<i64>)> {
        let found = read(text.as_bytes(), "log").unwrap();
        found.results.into_iter().map(|result| (result.name, result.outcome, result.millis)).collect()
    }

    #[test]
    fn tap_is_read_once_however_often_it_is_printed() {
        let text = "2025-12-01T00:00:00.1234567Z 1..3\n\
            2025-12-01T00:00:00.1234567Z not ok 1 - Check <b>cron</b> in 12 sec\n\
            2025-12-01T00:00:00.1234567Z # (in test file k8s-cron-job.bats, line 33)\n\
            2025-12-01T00:00:00.1234567Z #   `wait_for` failed with status 124\n\
            2025-12-01T00:00:00.1234567Z ok 2 Empty dir in 3400ms # skip not here\n\
            2025-12-01T00:00:00.1234567Z ok 3 Third # in 2 sec\n\
            not ok 1 - Check <b>cron</b> in 13 sec\nok 1 - Check <b>cron</b> in 9 sec\n";
        let found = read(text.as_bytes(), "log").unwrap();
        let expected = [
            ("Check <b>cron</b>".to_owned(), Outcome::Failed, Some(12_000)),
            ("Empty dir".to_owned(), Outcome::Skipped, Some(3_400)),
            ("Third".to_owned(), Outcome::Passed, Some(2_000)),
        ];
        assert_eq!(ends(text), expected);
        assert_eq!(
            found.results[0].text,
            "(in test file k8s-cron-job.bats, line 33)\n`wait_for` failed with status 124"
        );
    }

    #[test]
    fn go_cargo_and_nextest_are_read() {
        let go = "=== RUN TestA\n--- FAIL: TestA (0.25s)\n    a_test.go:7: not so\n    --- PASS: TestA/inner (0.00s)\n";
        assert_eq!(
            ends(go),
            [("TestA".to_owned(), Outcome::Failed, Some(250)), ("TestA/inner".to_owned(), Outcome::Passed, Some(0))]
        );
        let cargo = "     Running unittests src/lib.rs (target/debug/deps/coracle_ci-0123456789abcdef)\n\
            test a::one ... ok\ntest a::two ... FAILED\ntest b - should panic ... ok\ntest c ... ignored, slow\n\
            failures:\n\n---- a::two stdout ----\nthread panicked at x.rs:1\nleft: 1\n\nfailures:\n    a::two\n\
            test result: FAILED. 2 passed; 1 failed\n   Doc-tests coracle_ci\ntest src/x.rs - f (line 3) ... ok\n";
        let found = read(cargo.as_bytes(), "log").unwrap();
        let names: Vec<_> = found.results.iter().map(|result| (result.name.as_str(), result.outcome)).collect();
        assert_eq!(
            names,
            [
                ("coracle_ci::a::one", Outcome::Passed),
                ("coracle_ci::a::two", Outcome::Failed),
                ("coracle_ci::b", Outcome::Passed),
                ("coracle_ci::c", Outcome::Skipped),
                ("coracle_ci documents::src/x.rs - f (line 3)", Outcome::Passed),
            ]
        );
        assert_eq!(found.results[1].text, "thread panicked at x.rs:1\nleft: 1");
        let nextest = "        PASS [   0.004s] my-crate tests::a\n        FAIL [   1.500s] (2/9) my-crate::it b\n";
        assert_eq!(
            ends(nextest),
            [
                ("my-crate::tests::a".to_owned(), Outcome::Passed, Some(4)),
                ("my-crate::it::b".to_owned(), Outcome::Failed, Some(1_500))
            ]
        );
    }

    #[test]
    fn what_made_the_job_fail_is_found() {
        let marked = "a\n##[error]Deploy: timeout after 30 s\nb\n##[error]Process completed with exit code 1.\n";
        assert_eq!(read(marked.as_bytes(), "log").unwrap().error, "Deploy: timeout after 30 s");
        let text: String = (0..20).map(|number| format!("line {number}\n")).collect();
        let last = read(text.as_bytes(), "log").unwrap();
        assert!(last.error.starts_with("line 12\n") && last.error.ends_with("line 19"), "{}", last.error);
        assert_eq!(last.lines, 20);
    }

    #[test]
    fn bytes_that_are_no_text_are_read_over() {
        let found = read(&b"\xff\xfe not ok\nok 1 na\xffme\n\0\n"[..], "log").unwrap();
        assert_eq!(found.results[0].name, "na\u{fffd}me");
    }

    #[test]
    fn a_log_of_any_length_keeps_a_bounded_number_of_results() {
        // Made as it is read, so that the test itself needs no more than a line.
        struct Endless(u64, Vec<u8>);
        impl std::io::Read for Endless {
            fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
                if self.1.is_empty() {
                    if self.0 == 200_000 {
                        return Ok(0);
                    }
                    self.1 = format!("not ok 1 test {}\n# {}\n", self.0, "x".repeat(100)).into_bytes();
                    self.0 += 1;
                }
                let count = buffer.len().min(self.1.len());
                buffer[..count].copy_from_slice(&self.1[..count]);
                self.1.drain(..count);
                Ok(count)
            }
        }
        let found = read(std::io::BufReader::new(Endless(0, Vec::new())), "log").unwrap();
        assert_eq!((found.results.len(), found.lines), (super::super::RESULTS_MAX, 400_000));
    }
}

//! Results of tests and figures of benchmarks, read from what jobs leave behind. Each reader takes what it is given as hostile: a bound on what is
//! read, on each line, and on the number of results; bytes that are no UTF-8 are replaced.

mod bench;
mod junit;
mod log;

use std::collections::HashMap;
use std::io::{BufRead, Read as _};

pub use bench::{is_bench, points};
pub use junit::read as junit;
pub use log::{LogResults, read as log};

use crate::outcome::Outcome;
use crate::store::TestResult;

/// The most results of one attempt.
const RESULTS_MAX: usize = 50_000;
/// The most bytes of a line; what is longer is cut there.
const LINE_MAX: usize = 8 << 10;

/// Where what a failure said is full, in bytes; a line more may come.
const TEXT_MAX: usize = 2_000;

/// Reads one line, without its end, into `line`; false at the end of what is read. Of a longer line the rest is passed over.
fn next_line(from: &mut impl BufRead, line: &mut String) -> std::io::Result<bool> {
    let mut bytes = Vec::new();
    let read = from.by_ref().take(LINE_MAX as u64).read_until(b'\n', &mut bytes)?;
    if read == 0 {
        return Ok(false);
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    } else if read == LINE_MAX {
        from.skip_until(b'\n')?;
    }
    line.clear();
    line.push_str(&String::from_utf8_lossy(&bytes));
    Ok(true)
}

/// Results by their names. A name that has failed once has failed, however often it comes: a log tells a failure again, a runner tries again, and two
/// tests may have one name.
#[derive(Debug, Default)]
struct Found {
    results: Vec<TestResult>,
    places: HashMap<String, usize>,
}

impl Found {
    /// Adds a result; gives the place of the one with this name where it has failed, whose text is then added to by what follows.
    fn add(&mut self, name: &str, outcome: Outcome, millis: Option<i64>) -> Option<usize> {
        let name = name.trim();
        if name.is_empty() {
            return None;
        }
        let place = match self.places.get(name) {
            Some(place) => *place,
            None if self.results.len() >= RESULTS_MAX => return None,
            None => {
                let place = self.results.len();
                self.results.push(TestResult { name: name.to_owned(), outcome, millis, text: String::new() });
                self.places.insert(name.to_owned(), place);
                place
            }
        };
        let result = self.results.get_mut(place)?;
        if outcome == Outcome::Failed && result.outcome != Outcome::Failed {
            result.outcome = Outcome::Failed;
        }
        (outcome == Outcome::Failed).then_some(place)
    }

    fn text(&mut self, place: usize, line: &str) {
        if let Some(result) = self.results.get_mut(place)
            && result.text.len() < TEXT_MAX
        {
            if !result.text.is_empty() {
                result.text.push('\n');
            }
            result.text.extend(line.chars().take(500));
        }
    }
}

/// A time in seconds, as reports tell it, in milliseconds; none where it cannot be one.
fn millis(seconds: f64) -> Option<i64> {
    (seconds.is_finite() && (0.0..=1e7).contains(&seconds)).then_some((seconds * 1000.0).round() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_an_end_takes_no_more_than_its_bound() {
        let text = format!("{}\nshort\n\nlast", "x".repeat(3 * LINE_MAX));
        let mut from = std::io::BufReader::new(text.as_bytes());
        let (mut line, mut lengths) = (String::new(), Vec::new());
        while next_line(&mut from, &mut line).unwrap() {
            lengths.push(line.len());
        }
        assert_eq!(lengths, [LINE_MAX, 5, 0, 4]);
    }
}

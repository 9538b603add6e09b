//! Moments: seconds since 1970 in the store, RFC 3339 outside.

use chrono::{DateTime, SecondsFormat, Utc};

/// Seconds of a day.
pub const DAY: i64 = 86_400;

/// Reads RFC 3339, as the API writes it. None where it is not, or lies before 1970 or after the year 9999.
#[must_use]
pub fn parse(text: &str) -> Option<i64> {
    let seconds = DateTime::parse_from_rfc3339(text.trim()).ok()?.timestamp();
    (0..=253_402_300_799).contains(&seconds).then_some(seconds)
}

/// Writes a moment as RFC 3339, in whole seconds.
#[must_use]
pub fn moment(seconds: i64) -> String {
    DateTime::<Utc>::from_timestamp(seconds, 0)
        .map_or_else(|| "?".to_owned(), |moment| moment.to_rfc3339_opts(SecondsFormat::Secs, true))
}

/// The day alone.
#[must_use]
pub fn day(seconds: i64) -> String {
    moment(seconds).chars().take(10).collect()
}

/// A span in the two largest of its units.
#[must_use]
pub fn span(seconds: i64) -> String {
    let (days, hours, minutes) = (seconds / DAY, seconds % DAY / 3600, seconds % 3600 / 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

/// The moment it is.
#[must_use]
pub fn now() -> i64 {
    Utc::now().timestamp()
}

/// How long something took; none where a clock was wrong and it would have ended before it began, or taken more than 60 days.
#[must_use]
pub fn between(from: Option<i64>, to: Option<i64>) -> Option<i64> {
    to?.checked_sub(from?).filter(|span| (0..=60 * DAY).contains(span))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_and_written() {
        assert_eq!(parse("1970-01-02T00:00:01Z"), Some(86_401));
        assert_eq!(parse("2026-11-27T17:31:36.123+01:00"), parse("2026-11-27T16:31:36Z"));
        assert_eq!(moment(86_401), "1970-01-02T00:00:01Z");
        assert_eq!(day(86_401), "1970-01-02");
        for wrong in ["", "yesterday", "1969-12-31T23:59:59Z", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00Z"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_clock_that_is_wrong_makes_a_span_unknown() {
        assert_eq!(between(Some(10), Some(15)), Some(5));
        assert_eq!(between(Some(15), Some(10)), None);
        assert_eq!(between(Some(0), Some(61 * DAY)), None);
        assert_eq!(between(None, Some(10)), None);
        assert_eq!(between(Some(i64::MIN), Some(10)), None);
    }

    #[test]
    fn spans_are_read_by_people() {
        let texts: Vec<String> = [5, 65, 3_720, 90_061].into_iter().map(span).collect();
        assert_eq!(texts, ["5 s", "1 min 5 s", "1 h 2 min", "1 d 1 h"]);
    }
}

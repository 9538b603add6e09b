//! How something ended, and whose fault that is.

use std::sync::LazyLock;

use regex::{Regex, RegexSet};
use serde::{Deserialize, Serialize};

use crate::github::{Job, Step};

/// How a job or a test ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// As it should.
    Passed,
    /// A test failed, or the job in a step that tests.
    Failed,
    /// A step that tests nothing failed, and no test did: it says nothing of the code.
    SetupFailed,
    /// Somebody stopped it.
    Cancelled,
    /// It was not meant to run.
    Skipped,
    /// It took longer than it may.
    TimedOut,
    /// It has not ended.
    Running,
}

impl Outcome {
    /// All of them, each at the place of its number in the store.
    pub const ALL: [Self; 7] =
        [Self::Passed, Self::Failed, Self::SetupFailed, Self::Cancelled, Self::Skipped, Self::TimedOut, Self::Running];

    /// Its number in the store.
    #[must_use]
    pub fn number(self) -> i64 {
        self as i64
    }

    /// From its number in the store; what is unknown has not ended.
    #[must_use]
    pub fn from_number(number: i64) -> Self {
        usize::try_from(number).ok().and_then(|number| Self::ALL.get(number)).copied().unwrap_or(Self::Running)
    }

    /// Its name in texts and addresses.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed => "failed",
            Self::SetupFailed => "set-up failed",
            Self::Cancelled => "cancelled",
            Self::Skipped => "skipped",
            Self::TimedOut => "timed out",
            Self::Running => "running",
        }
    }

    /// A letter for it where there is no room, in a row of results; not its colour alone tells it.
    #[must_use]
    pub fn letter(self) -> char {
        match self {
            Self::Passed => '✓',
            Self::Failed => '✗',
            Self::SetupFailed => '!',
            Self::Cancelled => '–',
            Self::Skipped => '·',
            Self::TimedOut => 'T',
            Self::Running => '…',
        }
    }

    /// Whether it says something of the code: true where that is good.
    #[must_use]
    pub fn verdict(self) -> Option<bool> {
        match self {
            Self::Passed => Some(true),
            Self::Failed | Self::TimedOut => Some(false),
            Self::SetupFailed | Self::Cancelled | Self::Skipped | Self::Running => None,
        }
    }
}

/// Steps that GitHub names by the action they use, and those that only bring results away: whatever their names hold, they test nothing.
static NO_TEST: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"^(?:Run|Post Run|Post) [\w.-]+/[\w./-]+@|(?i)^(?:post|upload|collect|report|publish|archive|download|set up|complete|clean)\b").ok()
});

/// How a job ended. `tests` are the names of steps that test: where another one failed first, what was to be tested was not.
#[must_use]
pub fn of_job(job: &Job, tests: &RegexSet) -> Outcome {
    match job.conclusion.as_deref() {
        None => Outcome::Running,
        Some("success" | "neutral") => Outcome::Passed,
        Some("skipped") => Outcome::Skipped,
        Some("cancelled" | "stale" | "action_required") => Outcome::Cancelled,
        Some("timed_out") => Outcome::TimedOut,
        Some("startup_failure") => Outcome::SetupFailed,
        Some(_) => {
            let is_test = |step: &Step| {
                tests.is_match(&step.name) && !NO_TEST.as_ref().is_some_and(|no_test| no_test.is_match(&step.name))
            };
            let mut failed = job.steps.iter().filter(|step| step.conclusion.as_deref() == Some("failure"));
            match failed.next() {
                // A job without steps has never begun: its runner was lost, or nobody gave it one.
                None if job.steps.is_empty() && job.started_at.is_none() => Outcome::SetupFailed,
                None => Outcome::Failed,
                Some(step) if is_test(step) => Outcome::Failed,
                // Where no step's name says that it tests, nothing can be told apart.
                Some(_) if !job.steps.iter().any(is_test) => Outcome::Failed,
                Some(_) => Outcome::SetupFailed,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(conclusion: Option<&str>, steps: &[(&str, &str)]) -> Job {
        Job {
            conclusion: conclusion.map(str::to_owned),
            started_at: Some("2026-01-01T00:00:00Z".to_owned()),
            steps: steps
                .iter()
                .map(|(name, end)| Step {
                    name: (*name).to_owned(),
                    conclusion: Some((*end).to_owned()),
                    ..Step::default()
                })
                .collect(),
            ..Job::default()
        }
    }

    #[test]
    fn numbers_and_outcomes_are_the_same() {
        for (number, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome.number(), i64::try_from(number).unwrap());
            assert_eq!(Outcome::from_number(outcome.number()), outcome);
        }
        assert_eq!(Outcome::from_number(99), Outcome::Running);
        assert_eq!(Outcome::from_number(-1), Outcome::Running);
    }

    #[test]
    fn a_failed_set_up_is_no_failed_test() {
        let tests = RegexSet::new(["(?i)\\btests?\\b", "(?i)^run "]).unwrap();
        let ends = [
            (job(None, &[]), Outcome::Running),
            (job(Some("success"), &[("Run tests", "success")]), Outcome::Passed),
            (job(Some("failure"), &[("Deploy", "success"), ("Run tests", "failure")]), Outcome::Failed),
            (job(Some("failure"), &[("Deploy", "failure"), ("Run tests", "skipped")]), Outcome::SetupFailed),
            // A step after the tests: the tests have failed first.
            (job(Some("failure"), &[("Run tests", "failure"), ("Collect", "failure")]), Outcome::Failed),
            // Nothing here says that it tests.
            (job(Some("failure"), &[("Lint", "failure")]), Outcome::Failed),
            // Its name would say that it tests; it is but an action, or brings results away.
            (
                job(Some("failure"), &[("Run actions/checkout@v4", "failure"), ("Run tests", "skipped")]),
                Outcome::SetupFailed,
            ),
            (job(Some("failure"), &[("pytest", "failure"), ("Upload test results", "success")]), Outcome::Failed),
            (
                job(
                    Some("failure"),
                    &[("Deploy", "failure"), ("Run tests", "skipped"), ("Collect tests' logs", "success")],
                ),
                Outcome::SetupFailed,
            ),
            (job(Some("timed_out"), &[("Run tests", "cancelled")]), Outcome::TimedOut),
            (job(Some("cancelled"), &[]), Outcome::Cancelled),
            (job(Some("something new"), &[]), Outcome::Failed),
            (Job { started_at: None, ..job(Some("failure"), &[]) }, Outcome::SetupFailed),
        ];
        for (job, expected) in ends {
            assert_eq!(of_job(&job, &tests), expected, "{job:?}");
        }
    }
}

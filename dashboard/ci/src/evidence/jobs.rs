//! How each job is: red or green on the branch, since when, how often, how long, and whether it should be required.

use coracle_ci_statistics::change_points;
use rusqlite::{Transaction, params};
use serde::{Deserialize, Serialize};

use crate::outcome::Outcome;
use crate::settings::Settings;
use crate::times;

/// How many results of a job are shown in a row.
const DOTS: usize = 14;
/// Over how many verdicts failures are counted.
const WINDOW: usize = 30;
/// Over how many passes a job's time is looked at.
const TIMES: usize = 120;
/// How improbable a change of the time must be.
const ALARM: f64 = 0.01;
/// By which factor it must change to be told.
const TOLD: f64 = 1.15;

/// One result in the row.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Dot {
    /// The attempt's row.
    pub execution: i64,
    /// How the first attempt ended.
    pub outcome: Outcome,
    /// Whether a later attempt of the same run passed.
    pub rerun_passed: bool,
    /// When.
    pub at: i64,
}

/// After how many runs without a verdict, the newest ones, an older verdict says no more how a job is.
const SILENT: usize = 3;
/// How long a workflow runs without a job before that is gone.
const GONE: i64 = 14 * times::DAY;

/// One attempt, with its run.
struct Attempt {
    execution: i64,
    run: i64,
    number: i64,
    outcome: Outcome,
    at: i64,
    sha: String,
    is_of_branch: bool,
    span: (Option<i64>, Option<i64>),
}

/// One run's end of a job: the first attempt's, and whether a later one passed.
struct End {
    execution: i64,
    outcome: Outcome,
    rerun_passed: bool,
    at: i64,
    sha: String,
    seconds: Option<i64>,
}

struct Known {
    job: i64,
    /// When its workflow ran last on a branch.
    workflow_ran: Option<i64>,
    name: String,
    workflow: String,
    repository: String,
    is_required: bool,
}

pub(super) fn derive(transaction: &Transaction<'_>, settings: &Settings, now: i64) -> rusqlite::Result<()> {
    transaction.execute("DELETE FROM evidence_job", [])?;
    let known = known(transaction)?;
    let mut attempts = transaction.prepare(
        "SELECT e.id, e.run, e.outcome, r.created, r.sha, r.branch, r.event, e.started, e.completed, e.attempt
         FROM execution e JOIN run r ON r.id = e.run WHERE e.job = ?1 AND e.retold = 0 ORDER BY r.created, e.run, e.attempt, e.id",
    )?;
    for job in known {
        let branch = settings.branch(&job.repository).to_owned();
        let rows = attempts.query_map([job.job], |row| {
            let (on, event): (String, String) = (row.get(5)?, row.get(6)?);
            Ok(Attempt {
                execution: row.get(0)?,
                run: row.get(1)?,
                number: row.get(9)?,
                outcome: Outcome::from_number(row.get(2)?),
                at: row.get(3)?,
                sha: row.get(4)?,
                is_of_branch: on == branch && !event.starts_with("pull_request"),
                span: (row.get(7)?, row.get(8)?),
            })
        })?;
        let attempts = rows.collect::<rusqlite::Result<Vec<_>>>()?;
        store(transaction, settings, &job, &attempts, now)?;
    }
    Ok(())
}

/// All jobs that are not but an old name of another.
fn known(transaction: &Transaction<'_>) -> rusqlite::Result<Vec<Known>> {
    let mut find = transaction.prepare(
        "SELECT j.id, j.name, w.name, p.name,
                EXISTS (SELECT 1 FROM required q WHERE q.repository = p.id AND (q.name = j.name OR q.name = w.name || ' / ' || j.name
                        OR (substr(q.name, -3) = '...' AND substr(j.name, 1, length(q.name) - 3) = substr(q.name, 1, length(q.name) - 3))))
                , (SELECT max(r.created) FROM run r WHERE r.workflow = w.id AND r.event NOT LIKE 'pull_request%')
         FROM job j JOIN workflow w ON w.id = j.workflow JOIN repository p ON p.id = w.repository
         WHERE EXISTS (SELECT 1 FROM execution e WHERE e.job = j.id)",
    )?;
    let rows = find.query_map([], |row| {
        Ok(Known {
            job: row.get(0)?,
            name: row.get(1)?,
            workflow: row.get(2)?,
            repository: row.get(3)?,
            is_required: row.get(4)?,
            workflow_ran: row.get(5)?,
        })
    })?;
    rows.collect()
}

/// How bad an end is: of two jobs of one name in one attempt the worse one counts.
fn badness(outcome: Outcome) -> u8 {
    match outcome {
        Outcome::Skipped => 0,
        Outcome::Passed => 1,
        Outcome::Running => 2,
        Outcome::Cancelled => 3,
        Outcome::SetupFailed => 4,
        Outcome::TimedOut => 5,
        Outcome::Failed => 6,
    }
}

/// The ends of a job's runs, whose attempts come one after another. A run's end is its first attempt's that says something of the code; the first one's
/// where none does.
fn ends<'a>(attempts: impl Iterator<Item = &'a Attempt>) -> Vec<End> {
    let mut runs: Vec<(i64, Vec<&Attempt>)> = Vec::new();
    for attempt in attempts {
        let (run, own) = match runs.last_mut() {
            Some((run, own)) if *run == attempt.run => (*run, own),
            _ => {
                runs.push((attempt.run, Vec::new()));
                let Some((run, own)) = runs.last_mut() else { continue };
                (*run, own)
            }
        };
        match own.last_mut() {
            Some(last) if last.number == attempt.number && run == attempt.run => {
                if badness(attempt.outcome) > badness(last.outcome) {
                    *last = attempt;
                }
            }
            _ => own.push(attempt),
        }
    }
    let end = |attempts: &Vec<&Attempt>| {
        let place = attempts.iter().position(|attempt| attempt.outcome.verdict().is_some()).unwrap_or(0);
        let attempt = attempts.get(place)?;
        let later = attempts.iter().skip(place + 1);
        Some(End {
            execution: attempt.execution,
            outcome: attempt.outcome,
            rerun_passed: attempt.outcome.verdict() == Some(false)
                && later.into_iter().any(|later| later.outcome == Outcome::Passed),
            at: attempt.at,
            sha: attempt.sha.clone(),
            seconds: times::between(attempt.span.0, attempt.span.1),
        })
    };
    runs.iter().filter_map(|(_, attempts)| end(attempts)).collect()
}

/// Red or green, by the newest run that says something of the code.
struct State<'a> {
    name: &'static str,
    since: Option<i64>,
    streak: i64,
    first_bad: Option<&'a str>,
    last_good: Option<&'a str>,
}

fn state(ends: &[End]) -> State<'_> {
    let silent =
        ends.iter().rev().take_while(|end| end.outcome.verdict().is_none() && end.outcome != Outcome::Running).count();
    let verdicts: Vec<(&End, bool)> = ends.iter().filter_map(|end| Some((end, end.outcome.verdict()?))).collect();
    let Some((_, newest)) = verdicts.last().copied() else {
        return State { name: "not run", since: None, streak: 0, first_bad: None, last_good: None };
    };
    let streak: Vec<&End> =
        verdicts.iter().rev().take_while(|(_, good)| *good == newest).map(|(end, _)| *end).collect();
    let first = streak.last().copied();
    let good = verdicts.iter().rev().find(|(_, good)| *good).map(|(end, _)| end.sha.as_str());
    // What was green before its build broke is not known to be green.
    let is_silent = silent >= SILENT && newest;
    State {
        name: if is_silent {
            "not run"
        } else if newest {
            "passed"
        } else {
            "failed"
        },
        since: first.map(|end| end.at),
        streak: streak.len() as i64,
        first_bad: first.filter(|_| !newest).map(|end| end.sha.as_str()),
        last_good: good,
    }
}

/// The middle of a job's times, and where they changed last: by which factor, since which moment.
fn times_of(ends: &[End]) -> (Option<i64>, Option<(f64, i64)>) {
    let passed: Vec<(i64, f64)> = ends
        .iter()
        .filter(|end| end.outcome == Outcome::Passed)
        .filter_map(|end| Some((end.at, end.seconds? as f64)))
        .collect();
    let recent = passed.get(passed.len().saturating_sub(TIMES)..).unwrap_or_default();
    let series: Vec<f64> = recent.iter().map(|(_, seconds)| *seconds).collect();
    let mut newest: Vec<f64> = series.iter().rev().take(20).copied().collect();
    newest.sort_by(f64::total_cmp);
    let median = newest.get(newest.len() / 2).map(|seconds| *seconds as i64);
    let change = change_points(&series, ALARM, 1).into_iter().next_back().and_then(|change| {
        let factor = change.after / change.before;
        let is_told = change.before > 0.0 && (factor >= TOLD || factor <= 1.0 / TOLD);
        is_told.then_some((factor, recent.get(change.at)?.0))
    });
    (median, change)
}

/// Whether a check should become required, or stop being so, and why.
fn advice(settings: &Settings, is_required: bool, ends: &[End], flaky: (i64, i64), now: i64) -> (&'static str, String) {
    // A day is red where any run of it was.
    let mut days: Vec<(i64, bool)> = Vec::new();
    for end in ends.iter().filter(|end| now - end.at < 60 * times::DAY) {
        let Some(good) = end.outcome.verdict() else { continue };
        let day = end.at / times::DAY;
        match days.last_mut() {
            Some((last, all)) if *last == day => *all &= good,
            _ => days.push((day, good)),
        }
    }
    if is_required {
        let last: Vec<bool> = days.iter().rev().take(10).map(|(_, good)| *good).collect();
        let red = last.iter().filter(|good| !**good).count();
        if red >= settings.policy.demote_after_red_days as usize {
            return ("demote", format!("failed on {red} of its last {} days", last.len()));
        }
        return ("", String::new());
    }
    let green = days.iter().rev().take_while(|(_, good)| *good).count();
    let share = if flaky.1 > 0 { flaky.0 as f64 / flaky.1 as f64 } else { 0.0 };
    if green >= settings.policy.promote_after_green_days as usize && share <= settings.policy.flaky_at_most {
        return ("promote", format!("{green} days without a failure, flaky on {} of {} commits", flaky.0, flaky.1));
    }
    ("", String::new())
}

fn store(
    transaction: &Transaction<'_>,
    settings: &Settings,
    job: &Known,
    attempts: &[Attempt],
    now: i64,
) -> rusqlite::Result<()> {
    let of_branch = ends(attempts.iter().filter(|attempt| attempt.is_of_branch));
    // A check that never runs on the branch blocks changes all the same: what is known of it is how it went on them.
    let is_of_branch = !of_branch.is_empty();
    let ends = if is_of_branch { of_branch } else { ends(attempts.iter()) };
    let mut state = state(&ends);
    if !is_of_branch {
        state = State { name: "on changes", since: None, streak: 0, first_bad: None, last_good: None };
    }
    let newest = ends.last().map(|end| end.at);
    if is_of_branch && job.workflow_ran.zip(newest).is_some_and(|(workflow, own)| workflow - own > GONE) {
        state = State { name: "gone", since: newest, streak: 0, first_bad: None, last_good: None };
    }
    let recent: Vec<bool> = ends.iter().rev().filter_map(|end| end.outcome.verdict()).take(WINDOW).collect();
    let failures = recent.iter().filter(|good| !**good).count() as i64;
    let rerun_passes = ends.iter().rev().take(WINDOW).filter(|end| end.rerun_passed).count() as i64;
    let find = "SELECT flaky, compared FROM evidence_flake WHERE test = 0 AND job = ?1";
    let flaky =
        transaction.prepare_cached(find)?.query_row([job.job], |row| Ok((row.get(0)?, row.get(1)?))).unwrap_or((0, 0));
    let (median, change) = times_of(&ends);
    let dots: Vec<Dot> = ends
        .iter()
        .skip(ends.len().saturating_sub(DOTS))
        .map(|end| Dot { execution: end.execution, outcome: end.outcome, rerun_passed: end.rerun_passed, at: end.at })
        .collect();
    let (advice, reason) = if is_of_branch && state.name != "gone" {
        advice(settings, job.is_required, &ends, flaky, now)
    } else {
        ("", String::new())
    };
    let owner = settings.owner(&job.name);
    let last = attempts.iter().map(|attempt| attempt.at).max();
    transaction
        .prepare_cached(
            "INSERT INTO evidence_job VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21, ?22, ?23, ?24)",
        )?
        .execute(params![
            job.job,
            job.repository,
            job.workflow,
            job.name,
            job.is_required,
            owner.map_or("", |owner| owner.name.as_str()),
            owner.map_or("", |owner| owner.contact.as_str()),
            state.name,
            state.since,
            state.streak,
            state.first_bad,
            state.last_good,
            last,
            failures,
            recent.len() as i64,
            flaky.0,
            flaky.1,
            rerun_passes,
            median,
            change.map(|(factor, _)| factor),
            change.map(|(_, since)| times::day(since)),
            serde_json::to_string(&dots).unwrap_or_default(),
            advice,
            reason,
        ])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(day: i64, outcome: Outcome) -> End {
        End {
            execution: day,
            outcome,
            rerun_passed: false,
            at: day * times::DAY,
            sha: format!("sha{day}"),
            seconds: Some(60),
        }
    }

    fn row(letters: &str) -> Vec<End> {
        letters
            .chars()
            .enumerate()
            .map(|(day, letter)| {
                let outcome = match letter {
                    'p' => Outcome::Passed,
                    'f' => Outcome::Failed,
                    's' => Outcome::SetupFailed,
                    _ => Outcome::Cancelled,
                };
                end(day as i64, outcome)
            })
            .collect()
    }

    #[test]
    fn since_when_a_job_is_red_passes_over_what_did_not_run() {
        let ends = row("ppfsfc");
        let found = state(&ends);
        assert_eq!(
            (found.name, found.streak, found.first_bad, found.last_good),
            ("failed", 2, Some("sha2"), Some("sha1"))
        );
        assert_eq!(found.since, Some(2 * times::DAY));
        let ends = row("ffpps");
        let found = state(&ends);
        assert_eq!((found.name, found.streak, found.first_bad, found.last_good), ("passed", 2, None, Some("sha3")));
        assert_eq!(state(&row("sc")).name, "not run");
        // Its build has broken: it is not green any more; what was red stays so.
        assert_eq!(
            (state(&row("ppss")).name, state(&row("ppsss")).name, state(&row("pfsss")).name),
            ("passed", "not run", "failed")
        );
    }

    #[test]
    fn the_first_attempt_is_the_verdict_and_a_later_pass_is_told() {
        let attempt = |execution, run, number, outcome| Attempt {
            execution,
            run,
            number,
            outcome,
            at: run,
            sha: String::new(),
            is_of_branch: true,
            span: (None, None),
        };
        let attempts = [
            attempt(1, 1, 1, Outcome::Failed),
            attempt(2, 1, 2, Outcome::Passed),
            // What did not set up says nothing; the next attempt does.
            attempt(3, 2, 1, Outcome::SetupFailed),
            attempt(4, 2, 2, Outcome::Failed),
            // Two jobs of one name in one attempt: no rerun.
            attempt(5, 3, 1, Outcome::Passed),
            attempt(6, 3, 1, Outcome::Failed),
            attempt(7, 4, 1, Outcome::Failed),
            attempt(8, 4, 1, Outcome::Passed),
        ];
        let found: Vec<_> =
            ends(attempts.iter()).iter().map(|end| (end.execution, end.outcome, end.rerun_passed)).collect();
        let failed = Outcome::Failed;
        assert_eq!(found, [(1, failed, true), (4, failed, false), (6, failed, false), (7, failed, false)]);
    }

    #[test]
    fn the_policy_gives_its_reasons() {
        let settings = Settings::read(None).unwrap();
        let now = 20 * times::DAY;
        let green = row("fppppppppspp");
        assert_eq!(advice(&settings, false, &green, (0, 5), now).0, "promote");
        assert_eq!(advice(&settings, false, &green, (2, 5), now).0, "");
        assert_eq!(advice(&settings, false, &row("pppppfppp"), (0, 5), now).0, "");
        let (advised, reason) = advice(&settings, true, &row("pppppfffffp"), (0, 5), now);
        assert_eq!((advised, reason.as_str()), ("demote", "failed on 5 of its last 10 days"));
        assert_eq!(advice(&settings, true, &green, (0, 5), now).0, "");
    }

    #[test]
    fn a_job_that_became_slower_is_told_with_its_day() {
        let mut ends: Vec<End> =
            (0..60).map(|day| End { seconds: Some(600 + day % 7), ..end(day, Outcome::Passed) }).collect();
        assert_eq!(times_of(&ends), (Some(603), None));
        for end in ends.iter_mut().skip(40) {
            end.seconds = Some(900 + end.at / times::DAY % 7);
        }
        let (median, change) = times_of(&ends);
        let (factor, since) = change.unwrap();
        assert!((1.4..1.6).contains(&factor) && since.abs_diff(40 * times::DAY) <= 2 * times::DAY as u64);
        assert_eq!(median, Some(903));
    }
}

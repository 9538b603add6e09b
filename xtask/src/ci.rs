//! `cargo xtask ci`: what CI runs, job by job: each with its log, its time beside its budget, and its result, all of which the board shows. One that
//! fails does not keep the others from running.

use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::budgets::Budgets;
use crate::steps::{command, output};
use crate::{board, build, gates};

/// Run what CI runs, and collect the results into the board.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these jobs.
    #[arg(long, value_delimiter = ',')]
    job: Vec<String>,
}

/// The jobs: a name, which is its budget's, too, and the task.
const JOBS: [(&str, &[&str]); 12] = [
    ("lint", &["lint"]),
    ("fuzz", &["fuzz", "--smoke"]),
    ("unit", &["test", "--lane", "unit"]),
    ("board", &["test", "--lane", "board"]),
    ("build", &["image"]),
    ("counts", &["bench", "--gate"]),
    ("gates", &["gates"]),
    ("flow", &["test", "--lane", "flow"]),
    ("faults", &["test", "--lane", "faults"]),
    ("contract", &["test", "--lane", "contract"]),
    ("e2e", &["test", "--lane", "e2e"]),
    ("builtin", &["test", "--lane", "builtin"]),
];

/// Jobs that run by name alone: what does not fit into the hour.
const BY_NAME: [(&str, &[&str]); 1] = [("coverage", &["coverage"])];

/// How many times its budget a job may take before it is ended.
const PATIENCE: u32 = 3;

/// How long output is waited for that what a job has left running may still hold open.
const GRACE: Duration = Duration::from_secs(5);

/// How a job ended.
struct Done {
    name: &'static str,
    passed: bool,
    begin: u64,
    end: u64,
    log: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let known: Vec<&str> = JOBS.iter().chain(&BY_NAME).map(|(name, _)| *name).collect();
    for job in &args.job {
        if !known.contains(&job.as_str()) {
            bail!("there is no job {job}; there are {}", known.join(", "));
        }
    }
    let budgets = Budgets::read()?;
    let begin = now();
    let folder = build::target()?.join("ci/record").join(begin.to_string());
    std::fs::create_dir_all(folder.join("logs")).with_context(|| format!("make {}", folder.display()))?;
    let mut done = Vec::new();
    for (number, (name, task)) in JOBS.iter().chain(&BY_NAME).enumerate() {
        let is_each_time = number < JOBS.len();
        if args.job.is_empty() && is_each_time || args.job.iter().any(|job| job == name) {
            let (id, minutes) = (begin * 100 + number as u64, budgets.minutes(name)?);
            let log = folder.join("logs").join(format!("{id}.txt"));
            let own = now();
            // One that could not even be run is one that failed.
            let passed = one(name, task, (&log, &folder.join("results").join(id.to_string())), minutes);
            let passed = passed.unwrap_or_else(|error| {
                println!("job {name}: {error:#}");
                false
            });
            done.push(Done { name, passed, begin: own, end: now(), log });
        }
    }
    let shown = record(&folder, begin, &done).and_then(|()| board::collect(folder.parent().unwrap_or(&folder)));
    print_times(&done, &budgets)?;
    if let Err(error) = &shown {
        println!("the results are not on the board: {error:#}");
    }
    let (passed, failed, skipped) = sum(&done);
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    let red: Vec<&str> = done.iter().filter(|job| !job.passed).map(|job| job.name).collect();
    if !red.is_empty() {
        bail!("failed: {}", red.join(", "));
    }
    if passed == 0 && args.job.is_empty() {
        bail!("no test has run");
    }
    shown
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// What comes from a job.
enum Came {
    Bytes(Vec<u8>),
    /// Nothing more comes from it, or from what it has left running.
    End,
    Ended(std::process::ExitStatus),
}

/// Runs one, its output passed on and kept; whether it passed.
fn one(name: &str, task: &[&str], (log, results): (&Path, &Path), minutes: u64) -> Result<bool> {
    println!("==> job {name} (budget: {minutes} min)");
    let mut file = std::fs::File::create(log).with_context(|| format!("make {}", log.display()))?;
    // One stream of both, in their order.
    let program = std::env::current_exe().context("this program")?.display().to_string();
    let mut command = command("sh", &["-c", "exec \"$0\" \"$@\" 2>&1"]);
    command.arg(program).args(task).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    command.env("CORACLE_CI_RESULTS", results);
    let mut child = command.spawn().with_context(|| format!("start {name}"))?;
    let group = nix::unistd::Pid::from_raw(i32::try_from(child.id()).context("its number")?);
    let mut output = child.stdout.take().context("its output")?;
    // Full, it holds the job up instead of filling memory.
    let (pieces, came) = sync_channel(64);
    let ended = pieces.clone();
    std::thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        while let Ok(read) = output.read(&mut piece) {
            let bytes = piece.get(..read).unwrap_or_default().to_vec();
            let came = if bytes.is_empty() { Came::End } else { Came::Bytes(bytes) };
            if pieces.send(came).is_err() || read == 0 {
                break;
            }
        }
    });
    std::thread::spawn(move || child.wait().map(|status| ended.send(Came::Ended(status))));
    let mut out = std::io::stdout();
    let mut write = |bytes: &[u8]| -> Result<()> {
        out.write_all(bytes).and_then(|()| out.flush()).context("print its output")?;
        file.write_all(bytes).context("keep its output")
    };
    let (mut deadline, mut status, mut hangs) =
        (Instant::now() + Duration::from_secs(60 * minutes) * PATIENCE, None, false);
    let mut is_whole = false;
    while !(is_whole && status.is_some()) {
        let rest = deadline.saturating_duration_since(Instant::now());
        match (rest.is_zero(), came.recv_timeout(rest)) {
            // Who reads nothing of it has no use for it.
            (false, Ok(Came::Bytes(bytes))) => write(&bytes).inspect_err(|_| {
                let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
            })?,
            (false, Ok(Came::End)) => is_whole = true,
            (false, Ok(Came::Ended(ended))) => {
                status = Some(ended);
                // What it has left running may hold its output open.
                deadline = Instant::now() + GRACE;
            }
            // Its time is over: it is ended, and what it said last is heard.
            _ if status.is_none() && !hangs => {
                hangs = true;
                nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).context("end it")?;
                deadline = Instant::now() + GRACE;
            }
            _ => break,
        }
    }
    if hangs {
        write(
            format!("\n##[error]job {name} was ended: it took more than {PATIENCE} times its {minutes} minutes\n")
                .as_bytes(),
        )?;
    }
    Ok(!hangs && status.is_some_and(|status| status.success()))
}

/// Writes the run as the API would tell it.
fn record(folder: &Path, begin: u64, done: &[Done]) -> Result<()> {
    let text = |arguments: &[&str]| output(command("git", arguments)).map(|text| text.trim().to_owned());
    // A tree with changes is no commit: what it shows is evidence of none.
    let is_clean = text(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|changes| changes.is_empty());
    let sha = text(&["rev-parse", "HEAD"]).ok().filter(|_| is_clean).unwrap_or_default();
    let branch = text(&["rev-parse", "--abbrev-ref", "HEAD"]).unwrap_or_default();
    let title = text(&["log", "-1", "--format=%s"]).unwrap_or_default();
    let passed = done.iter().all(|job| job.passed);
    let moment = |seconds: u64| {
        output(command("date", &["-u", "-d", &format!("@{seconds}"), "+%Y-%m-%dT%H:%M:%SZ"]))
            .map(|text| text.trim().to_owned())
    };
    let conclusion = |passed: bool| if passed { "success" } else { "failure" };
    let end = done.last().map_or(begin, |job| job.end);
    let run = json!({
        "id": begin, "name": "CI", "path": ".ci/run", "event": "push", "head_branch": branch, "head_sha": sha,
        "head_commit": { "message": title, "timestamp": text(&["log", "-1", "--format=%cI"]).unwrap_or_default(), "author": { "name": text(&["log", "-1", "--format=%an"]).unwrap_or_default() } },
        "run_number": begin, "run_attempt": 1, "status": "completed", "conclusion": conclusion(passed), "display_title": title,
        "created_at": moment(begin)?, "updated_at": moment(end)?, "repository": { "full_name": board::PROJECT },
    });
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let mut jobs = Vec::new();
    for job in done {
        let id: u64 = job
            .log
            .file_stem()
            .and_then(|stem| stem.to_str())
            .and_then(|stem| stem.parse().ok())
            .context("a job's number")?;
        let (started, completed) = (moment(job.begin)?, moment(job.end)?);
        jobs.push(json!({
            "id": id, "run_id": begin, "run_attempt": 1, "name": job.name, "head_sha": sha, "status": "completed",
            "conclusion": conclusion(job.passed), "created_at": started, "started_at": started, "completed_at": completed,
            "labels": [format!("{cores} cores")], "steps": [{ "number": 1, "name": "Run tests", "status": "completed",
                "conclusion": conclusion(job.passed), "started_at": started, "completed_at": completed }],
        }));
    }
    let write = |name: &str, value: &Value| {
        let path = folder.join(name);
        std::fs::write(&path, format!("{value:#}")).with_context(|| format!("write {}", path.display()))
    };
    write("runs.json", &json!({ "total_count": 1, "workflow_runs": [run] }))?;
    write("jobs.json", &json!({ "total_count": jobs.len(), "jobs": jobs }))?;
    let ended: Vec<(&str, bool)> = done.iter().map(|job| (job.name, job.passed)).collect();
    write("assessments.json", &json!({ board::PROJECT: gates::found(&ended, &moment(end)?, &sha)? }))
}

/// What each took, beside its budget.
fn print_times(done: &[Done], budgets: &Budgets) -> Result<()> {
    println!("minutes by job, beside the budget:");
    let mut sum = 0;
    for job in done {
        let (seconds, minutes) = (job.end.saturating_sub(job.begin), budgets.minutes(job.name)?);
        sum += seconds;
        let word = if seconds > 60 * minutes { ", over it" } else { "" };
        println!("  {:8} {:4.1} of {minutes}{word}", job.name, seconds as f64 / 60.0);
    }
    println!("  {:8} {:4.1}", "all", sum as f64 / 60.0);
    Ok(())
}

/// The test runners' own summaries, summed up.
fn sum(done: &[Done]) -> (u64, u64, u64) {
    let mut sums = (0, 0, 0);
    for job in done {
        let text = std::fs::read(&job.log).unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines().filter(|line| line.starts_with("test result:")) {
            let (passed, failed, ignored) = summary(line);
            sums = (sums.0 + passed, sums.1 + failed, sums.2 + ignored);
        }
    }
    sums
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn summary(line: &str) -> (u64, u64, u64) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let before = |word: &str| {
        let at = words.iter().position(|found| *found == word)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    (before("passed;").unwrap_or(0), before("failed;").unwrap_or(0), before("ignored;").unwrap_or(0))
}

/// Where jobs put figures for the board, where CI runs them.
pub(crate) fn results() -> Option<PathBuf> {
    std::env::var_os("CORACLE_CI_RESULTS").map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_runners_summary_is_read() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s";
        assert_eq!(summary(line), (12, 3, 1));
        assert_eq!(summary("test result: nothing"), (0, 0, 0));
    }

    #[test]
    fn each_job_has_a_budget_and_they_keep_within_the_hour() {
        let budgets = Budgets::read().unwrap();
        let sum: u64 = JOBS.iter().map(|(name, _)| budgets.minutes(name).unwrap()).sum();
        assert!(sum <= 60 && BY_NAME.iter().all(|(name, _)| budgets.minutes(name).is_ok()), "{sum}");
    }
}

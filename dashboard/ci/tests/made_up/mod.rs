//! A project that is made up: nights of jobs with tests, a pull request a day with reruns, planted flakes, and a job that breaks for good.

use std::io::{BufRead, Cursor};

use coracle_ci::collect::{Assessment, Report, Source, TakeReport};
use coracle_ci::error::Result;
use coracle_ci::github::{Author, Commit, Job, Run, Step};
use coracle_ci::settings::Repository;
use coracle_ci::store::Point;
use coracle_ci::times;

/// The first night.
pub(crate) const FIRST: i64 = 1_735_689_600;
/// The name of the project.
pub(crate) const PROJECT: &str = "made-up/project";

/// How large it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MadeUp {
    /// Jobs of a night.
    pub(crate) jobs: i64,
    /// Nights.
    pub(crate) nights: i64,
    /// Tests of all jobs.
    pub(crate) tests: i64,
    /// Of a thousand ends of jobs so many fail.
    pub(crate) failures: u64,
}

/// A number drawn by what it is for: the same for the same.
pub(crate) fn drawn(parts: &[i64]) -> u64 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for part in parts {
        state = (state ^ (*part as u64)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state ^= state >> 29;
        state = state.wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^= state >> 32;
    }
    state
}

/// A point of a series that becomes larger by `change` in the middle of its nights.
pub(crate) fn point(night: i64, nights: i64, change: f64) -> Point {
    let base = if night < nights / 2 { 400.0 } else { 400.0 + change };
    let raw: Vec<f64> = (0..10).map(|at| base + (drawn(&[night, at]) % 200) as f64 / 10.0).collect();
    Point {
        suite: "start".to_owned(),
        name: "run true".to_owned(),
        unit: "ms".to_owned(),
        at: FIRST + night * times::DAY,
        sha: format!("{:016x}", drawn(&[night, 1])),
        environment: "{\"cpu\":\"made up\"}".to_owned(),
        value: raw[5],
        raw,
    }
}

impl MadeUp {
    pub(crate) fn night(&self, night: i64) -> Run {
        let sha = format!("{:016x}{:016x}{:08x}", drawn(&[night, 1]), drawn(&[night, 2]), night);
        Run {
            id: 1_000 + night,
            name: Some("Nightly".to_owned()),
            path: Some(".github/workflows/nightly.yaml".to_owned()),
            event: Some("schedule".to_owned()),
            head_branch: Some("main".to_owned()),
            head_commit: Some(Commit {
                message: Some(format!("Change number {night}\n\nWith a reason.")),
                timestamp: Some(times::moment(FIRST + night * times::DAY - 3_600)),
                author: Some(Author { name: Some("Ann Author".to_owned()) }),
            }),
            head_sha: Some(sha),
            run_number: Some(night),
            run_attempt: Some(1),
            status: Some("completed".to_owned()),
            conclusion: Some("failure".to_owned()),
            created_at: Some(times::moment(FIRST + night * times::DAY)),
            html_url: Some(format!("https://github.com/{PROJECT}/actions/runs/{}", 1_000 + night)),
            ..Run::default()
        }
    }

    fn change(&self, night: i64) -> Run {
        let number = 100 + night / 2;
        Run {
            id: 500_000 + night,
            name: Some("Pull requests".to_owned()),
            path: Some(".github/workflows/pull.yaml".to_owned()),
            event: Some("pull_request".to_owned()),
            head_branch: Some(format!("topic-{number}")),
            head_sha: Some(format!("{:016x}{:024x}", drawn(&[night, 3]), night)),
            run_attempt: Some(2),
            display_title: Some(format!("Makes <b>thing</b> {number} better")),
            created_at: Some(times::moment(FIRST + night * times::DAY + 36_000)),
            html_url: Some(format!("https://github.com/{PROJECT}/actions/runs/{}", 500_000 + night)),
            pull_requests: vec![coracle_ci::github::Pull { number, base: None }],
            ..self.night(night)
        }
    }

    pub(crate) fn end(&self, run: i64, job: i64, attempt: i64) -> bool {
        // The second job breaks for good in the last tenth of the nights.
        let is_broken = job == 2 && run >= 1_000 + self.nights - self.nights / 10 && run < 500_000;
        !is_broken && drawn(&[run, job, attempt]) % 1_000 >= self.failures
    }

    pub(crate) fn job(&self, run: i64, job: i64, attempt: i64) -> Job {
        let made = if run >= 500_000 {
            FIRST + (run - 500_000) * times::DAY + 36_000
        } else {
            FIRST + (run - 1_000) * times::DAY
        };
        let passes = self.end(run, job, attempt);
        let night = if run >= 500_000 { run - 500_000 } else { run - 1_000 };
        let is_setup = !passes && drawn(&[run, job, attempt, 7]).is_multiple_of(8);
        let queue = (drawn(&[run, job, 5]) % 40) as i64;
        let slower = if job == 3 && night > self.nights / 2 { 300 } else { 0 };
        let takes = 600 + slower + 7 * (job % 40) + (drawn(&[run, job, attempt, 6]) % 60) as i64;
        let begins = made + queue + (attempt - 1) * 4_000;
        let (begin, end) = (times::moment(begins), times::moment(begins + takes));
        let step = |number: i64, name: &str, conclusion: &str| Step {
            number,
            name: name.to_owned(),
            status: Some("completed".to_owned()),
            conclusion: Some(conclusion.to_owned()),
            started_at: Some(begin.clone()),
            completed_at: Some(end.clone()),
        };
        let id = (run * 1_000 + job) * 10 + attempt;
        Job {
            id,
            run_id: run,
            run_attempt: Some(attempt),
            name: format!("run-tests ({}, {})", ["qemu", "built-in", "qemu-tdx", "remote"][(job % 4) as usize], job),
            status: Some("completed".to_owned()),
            conclusion: Some(if passes { "success" } else { "failure" }.to_owned()),
            created_at: Some(times::moment(made + (attempt - 1) * 4_000)),
            started_at: Some(begin.clone()),
            completed_at: Some(end.clone()),
            labels: vec![["ubuntu-24.04", "arm64", "tdx"][(job % 3) as usize].to_owned()],
            runner_name: Some(format!("runner-{}", drawn(&[run, job]) % 20)),
            html_url: Some(format!("https://github.com/{PROJECT}/actions/runs/{run}/job/{id}")),
            steps: vec![
                step(1, "Set up job", "success"),
                step(2, "Deploy", if is_setup { "failure" } else { "success" }),
                step(
                    3,
                    "Run tests",
                    if is_setup {
                        "skipped"
                    } else if passes {
                        "success"
                    } else {
                        "failure"
                    },
                ),
            ],
            ..Job::default()
        }
    }

    fn tap(&self, job: i64) -> String {
        let (run, number, attempt) = (job / 10 / 1_000, job / 10 % 1_000, job % 10);
        let passes = self.end(run, number, attempt);
        let count = self.tests / self.jobs;
        let fails = (drawn(&[run, number, attempt, 9]) % count as u64) as i64;
        let mut text = format!("1..{count}\n");
        for test in 0..count {
            let bad = !passes && test == fails;
            let word = if bad { "not ok" } else { "ok" };
            text.push_str(&format!(
                "{word} {} - case {test} of <i>suite</i> {number} in {}ms\n",
                test + 1,
                100 + drawn(&[run, number, test]) % 100
            ));
            if bad {
                let causes = ["timeout after 30 s", "connection refused by 10.0.0.7:8080", "expected 3, found 4"];
                text.push_str(&format!("# {} (pod {:x})\n", causes[(fails % 3) as usize], drawn(&[run, number])));
            }
        }
        text
    }
}

impl Source for MadeUp {
    fn runs(&mut self, _: &Repository, page: u32, _: i64) -> Result<Option<Vec<Run>>> {
        let first = (i64::from(page) - 1) * 50;
        if first >= self.nights {
            return Ok(None);
        }
        let nights = first..(first + 50).min(self.nights);
        Ok(Some(nights.flat_map(|night| [self.night(night), self.change(night)]).collect()))
    }

    fn jobs(&mut self, _: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
        if run < 500_000 {
            return Ok(Some((0..self.jobs).map(|job| self.job(run, job, 1)).collect()));
        }
        // What failed is tried again.
        let jobs = 0..self.jobs.min(40);
        Ok(Some(
            jobs.flat_map(|job| {
                let again = (!self.end(run, job, 1)).then(|| self.job(run, job, 2));
                [Some(self.job(run, job, 1)), again].into_iter().flatten()
            })
            .collect(),
        ))
    }

    fn log(&mut self, _: &Repository, job: i64) -> Result<Option<Box<dyn BufRead>>> {
        let text =
            format!("2025-01-01T00:00:00.0000000Z ##[error]Deploy: no answer from 10.0.0.{} in 30 s\n", job % 250);
        Ok(Some(Box::new(Cursor::new(text.into_bytes()))))
    }

    fn reports(&mut self, _: &Repository, _: i64, jobs: &[Job], take: &mut TakeReport<'_>) -> Result<()> {
        for job in jobs {
            // Nothing ran where the set-up failed.
            let is_setup = job.steps[1].conclusion.as_deref() == Some("failure");
            let text = if is_setup { String::new() } else { self.tap(job.id) };
            let what = format!("report of job {}", job.id);
            take(Ok((
                job.id,
                Report { what, name: "report.tap".to_owned(), body: Box::new(Cursor::new(text.into_bytes())) },
            )))?;
        }
        Ok(())
    }

    fn required(&mut self, _: &Repository) -> Result<Option<Vec<String>>> {
        Ok(Some((0..self.jobs / 4).map(|job| self.job(1_000, job * 2, 1).name).collect()))
    }

    fn assessments(&mut self, _: &Repository) -> Result<Vec<Assessment>> {
        let one = |gate: &str, state: &str, summary: &str| Assessment {
            gate: gate.to_owned(),
            at: times::moment(FIRST + self.nights * times::DAY),
            commit: "abc".to_owned(),
            state: state.to_owned(),
            summary: summary.to_owned(),
        };
        Ok(vec![one("licences", "passed", "0 faults"), one("advisories", "not run", "there is no network")])
    }
}

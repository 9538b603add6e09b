//! The board from source to page, on a project that is made up: what was planted in it is found, and nothing else.

mod made_up;

use std::collections::BTreeSet;
use std::io::BufRead;
use std::path::{Path, PathBuf};

use coracle_ci::alert::{self, Alert};
use coracle_ci::collect::{Assessment, Collected, Files, Source, TakeReport, collect};
use coracle_ci::error::{Error, Result};
use coracle_ci::github::{Job, Run};
use coracle_ci::outcome::Outcome;
use coracle_ci::settings::{Repository, Settings};
use coracle_ci::store::Store;
use coracle_ci::views::{self, Filter};
use coracle_ci::{evidence, export, times};
use made_up::{FIRST, MadeUp, PROJECT, point};

const SMALL: MadeUp = MadeUp { jobs: 12, nights: 60, tests: 120, failures: 60 };

fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("ci.db")).unwrap();
    (folder, store)
}

fn settings(text: &str) -> Settings {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ci.toml");
    std::fs::write(&path, text).unwrap();
    Settings::read(Some(&path)).unwrap()
}

fn gather(store: &mut Store, source: &mut dyn Source, settings: &Settings) -> Collected {
    let mut collected = Collected::default();
    collect(store, source, settings, &Repository::named(PROJECT), 0, &mut collected).unwrap();
    evidence::derive(store, settings, FIRST + 60 * times::DAY).unwrap();
    collected
}

fn nightly(store: &Store, number: i64) -> views::Job {
    let jobs = views::overview(store, &Filter::default()).unwrap().jobs;
    let end = format!(", {number})");
    jobs.into_iter().find(|job| job.workflow == "Nightly" && job.name.ends_with(&end)).unwrap()
}

#[test]
fn what_was_planted_is_found() {
    let (_folder, mut store) = store();
    let settings = Settings::read(None).unwrap();
    let collected = gather(&mut store, &mut SMALL.clone(), &settings);
    assert!(collected.problems.is_empty(), "{:?}", collected.problems);

    // Broken for good in the last tenth of the nights.
    let broken = nightly(&store, 2);
    let first_bad = (1_000..1_060).rev().take_while(|run| !SMALL.end(*run, 2, 1)).last().unwrap();
    assert_eq!(broken.state, "failed");
    assert_eq!(broken.since, Some(FIRST + (first_bad - 1_000) * times::DAY));
    assert_eq!(broken.first_bad, SMALL.night(first_bad - 1_000).head_sha);
    assert_eq!(broken.last_good, SMALL.night(first_bad - 1_001).head_sha);
    assert_eq!((broken.required, broken.advice.as_str()), (true, "demote"));
    let commit = views::job(&store, broken.id).unwrap().first_bad.unwrap();
    assert_eq!(commit, (format!("Change number {}", first_bad - 1_000), "Ann Author".to_owned()));

    // Slower by half from the middle on.
    let slower = nightly(&store, 3);
    let since = times::parse(&format!("{}T00:00:00Z", slower.trend_since.clone().unwrap())).unwrap();
    assert!(
        (1.3..1.6).contains(&slower.trend.unwrap())
            && (since - FIRST).abs_diff(31 * times::DAY) <= 3 * times::DAY as u64
    );
    let others = views::overview(&store, &Filter { status: "slower".to_owned(), ..Filter::default() }).unwrap().jobs;
    assert!(others.iter().all(|job| job.name.ends_with(", 3)")), "{others:?}");

    // Flaky where a change's job failed for its tests and passed on the same commit.
    for number in 0..SMALL.jobs {
        let failed = |run: i64| SMALL.job(run, number, 1).steps[2].conclusion.as_deref() == Some("failure");
        let planted = (500_000..500_060).filter(|run| failed(*run) && SMALL.end(*run, number, 2)).count() as u64;
        let end = format!(", {number})");
        let jobs =
            views::overview(&store, &Filter { status: "on changes".to_owned(), ..Filter::default() }).unwrap().jobs;
        let job = jobs.into_iter().find(|job| job.name.ends_with(&end)).unwrap();
        assert_eq!(job.flaky.count, planted, "{}", job.name);
        assert_eq!(nightly(&store, number).flaky.count, 0);
    }
    let flakes = views::flakes(&store, &Filter::default()).unwrap();
    assert!(
        !flakes.tests.is_empty()
            && flakes.tests.iter().all(|flake| flake.commits.count > 0 && !flake.evidence.is_empty())
    );

    // A series is larger by a tenth from its middle on.
    let points: Vec<_> = (0..60).map(|night| point(night, 60, 40.0)).collect();
    store.store_points(PROJECT, &points, None).unwrap();
    let changes = views::series(&store, 1, &Filter::default()).unwrap().changes;
    assert_eq!(changes.iter().map(|change| change.at).collect::<Vec<_>>(), [points[30].at]);

    // Three causes of tests, and one of set-ups.
    let kinds: BTreeSet<String> = views::failures(&store, &Filter::default())
        .unwrap()
        .clusters
        .into_iter()
        .map(|cluster| cluster.pattern)
        .collect();
    let expected = [
        "timeout after # s (pod #)",
        "connection refused by #:# (pod #)",
        "expected #, found # (pod #)",
        "Deploy: no answer from # in # s",
    ];
    for cause in expected {
        assert!(kinds.contains(cause), "{cause}: {kinds:?}");
    }
    assert!(kinds.len() <= 8, "{kinds:?}");
}

#[test]
fn costs_are_those_of_the_jobs_and_reruns_are_told_apart() {
    let (_folder, mut store) = store();
    let settings = settings("[minute_costs]\n'arm64' = 0.5");
    gather(&mut store, &mut SMALL.clone(), &settings);
    let cost =
        views::cost(&store, &Filter { days: "365".to_owned(), ..Filter::default() }, &settings.minute_costs).unwrap();
    let seconds = |job: &Job| {
        times::between(times::parse(job.started_at.as_ref().unwrap()), times::parse(job.completed_at.as_ref().unwrap()))
            .unwrap()
    };
    let (mut all, mut again) = (0, 0);
    for run in (1_000..1_060).chain(500_000..500_060) {
        for number in 0..SMALL.jobs {
            all += seconds(&SMALL.job(run, number, 1));
            if run >= 500_000 && !SMALL.end(run, number, 1) {
                all += seconds(&SMALL.job(run, number, 2));
                again += seconds(&SMALL.job(run, number, 2));
            }
        }
    }
    assert!(cost.minutes.abs_diff(all / 60) <= 3, "{} {}", cost.minutes, all / 60);
    assert!((cost.rerun_percent - 100.0 * again as f64 / all as f64).abs() < 0.1);
    let arm = cost.labels.iter().find(|label| label.label == "arm64").unwrap();
    assert!((arm.cost.unwrap() - 0.5 * arm.minutes as f64).abs() < 1.0);
    assert!(cost.pulls.iter().all(|pull| pull.repository == PROJECT && pull.minutes > 0) && !cost.pulls.is_empty());
}

/// A source that fails at a run's reports, as one whose connection breaks.
struct Breaks {
    made: MadeUp,
    at: i64,
}

impl Source for Breaks {
    fn runs(&mut self, repository: &Repository, page: u32, since: i64) -> Result<Option<Vec<Run>>> {
        self.made.runs(repository, page, since)
    }
    fn jobs(&mut self, repository: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
        self.made.jobs(repository, run)
    }
    fn log(&mut self, repository: &Repository, job: i64) -> Result<Option<Box<dyn BufRead>>> {
        self.made.log(repository, job)
    }
    fn reports(&mut self, repository: &Repository, run: i64, jobs: &[Job], take: &mut TakeReport<'_>) -> Result<()> {
        if run == self.at {
            return Err(Error::Server { what: format!("run {run}"), reason: "status 502".to_owned() });
        }
        self.made.reports(repository, run, jobs, take)
    }
    fn required(&mut self, repository: &Repository) -> Result<Option<Vec<String>>> {
        self.made.required(repository)
    }
    fn assessments(&mut self, repository: &Repository) -> Result<Vec<Assessment>> {
        self.made.assessments(repository)
    }
}

fn counts(store: &Store) -> Vec<i64> {
    let tables = ["run", "execution", "step", "result", "failure", "test", "signature"];
    let count = |table: &&str| {
        store
            .read(|connection| connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)))
            .unwrap()
    };
    tables.iter().map(count).collect()
}

#[test]
fn what_broke_off_is_read_the_next_time_and_nothing_is_counted_twice() {
    let (_one, mut whole) = store();
    let settings = Settings::read(None).unwrap();
    gather(&mut whole, &mut SMALL.clone(), &settings);
    let (_two, mut store) = store();
    let first = gather(&mut store, &mut Breaks { made: SMALL, at: 1_030 }, &settings);
    assert_eq!(first.problems, ["run 1030: status 502"]);
    assert!(counts(&store)[3] < counts(&whole)[3]);
    let second = gather(&mut store, &mut SMALL.clone(), &settings);
    assert_eq!((second.runs, second.problems.len()), (1, 0));
    assert_eq!(counts(&store), counts(&whole));
    let third = gather(&mut store, &mut SMALL.clone(), &settings);
    assert_eq!((third.runs, third.jobs), (0, 0));
    assert_eq!(counts(&store), counts(&whole));
}

/// Three runs of the same two jobs, with what each has left behind.
struct Three;

impl Source for Three {
    fn runs(&mut self, _: &Repository, page: u32, _: i64) -> Result<Option<Vec<Run>>> {
        Ok((page == 1).then(|| (0..3).map(|night| SMALL.night(night)).collect()))
    }
    fn jobs(&mut self, _: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
        let mut jobs: Vec<Job> = (0..2).map(|job| SMALL.job(run, job, 1)).collect();
        for job in &mut jobs {
            job.conclusion = Some("failure".to_owned());
            job.steps[1].conclusion = Some("failure".to_owned());
            job.steps[2].conclusion = Some("skipped".to_owned());
        }
        if run == 1_000 {
            // A rerun of the first one tells the second one again, which then has not begun anew.
            let mut again = jobs.clone();
            for job in &mut again {
                (job.id, job.run_attempt) = (job.id + 1, Some(2));
            }
            again[0].started_at = again[0].completed_at.clone();
            jobs.extend(again);
        }
        Ok(Some(jobs))
    }
    fn reports(&mut self, _: &Repository, run: i64, jobs: &[Job], take: &mut TakeReport<'_>) -> Result<()> {
        let report = |text: &str, name: &str| coracle_ci::collect::Report {
            what: format!("{name} of run {run}"),
            name: name.to_owned(),
            body: Box::new(std::io::Cursor::new(text.to_owned().into_bytes())),
        };
        take(Ok((jobs[0].id, report("{\"a\": 1}\n{\"b\": 2}", "log.json"))))?;
        take(Ok((jobs[0].id, report("not ok 1 - one\n# why\n", "report.tap"))))
    }
}

#[test]
fn a_report_that_is_none_is_told_once_and_keeps_nothing_else_away() {
    let (_folder, mut store) = store();
    let settings = Settings::read(None).unwrap();
    let first = gather(&mut store, &mut Three, &settings);
    assert!(
        first.problems.len() == 3 && first.problems.iter().all(|problem| problem.contains("log.json")),
        "{:?}",
        first.problems
    );
    let second = gather(&mut store, &mut Three, &settings);
    assert_eq!((second.runs, second.problems.len()), (0, 0));
    // A step before the tests failed, it is told; but a test did, too.
    let ended: Vec<_> =
        views::job(&store, 1).unwrap().executions.iter().map(|one| (one.attempt, one.outcome)).collect();
    assert_eq!(ended, [(1, Outcome::Failed), (1, Outcome::Failed), (2, Outcome::SetupFailed), (1, Outcome::Failed)]);
    assert_eq!(views::failures(&store, &Filter::default()).unwrap().clusters[0].failures, 3);
    // The second job of the first run was told twice and ran once.
    let cost =
        views::cost(&store, &Filter { days: "365".to_owned(), ..Filter::default() }, &settings.minute_costs).unwrap();
    assert_eq!(cost.labels.iter().map(|label| label.executions).sum::<i64>(), 7);
    let told: i64 = store
        .read(|connection| connection.query_row("SELECT count(*) FROM execution WHERE retold", [], |row| row.get(0)))
        .unwrap();
    assert_eq!(told, 1);
}

#[test]
fn figures_of_a_change_are_not_the_project_s() {
    struct Figures(&'static str);
    impl Source for Figures {
        fn runs(&mut self, _: &Repository, page: u32, _: i64) -> Result<Option<Vec<Run>>> {
            // A fork's branch may be called as the project's.
            let run = Run { event: Some(self.0.to_owned()), head_branch: Some("main".to_owned()), ..SMALL.night(0) };
            Ok((page == 1).then(|| vec![run]))
        }
        fn jobs(&mut self, _: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
            Ok(Some(vec![SMALL.job(run, 0, 1)]))
        }
        fn reports(&mut self, _: &Repository, _: i64, jobs: &[Job], take: &mut TakeReport<'_>) -> Result<()> {
            let text = "{\"at\": \"2026-01-01T00:00:00Z\", \"commit\": \"a\", \"series\": [{\"suite\": \"s\", \"name\": \"n\", \"unit\": \"ms\", \"raw\": [1]}]}";
            let body = Box::new(std::io::Cursor::new(text.as_bytes()));
            take(Ok((
                jobs[0].id,
                coracle_ci::collect::Report { what: "x".to_owned(), name: "x.json".to_owned(), body },
            )))
        }
    }
    for (event, expected) in [("pull_request", 0), ("pull_request_target", 0), ("push", 1)] {
        let (_folder, mut store) = store();
        gather(&mut store, &mut Figures(event), &Settings::read(None).unwrap());
        assert_eq!(views::performance(&store, &Filter::default()).unwrap().series.len(), expected, "{event}");
    }
}

#[test]
fn a_number_of_another_run_s_job_takes_nothing_s_place() {
    struct Clash(i64);
    impl Source for Clash {
        fn runs(&mut self, _: &Repository, page: u32, _: i64) -> Result<Option<Vec<Run>>> {
            Ok((page == 1).then(|| vec![SMALL.night(self.0)]))
        }
        fn jobs(&mut self, _: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
            Ok(Some(vec![Job { id: 1, ..SMALL.job(run, 0, 1) }]))
        }
    }
    let (_folder, mut store) = store();
    let settings = Settings::read(None).unwrap();
    assert!(gather(&mut store, &mut Clash(0), &settings).problems.is_empty());
    let problems = gather(&mut store, &mut Clash(1), &settings).problems;
    assert!(problems.len() == 1 && problems[0].contains("must be unique"), "{problems:?}");
    assert_eq!(views::job(&store, 1).unwrap().executions[0].at, FIRST);
}

#[test]
fn a_chain_of_names_is_taken_back_link_by_link() {
    struct Chain;
    impl Source for Chain {
        fn runs(&mut self, _: &Repository, page: u32, _: i64) -> Result<Option<Vec<Run>>> {
            Ok((page == 1).then(|| (0..3).map(|night| SMALL.night(night)).collect()))
        }
        fn jobs(&mut self, _: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
            Ok(Some(vec![Job { name: format!("name {}", run - 1_000), ..SMALL.job(run, 0, 1) }]))
        }
    }
    let (_folder, mut store) = store();
    let settings = Settings::read(None).unwrap();
    gather(&mut store, &mut Chain, &settings);
    let counts = |store: &mut Store| {
        evidence::derive(store, &settings, FIRST).unwrap();
        (1..=3).map(|job| views::job(store, job).map_or(0, |page| page.executions.len())).collect::<Vec<_>>()
    };
    assert_eq!(counts(&mut store), [1, 1, 1]);
    evidence::decide(&mut store, 1, 2, true).unwrap();
    evidence::decide(&mut store, 2, 3, true).unwrap();
    assert_eq!(counts(&mut store), [0, 0, 3]);
    evidence::decide(&mut store, 1, 2, false).unwrap();
    assert_eq!(counts(&mut store), [1, 0, 2]);
    evidence::decide(&mut store, 1, 2, true).unwrap();
    evidence::decide(&mut store, 2, 3, false).unwrap();
    assert_eq!(counts(&mut store), [0, 2, 1]);
    assert!(evidence::decide(&mut store, 2, 1, true).is_err());
}

#[test]
fn a_renamed_job_keeps_its_history_where_a_person_says_so() {
    struct Renamed(MadeUp);
    impl Source for Renamed {
        fn runs(&mut self, repository: &Repository, page: u32, since: i64) -> Result<Option<Vec<Run>>> {
            self.0.runs(repository, page, since)
        }
        fn jobs(&mut self, repository: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
            let mut jobs = self.0.jobs(repository, run)?.unwrap();
            if (1_030..500_000).contains(&run) {
                jobs[1].name = "run-all-tests (built-in, 1)".to_owned();
            }
            Ok(Some(jobs))
        }
    }
    let (_folder, mut store) = store();
    let settings = Settings::read(None).unwrap();
    gather(&mut store, &mut Renamed(SMALL), &settings);
    let found = evidence::renames(&store).unwrap();
    let names: Vec<_> =
        found.iter().map(|one| (one.old_name.as_str(), one.new_name.as_str(), one.state.as_str())).collect();
    assert_eq!(names, [("run-tests (built-in, 1)", "run-all-tests (built-in, 1)", "proposed")]);
    let (old, new) = (found[0].old, found[0].new);
    let attempts = |store: &Store| views::job(store, new).unwrap().executions.len();
    assert_eq!(attempts(&store), 30);
    evidence::decide(&mut store, old, new, true).unwrap();
    evidence::derive(&mut store, &settings, FIRST).unwrap();
    assert_eq!(attempts(&store), 60);
    assert_eq!(views::job(&store, new).unwrap().names, ["run-tests (built-in, 1)"]);
    assert!(matches!(views::job(&store, old), Err(Error::Missing(_))));
    // It would be a circle.
    assert!(evidence::decide(&mut store, new, old, true).is_err());
    evidence::decide(&mut store, old, new, false).unwrap();
    evidence::derive(&mut store, &settings, FIRST).unwrap();
    assert_eq!(attempts(&store), 30);
}

fn lines(path: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_red_job_is_told_once_and_its_recovery_once() {
    let (folder, mut store) = store();
    let sink = folder.path().join("alerts");
    let settings = settings(&format!(
        "[[owner]]\njobs = 'tdx'\nname = 'Ann'\n[alerts]\nafter = 3\n[[alerts.sink]]\nfile = {sink:?}"
    ));
    gather(&mut store, &mut SMALL.clone(), &settings);
    let now = FIRST + 60 * times::DAY;
    let told = alert::alert(&mut store, &settings, now).unwrap();
    assert!(matches!(&told[0], Alert::Opened { owner, failures, .. } if owner == "Ann" && *failures >= 6), "{told:?}");
    assert!(matches!(&told[1], Alert::Digest { failed, .. } if !failed.is_empty()), "{told:?}");
    assert_eq!(told.len(), 2);
    assert!(alert::alert(&mut store, &settings, now + 60).unwrap().is_empty());
    // One more night, and that job passes in it.
    let mut longer = MadeUp { nights: 70, ..SMALL };
    longer.failures = 0;
    gather(&mut store, &mut Healed(longer), &settings);
    let told = alert::alert(&mut store, &settings, now + 120).unwrap();
    assert!(matches!(&told[..], [Alert::Recovered { owner, .. }] if owner == "Ann"), "{told:?}");
    assert!(alert::alert(&mut store, &settings, now + 180).unwrap().is_empty());
    let kinds: Vec<String> = lines(&sink).iter().map(|line| line["kind"].as_str().unwrap().to_owned()).collect();
    assert_eq!(kinds, ["opened", "digest", "recovered"]);
}

/// All jobs of its nights pass.
struct Healed(MadeUp);

impl Source for Healed {
    fn runs(&mut self, repository: &Repository, page: u32, since: i64) -> Result<Option<Vec<Run>>> {
        self.0.runs(repository, page, since)
    }
    fn jobs(&mut self, _: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
        let healed = |number| {
            let mut job = self.0.job(run, number, 1);
            job.conclusion = Some("success".to_owned());
            job
        };
        Ok(Some((0..self.0.jobs).map(healed).collect()))
    }
}

#[test]
fn a_muted_job_is_not_told_of() {
    let (folder, mut store) = store();
    let sink = folder.path().join("alerts");
    let settings = settings(&format!("[alerts]\nafter = 3\n[[alerts.sink]]\nfile = {sink:?}"));
    gather(&mut store, &mut SMALL.clone(), &settings);
    let now = FIRST + 60 * times::DAY;
    let red = nightly(&store, 2).id;
    alert::mute(&mut store, red, now + 1_000, "known").unwrap();
    assert_eq!(views::job(&store, red).unwrap().muted.unwrap().1, "known");
    let told = alert::alert(&mut store, &settings, now).unwrap();
    assert!(matches!(&told[..], [Alert::Digest { .. }]), "{told:?}");
    let told = alert::alert(&mut store, &settings, now + 2_000).unwrap();
    assert!(matches!(&told[..], [Alert::Opened { job, .. }] if *job == red), "{told:?}");
    assert!(matches!(alert::mute(&mut store, 99_999, now, ""), Err(Error::Missing(_))));
}

#[test]
fn a_sink_that_is_dead_keeps_no_other_from_hearing_and_hears_all_when_it_is_back() {
    let (folder, mut store) = store();
    let (dead, good) = (folder.path().join("none/alerts"), folder.path().join("alerts"));
    let settings =
        settings(&format!("[alerts]\nafter = 3\n[[alerts.sink]]\nfile = {dead:?}\n[[alerts.sink]]\nfile = {good:?}"));
    gather(&mut store, &mut SMALL.clone(), &settings);
    let now = FIRST + 60 * times::DAY;
    let kinds =
        |path: &Path| lines(path).iter().map(|line| line["kind"].as_str().unwrap().to_owned()).collect::<Vec<_>>();
    for round in 0..3 {
        assert!(matches!(alert::alert(&mut store, &settings, now + round), Err(Error::File { .. })));
        assert_eq!(kinds(&good), ["opened", "digest"]);
    }
    std::fs::create_dir(dead.parent().unwrap()).unwrap();
    assert!(alert::alert(&mut store, &settings, now + 9).unwrap().is_empty());
    assert_eq!(
        (kinds(&dead), kinds(&good)),
        (vec!["opened".to_owned(), "digest".to_owned()], vec!["opened".to_owned(), "digest".to_owned()])
    );
}

#[test]
fn a_webhook_hears_json_and_its_address_is_told_to_nobody() {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let heard = std::thread::spawn(move || {
        let mut bodies = Vec::new();
        for status in ["500 No", "200 OK", "200 OK"] {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut request, mut part) = (Vec::new(), [0; 4096]);
            let body = loop {
                let read = stream.read(&mut part).unwrap();
                request.extend_from_slice(&part[..read]);
                let text = String::from_utf8_lossy(&request).into_owned();
                let length = text
                    .to_lowercase()
                    .split("content-length: ")
                    .nth(1)
                    .and_then(|rest| rest.lines().next()?.parse::<usize>().ok());
                if let (Some((_, body)), Some(length)) = (text.split_once("\r\n\r\n"), length)
                    && body.len() >= length
                {
                    break body.to_owned();
                }
            };
            write!(stream, "HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
            bodies.push(serde_json::from_str::<serde_json::Value>(&body).unwrap());
        }
        bodies
    });
    let (_folder, mut store) = store();
    let settings =
        settings(&format!("[alerts]\nafter = 3\n[[alerts.sink]]\nwebhook = 'http://{address}/hooks/secret-part'"));
    gather(&mut store, &mut SMALL.clone(), &settings);
    let now = FIRST + 60 * times::DAY;
    let error = alert::alert(&mut store, &settings, now).unwrap_err().to_string();
    assert!(error.contains("status 500") && !error.contains("secret-part"), "{error}");
    assert!(alert::alert(&mut store, &settings, now).unwrap().is_empty());
    let kinds: Vec<_> =
        heard.join().unwrap().into_iter().map(|body| body["kind"].as_str().unwrap().to_owned()).collect();
    assert_eq!(kinds, ["opened", "opened", "digest"]);
    // Nobody listens any more.
    let error = alert::alert(&mut store, &settings, now + 8 * times::DAY).unwrap_err().to_string();
    assert!(!error.contains("secret-part"), "{error}");
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { walk(&path, found) } else { found.push(path) }
    }
}

#[test]
fn exported_pages_lead_to_one_another_and_no_name_becomes_markup() {
    let (folder, mut store) = store();
    let settings = Settings::read(None).unwrap();
    gather(&mut store, &mut SMALL.clone(), &settings);
    let site = folder.path().join("site");
    let written = export::export(&store, &settings, &site).unwrap();
    let mut files = Vec::new();
    walk(&site, &mut files);
    let pages: Vec<&PathBuf> = files.iter().filter(|path| path.extension().is_some_and(|end| end == "html")).collect();
    assert_eq!(pages.len() as u64, written.pages);
    let link = regex::Regex::new("(?:href|src)=\"([^\"#?]+)").unwrap();
    for page in pages {
        let text = std::fs::read_to_string(page).unwrap();
        assert!(!text.contains("<b>thing") && !text.contains("<i>suite"), "{}", page.display());
        for found in link
            .captures_iter(&text)
            .map(|found| found[1].to_owned())
            .filter(|link| !link.starts_with("https://github.com/"))
        {
            assert!(page.parent().unwrap().join(&found).exists(), "{} leads to {found}", page.display());
        }
    }
    let changes = std::fs::read_to_string(site.join("pulls.html")).unwrap();
    assert!(changes.contains("Makes &#60;b&#62;thing&#60;/b&#62; 100 better"));
    assert!(files.iter().all(|path| path.extension().is_none_or(|end| end != "new")));
}

#[test]
fn files_are_a_source_as_good_as_the_api() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    let runs: Vec<Run> = (0..3).map(|night| SMALL.night(night)).collect();
    put("runs.json", &serde_json::json!({ "total_count": 3, "workflow_runs": runs }).to_string());
    let mut failed = None;
    for run in 1_000..1_003 {
        let jobs: Vec<Job> = (0..SMALL.jobs).map(|job| SMALL.job(run, job, 1)).collect();
        failed =
            failed.or_else(|| jobs.iter().find(|job| job.conclusion.as_deref() == Some("failure")).map(|job| job.id));
        put(&format!("a/jobs-{run}.json"), &serde_json::json!({ "jobs": jobs }).to_string());
    }
    let failed = failed.unwrap();
    put(&format!("logs/{failed}.txt"), "ok 1 good\nnot ok 2 bad\n# said so\n");
    put(&format!("results/{failed}/report.xml"), "<testsuite name='s'><testcase name='one'/></testsuite>");
    put(
        &format!("results/{failed}/bench.json"),
        &serde_json::json!({ "at": "2026-01-01T00:00:00Z", "commit": "abc", "series": [{ "suite": "s", "name": "n", "unit": "ms", "raw": [1, 2] }] }).to_string(),
    );
    put("required.json", &serde_json::json!({ PROJECT: ["run-tests (qemu, 0)"] }).to_string());
    put("broken.json", "{\"workflow_runs\": [");
    put("other.json", "{\"something\": 1}");
    std::os::unix::fs::symlink("/", folder.path().join("everything")).unwrap();

    let mut files = Files::open(folder.path()).unwrap();
    assert_eq!(files.repositories().unwrap().into_iter().collect::<Vec<_>>(), [PROJECT]);
    assert!(files.problems.len() == 1 && files.problems[0].contains("broken.json"), "{:?}", files.problems);
    let (_other, mut store) = store();
    let collected = gather(&mut store, &mut files, &Settings::read(None).unwrap());
    assert_eq!((collected.runs, collected.jobs, collected.logs, collected.results, collected.points), (3, 36, 1, 3, 1));
    assert!(nightly(&store, 0).required && !nightly(&store, 1).required);
    let page = views::overview(&store, &Filter::default())
        .unwrap()
        .jobs
        .into_iter()
        .map(|job| views::job(&store, job.id).unwrap());
    let texts: Vec<String> =
        page.flat_map(|page| page.executions).flat_map(|one| one.failed).map(|failed| failed.text).collect();
    assert_eq!(texts, ["said so"]);
    assert_eq!(views::performance(&store, &Filter::default()).unwrap().series[0].name, "n");
    assert!(matches!(Files::open(Path::new("/nowhere/at/all")), Err(Error::File { .. })));
}

#[test]
fn a_filter_that_there_is_not_is_refused_with_the_choices() {
    let (_folder, store) = store();
    for filter in [
        Filter { status: "x".to_owned(), ..Filter::default() },
        Filter { days: "1000".to_owned(), ..Filter::default() },
        Filter { sort: "'; DROP TABLE job".to_owned(), ..Filter::default() },
    ] {
        let error = views::overview(&store, &filter).unwrap_err().to_string();
        assert!(error.contains("one of"), "{error}");
    }
    // Text that is searched for is text.
    let filter = Filter { q: "%' OR 1=1 --".to_owned(), ..Filter::default() };
    assert!(views::flakes(&store, &filter).unwrap().tests.is_empty());
    assert_eq!(Outcome::from_number(1), Outcome::Failed);
}

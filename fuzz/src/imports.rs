//! What a dashboard collects: logs, reports and figures of jobs that anybody may have written, and names that come onto its pages.

use std::collections::BTreeSet;
use std::path::Path;

use coracle_ci::collect::{Collected, Source, collect};
use coracle_ci::github::{Job, Pull, Run, Step};
use coracle_ci::pages::{self, Form, Links, Page};
use coracle_ci::settings::{Repository, Settings};
use coracle_ci::store::{Store, TestResult};
use coracle_ci::views::Filter;
use coracle_ci::{evidence, results};

/// Runs one input: the first byte says which reader takes the rest.
///
/// # Panics
/// Where a reader gives more than was there, names a test twice, or a page has as markup what was a name.
pub fn one(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else { return };
    match kind % 4 {
        0 => {
            let found = results::log(rest, "log").expect("memory can be read");
            assert_eq!(found.lines, rest.split_inclusive(|byte| *byte == b'\n').count() as u64);
            hold(&found.results, rest);
        }
        1 => {
            if let Ok(found) = results::junit(rest, "report") {
                hold(&found, rest);
            }
        }
        2 => {
            if let Ok(points) = serde_json::from_slice(rest).map(|document| results::points(document, "figures")) {
                for point in points.into_iter().flatten() {
                    assert!(point.value.is_finite() && !point.raw.is_empty() && point.at >= 0);
                }
            }
        }
        _ => pages_of(rest),
    }
}

/// Each result has a name of its own, and none comes from nothing.
fn hold(found: &[TestResult], from: &[u8]) {
    let names: BTreeSet<&str> = found.iter().map(|result| result.name.as_str()).collect();
    assert_eq!(names.len(), found.len());
    assert!(found.len() <= from.len() && names.iter().all(|name| !name.is_empty()));
    let said: usize = found.iter().map(|result| result.text.len()).sum();
    // A byte that is no text becomes a character of three.
    assert!(said <= 4 * from.len() + found.len() * 64, "{said} of {}", from.len());
}

/// A project whose names are the input's.
struct Named<'a>(&'a [u8]);

impl Named<'_> {
    /// What would be markup, or leave an attribute, if it were not escaped, with a part of the input in it.
    fn name(&self, number: usize) -> String {
        let size = self.0.len().div_ceil(8).max(1);
        let part = self.0.chunks(size).nth(number % 8).unwrap_or_default();
        format!("{}\"'><x onx=1>", String::from_utf8_lossy(part))
    }

    fn run(&self, id: i64, event: &str) -> Run {
        Run {
            id,
            name: Some(self.name(0)),
            path: Some(self.name(1)),
            event: Some(event.to_owned()),
            head_branch: Some("main".to_owned()),
            head_sha: Some(self.name(2)),
            run_attempt: Some(1),
            status: Some("completed".to_owned()),
            created_at: Some(format!("2026-01-0{id}T00:00:00Z")),
            display_title: Some(self.name(3)),
            html_url: Some(self.name(4)),
            pull_requests: vec![Pull { number: 3, base: None }],
            ..Run::default()
        }
    }
}

impl Source for Named<'_> {
    fn runs(&mut self, _: &Repository, page: u32, _: i64) -> coracle_ci::error::Result<Option<Vec<Run>>> {
        Ok((page == 1).then(|| vec![self.run(1, "push"), self.run(2, "push"), self.run(3, "pull_request")]))
    }

    fn jobs(&mut self, _: &Repository, run: i64) -> coracle_ci::error::Result<Option<Vec<Job>>> {
        let job = |id: i64, conclusion: &str| Job {
            id: 10 * run + id,
            run_id: run,
            run_attempt: Some(id),
            name: self.name(5),
            conclusion: Some(conclusion.to_owned()),
            started_at: Some("2026-01-01T00:00:00Z".to_owned()),
            completed_at: Some("2026-01-01T00:01:00Z".to_owned()),
            labels: vec![self.name(6)],
            runner_name: Some(self.name(7)),
            html_url: Some(self.name(4)),
            steps: vec![Step {
                number: 1,
                name: format!("Run {}", self.name(0)),
                conclusion: Some(conclusion.to_owned()),
                ..Step::default()
            }],
            ..Job::default()
        };
        Ok(Some(vec![job(1, "failure"), job(2, "success")]))
    }

    fn log(&mut self, _: &Repository, _: i64) -> coracle_ci::error::Result<Option<Box<dyn std::io::BufRead>>> {
        let (name, text) = (self.name(1).replace('\n', " "), self.name(2));
        Ok(Some(Box::new(std::io::Cursor::new(format!("not ok 1 - {name}\n# {text}\n##[error]{text}\n").into_bytes()))))
    }
}

fn pages_of(data: &[u8]) {
    let settings = Settings::read(None).expect("none are needed");
    let mut store = Store::open(Path::new(":memory:")).expect("a store in memory");
    let repository = Repository::named("a/b");
    let mut collected = Collected::default();
    collect(&mut store, &mut Named(data), &settings, &repository, 0, &mut collected).expect("memory is not full");
    evidence::derive(&mut store, &settings, 1_767_500_000).expect("memory is not full");
    let links = Links::Served("/".to_owned());
    let pull = Page::Pull("a".to_owned(), "b".to_owned(), 3);
    let all = [
        Page::Overview,
        Page::Job(1),
        Page::Test(1),
        Page::Flakes,
        Page::Failures,
        Page::Failure(1),
        Page::Pulls,
        pull,
        Page::Cost,
        Page::Security,
    ];
    for page in all {
        // A name of control characters alone may be of no test, and no failure.
        let Ok(text) = pages::write(&store, &settings, &page, &Filter::default(), Form::Html(&links)) else { continue };
        assert!(!text.contains("<x") && !text.contains("\"'>"), "{page:?}");
    }
}

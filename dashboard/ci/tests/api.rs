//! GitHub's API as a source, by a server that answers what is said here: also wrongly, late, or not to the end.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use coracle_ci::collect::{Api, ApiOptions, Collected, Source, collect};
use coracle_ci::error::Error;
use coracle_ci::evidence;
use coracle_ci::settings::{Repository, Settings};
use coracle_ci::store::Store;
use coracle_ci::views::{self, Filter};
use serde_json::json;

type Body = Box<dyn FnMut(&mut dyn std::io::Write) -> std::io::Result<()> + Send>;

/// One answer: what the path must contain, and what comes back.
struct Answer {
    path: &'static str,
    status: &'static str,
    headers: String,
    body: Body,
}

fn answer(path: &'static str, status: &'static str, body: impl Into<Vec<u8>>) -> Answer {
    let body = body.into();
    let headers = format!("content-length: {}\r\n", body.len());
    Answer { path, status, headers, body: Box::new(move |to| to.write_all(&body)) }
}

fn ok(path: &'static str, body: serde_json::Value) -> Answer {
    answer(path, "200 OK", body.to_string())
}

/// Says it is longer than it is.
fn cut_off(path: &'static str) -> Answer {
    Answer {
        path,
        status: "200 OK",
        headers: "content-length: 1000\r\n".to_owned(),
        body: Box::new(|to| to.write_all(b"{\"total_count\": 1, \"jo")),
    }
}

/// Serves answers in their order; gives the address, and what was asked for and not foreseen.
fn server(answers: Vec<Answer>) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&seen);
    std::thread::spawn(move || {
        let mut rest: VecDeque<Answer> = answers.into();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut request, mut line) = (String::new(), String::new());
            while reader.read_line(&mut line).is_ok_and(|read| read > 2) {
                request.push_str(&line);
                line.clear();
            }
            let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
            told.lock().unwrap().push(request);
            let Some(mut next) = rest.pop_front() else {
                let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                continue;
            };
            if !path.contains(next.path) {
                let text = format!(
                    "HTTP/1.1 400 {path} instead of {}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                    next.path
                );
                let _ = stream.write_all(text.as_bytes());
                continue;
            }
            let head = format!("HTTP/1.1 {}\r\n{}connection: close\r\n\r\n", next.status, next.headers);
            let _ = stream.write_all(head.as_bytes()).and_then(|()| (next.body)(&mut stream));
        }
    });
    (address, seen)
}

fn api(address: SocketAddr) -> Api {
    Api::new(ApiOptions {
        address: format!("http://{address}"),
        token: Some("secret-token".to_owned()),
        wait: false,
        again_after: Duration::from_millis(1),
    })
    .unwrap()
}

fn project() -> Repository {
    Repository::named("a/b")
}

fn job(id: i64, conclusion: &str) -> serde_json::Value {
    json!({ "id": id, "run_id": 7, "name": format!("job {id}"), "conclusion": conclusion, "run_attempt": 1, "created_at": "2026-01-01T00:00:00Z",
        "started_at": "2026-01-01T00:00:05Z", "completed_at": "2026-01-01T00:10:05Z", "labels": ["x"], "steps": [{ "number": 1, "name": "Run tests", "conclusion": conclusion }] })
}

#[test]
fn an_answer_that_fails_or_breaks_off_is_asked_for_again() {
    let (address, _) = server(vec![
        answer("/jobs", "502 Bad Gateway", ""),
        cut_off("/jobs"),
        answer("/jobs", "200 OK", "{\"total_count\": 1, \"jobs\": [{"),
        ok("/jobs", json!({ "total_count": 1, "jobs": [job(1, "success")] })),
    ]);
    let jobs = api(address).jobs(&project(), 7).unwrap().unwrap();
    assert_eq!((jobs.len(), jobs[0].run_id), (1, 7));
    let (address, seen) = server((0..4).map(|_| answer("/jobs", "502 Bad Gateway", "")).collect());
    let error = api(address).jobs(&project(), 7).unwrap_err();
    assert!(matches!(error, Error::Server { .. }) && error.to_string().contains("502"), "{error}");
    assert_eq!(seen.lock().unwrap().len(), 4);
}

#[test]
fn a_list_that_changes_between_its_pages_is_read_again() {
    let page = |from: i64, to: i64, total: i64| json!({ "total_count": total, "jobs": (from..to).map(|id| job(id, "success")).collect::<Vec<_>>() });
    let (address, _) = server(vec![
        ok("page=1", page(0, 100, 120)),
        // One more has come: the pages are others now.
        ok("page=2", page(99, 120, 121)),
        ok("page=1", page(0, 100, 121)),
        ok("page=2", page(100, 121, 121)),
    ]);
    assert_eq!(api(address).jobs(&project(), 7).unwrap().unwrap().len(), 121);
    let (address, _) = server((0..3).map(|_| ok("page=1", page(0, 3, 5))).collect());
    let error = api(address).jobs(&project(), 7).unwrap_err().to_string();
    assert!(error.contains("fewer than it says"), "{error}");
}

#[test]
fn the_limit_of_requests_ends_the_collection_and_what_was_read_stays() {
    let run = |id: i64| {
        json!({ "id": id, "name": "W", "path": "w.yaml", "event": "push", "head_branch": "main", "head_sha": "abc", "run_attempt": 1,
            "status": "completed", "created_at": "2026-01-01T00:00:00Z", "html_url": "https://github.com/a/b/actions/runs/1" })
    };
    let mut limited = answer("/jobs", "403 Forbidden", "");
    limited.headers.push_str("x-ratelimit-remaining: 0\r\nx-ratelimit-reset: 4102444800\r\n");
    let (address, _) = server(vec![
        ok("/branches/main", json!({ "protection": { "required_status_checks": { "contexts": ["job 1"] } } })),
        ok("/runs?", json!({ "total_count": 2, "workflow_runs": [run(7), run(8)] })),
        ok("/runs/7/jobs", json!({ "total_count": 1, "jobs": [job(1, "success")] })),
        ok("/artifacts", json!({ "artifacts": [] })),
        limited,
    ]);
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(&folder.path().join("ci.db")).unwrap();
    let settings = Settings::read(None).unwrap();
    let mut collected = Collected::default();
    let error = collect(&mut store, &mut api(address), &settings, &project(), 0, &mut collected).unwrap_err();
    assert!(matches!(&error, Error::Limited { until } if until == "2100-01-01T00:00:00Z"), "{error}");
    evidence::derive(&mut store, &settings, 1_800_000_000).unwrap();
    let jobs = views::overview(&store, &Filter::default()).unwrap().jobs;
    assert_eq!((jobs.len(), jobs[0].required, jobs[0].state.as_str()), (1, true, "passed"));
}

#[test]
fn a_list_that_the_api_would_cut_is_asked_for_in_parts() {
    let run = |id: i64| json!({ "id": id, "path": "w.yaml" });
    let (address, seen) = server(vec![
        ok("page=1&", json!({ "total_count": 1_500, "workflow_runs": [run(1)] })),
        ok("page=1&", json!({ "total_count": 800, "workflow_runs": [run(2), run(3)] })),
        ok("page=2&", json!({ "total_count": 800, "workflow_runs": [] })),
        ok("page=1&", json!({ "total_count": 700, "workflow_runs": [run(4)] })),
        ok("page=2&", json!({ "total_count": 700, "workflow_runs": [] })),
    ]);
    let mut api = api(address);
    let mut found = Vec::new();
    for page in 1.. {
        let Some(runs) = api.runs(&project(), page, 1_700_000_000).unwrap() else { break };
        found.extend(runs.into_iter().map(|run| run.id));
    }
    assert_eq!(found, [2, 3, 4]);
    let asked = seen.lock().unwrap();
    assert!(asked[0].contains("created=2023-11-14T22:13:20Z..") && asked.len() == 5, "{asked:?}");
    let end_of = |request: &str| request.split("..").nth(1).unwrap()[..20].to_owned();
    assert!(asked[3].contains("created=2023-11-14T22:13:20Z..") && end_of(&asked[3]) < end_of(&asked[1]));
}

#[test]
fn without_a_token_what_needs_one_is_not_asked_for_and_too_many_requests_is_the_limit() {
    let (address, seen) = server(vec![answer("/jobs", "429 Too Many Requests", "")]);
    let mut api = Api::new(ApiOptions {
        address: format!("http://{address}"),
        token: None,
        wait: false,
        again_after: Duration::from_millis(1),
    })
    .unwrap();
    assert!(api.log(&project(), 1).unwrap().is_none());
    let mut take = |_: coracle_ci::error::Result<(i64, coracle_ci::collect::Report)>| panic!("a report");
    api.reports(&project(), 7, &[], &mut take).unwrap();
    assert!(seen.lock().unwrap().is_empty());
    assert!(matches!(api.jobs(&project(), 7), Err(Error::Limited { .. })));
}

#[test]
fn a_fork_s_pull_request_is_found_by_its_branch() {
    let (address, seen) = server(vec![ok("/pulls?", json!([{ "number": 42 }]))]);
    let run: coracle_ci::github::Run =
        serde_json::from_value(json!({ "id": 1, "event": "pull_request", "head_branch": "fix/it&more",
        "head_repository": { "full_name": "someone/b" }, "pull_requests": null }))
        .unwrap();
    assert_eq!(api(address).pull(&project(), &run).unwrap(), Some(42));
    assert!(seen.lock().unwrap()[0].contains("head=someone%3Afix%2Fit%26more"), "{:?}", seen.lock().unwrap());
}

#[test]
fn a_long_log_is_read_as_it_comes() {
    // 256 MiB, made as they are sent, with one failure in their middle and bytes that are no text.
    const LINES: u64 = 1 << 20;
    let log = Answer {
        path: "/logs",
        status: "200 OK",
        headers: String::new(),
        body: Box::new(|to| {
            let mut to = std::io::BufWriter::new(to);
            let mut line = vec![b'x'; 255];
            line[7] = 0xff;
            line.push(b'\n');
            for number in 0..LINES {
                to.write_all(if number == LINES / 2 { b"not ok 3 lost in it\n" } else { &line })?;
            }
            to.flush()
        }),
    };
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let (address, _) = server(vec![log]);
    let body = api(address).log(&project(), 1).unwrap().unwrap();
    let before = resident();
    let found = coracle_ci::results::log(body, "x").unwrap();
    assert_eq!((found.lines, found.results.len(), found.results[0].name.as_str()), (LINES, 1, "lost in it"));
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 10, "{grown} KiB more");
}

#[test]
fn a_log_that_is_gone_is_none_and_one_that_breaks_off_is_an_error() {
    let mut broken = answer("/logs", "200 OK", "ok 1 a\n");
    broken.headers = "content-length: 100\r\n".to_owned();
    let (address, _) = server(vec![answer("/logs", "410 Gone", ""), broken]);
    let mut api = api(address);
    assert!(api.log(&project(), 1).unwrap().is_none());
    let mut text = String::new();
    assert!(api.log(&project(), 1).unwrap().unwrap().read_to_string(&mut text).is_err());
}

#[test]
fn the_token_goes_to_the_api_alone() {
    let (elsewhere, seen_elsewhere) = server(vec![answer("/blob", "200 OK", "ok 1 a\n")]);
    let mut moved = answer("/logs", "302 Found", "");
    moved.headers.push_str(&format!("location: http://localhost:{}/blob\r\n", elsewhere.port()));
    let (address, seen) = server(vec![moved]);
    let mut text = String::new();
    api(address).log(&project(), 1).unwrap().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "ok 1 a\n");
    assert!(seen.lock().unwrap()[0].contains("authorization: Bearer secret-token"));
    assert!(!seen_elsewhere.lock().unwrap()[0].contains("secret-token"));
}

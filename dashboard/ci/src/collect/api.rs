//! GitHub's API as a source. Answers that fail are asked for again; where its limit is reached the collection ends, or waits if told so.

use std::io::{BufRead, BufReader, Read};
use std::time::Duration;

use regex::Regex;
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;

use super::{Source, TakeReport, zipped};
use crate::error::{Error, Result};
use crate::github::{Job, Jobs, Run, Runs};
use crate::settings::Repository;
use crate::times;

/// How often a request is tried.
const TRIES: u32 = 4;
/// The most bytes of one answer of JSON.
const ANSWER_MAX: usize = 64 << 20;
/// How many things are on a page: as many as the API gives.
const PAGE: usize = 100;
/// The most runs that the API gives of one list: of a longer one the rest is never told.
const LIST_MAX: u64 = 1_000;
/// How often a list that changes while it is read is begun again.
const LIST_TRIES: u32 = 3;

/// How to reach it.
#[derive(Debug, Clone)]
pub struct ApiOptions {
    /// Its address, without a slash at the end.
    pub address: String,
    /// A token; without one there are 60 requests an hour, and no logs.
    pub token: Option<String>,
    /// Whether to wait where its limit is reached.
    pub wait: bool,
    /// How long to wait before the second try; twice as long before each one after it.
    pub again_after: Duration,
}

/// The API.
#[derive(Debug)]
pub struct Api {
    options: ApiOptions,
    client: Client,
    runtime: std::sync::Arc<Runtime>,
    /// Spans of time whose runs are still to be listed, and the page that comes next of the last one.
    spans: Vec<(i64, i64)>,
    page: u32,
}

impl Api {
    /// Sets the client up; asks nothing.
    ///
    /// # Errors
    /// [`Error::Server`], where there is no client to be had (certificates that cannot be read, say).
    pub fn new(options: ApiOptions) -> Result<Self> {
        let fault = |reason: String| Error::Server { what: options.address.clone(), reason };
        // Whoever comes second finds the same one there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .user_agent(concat!("coracle-ci/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(Duration::from_secs(20))
            .read_timeout(Duration::from_secs(60))
            .build()
            .map_err(|error| fault(error.to_string()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| fault(error.to_string()))?.into();
        Ok(Self { options, client, runtime, spans: Vec::new(), page: 1 })
    }

    /// Asks for something, again where that may help. None where it is not there (any more).
    fn get(&self, path: &str) -> Result<Option<Response>> {
        let what = format!("GET {path}");
        let mut wait = self.options.again_after;
        let mut reason = String::new();
        let mut tries = 0;
        while tries < TRIES {
            if tries > 0 {
                self.pause(wait);
                wait *= 2;
            }
            tries += 1;
            let mut request = self.client.get(format!("{}{path}", self.options.address));
            request =
                request.header("accept", "application/vnd.github+json").header("x-github-api-version", "2022-11-28");
            if let Some(token) = &self.options.token {
                request = request.bearer_auth(token);
            }
            match self.runtime.block_on(async { request.send().await }) {
                Err(error) => reason = with_causes(&error),
                Ok(response) => {
                    let status = response.status();
                    if status.is_success() {
                        return Ok(Some(response));
                    }
                    if matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE) {
                        return Ok(None);
                    }
                    if let Some(until) = limited(&response) {
                        if !self.options.wait {
                            return Err(Error::Limited { until: times::moment(until) });
                        }
                        let rest = u64::try_from(until - times::now()).unwrap_or(0).min(3_700);
                        self.pause(Duration::from_secs(rest + 1));
                        // It was not a try: nothing has failed.
                        tries -= 1;
                        continue;
                    }
                    reason = format!("status {status}");
                    if !status.is_server_error() {
                        break;
                    }
                }
            }
        }
        Err(Error::Server { what, reason })
    }

    /// Waits as long as the API says, or before a try: nothing else tells when it answers again.
    fn pause(&self, time: Duration) {
        // Made inside: a timer belongs to the runtime it is made in.
        self.runtime.block_on(async { tokio::time::sleep(time).await });
    }

    /// Asks for JSON; an answer that breaks off is asked for again.
    fn json<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        let what = || format!("GET {path}");
        let mut last = String::new();
        for _ in 0..TRIES {
            let Some(mut response) = self.get(path)? else { return Ok(None) };
            let mut body = Vec::new();
            let read = self.runtime.block_on(async {
                while let Some(chunk) = response.chunk().await? {
                    if body.len() + chunk.len() > ANSWER_MAX {
                        return Ok(false);
                    }
                    body.extend_from_slice(&chunk);
                }
                Ok::<_, reqwest::Error>(true)
            });
            match read {
                Ok(false) => return Err(Error::Malformed { what: what(), reason: "larger than 64 MiB".to_owned() }),
                Err(error) => last = with_causes(&error),
                Ok(true) => match serde_json::from_slice(&body) {
                    Ok(value) => return Ok(Some(value)),
                    Err(error) => last = error.to_string(),
                },
            }
        }
        Err(Error::Malformed { what: what(), reason: last })
    }
}

/// An error with its causes: what reqwest says first is but the address.
fn with_causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// Until when the API gives no more, where that is what an answer says ("Rate limits for the REST API").
fn limited(response: &Response) -> Option<i64> {
    if !matches!(response.status(), StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS) {
        return None;
    }
    let header = |name: &str| response.headers().get(name)?.to_str().ok()?.parse::<i64>().ok();
    if let Some(seconds) = header("retry-after") {
        return Some(times::now() + seconds.clamp(1, 3_600));
    }
    let is_over = header("x-ratelimit-remaining") == Some(0) || response.status() == StatusCode::TOO_MANY_REQUESTS;
    is_over.then(|| header("x-ratelimit-reset").unwrap_or(times::now() + 60))
}

#[derive(Deserialize)]
struct Artifacts {
    artifacts: Vec<Artifact>,
}

#[derive(Deserialize)]
struct Artifact {
    id: i64,
    name: String,
    #[serde(default)]
    expired: bool,
    #[serde(default)]
    size_in_bytes: u64,
    created_at: Option<String>,
}

impl Api {
    fn artifact(
        &self,
        repository: &Repository,
        run: i64,
        artifact: &Artifact,
        job: i64,
        take: &mut TakeReport<'_>,
    ) -> Result<()> {
        let what = format!("artefact {} of run {run}", artifact.name);
        if artifact.size_in_bytes > zipped::ARCHIVE_MAX {
            return Err(Error::Malformed { what, reason: "larger than 64 MiB: it is not read".to_owned() });
        }
        let path = format!("/repos/{}/actions/artifacts/{}/zip", repository.name, artifact.id);
        let Some(response) = self.get(&path)? else { return Ok(()) };
        let body = Body { response, runtime: self.runtime.clone(), rest: Default::default() };
        zipped::reports(body, &what, &mut |report| take(report.map(|report| (job, report))))
    }
}

impl Source for Api {
    fn runs(&mut self, repository: &Repository, page: u32, since: i64) -> Result<Option<Vec<Run>>> {
        if page == 1 {
            (self.spans, self.page) = (vec![(since, times::now() + times::DAY)], 1);
        }
        while let Some((from, to)) = self.spans.last().copied() {
            let (first, last) = (times::moment(from), times::moment(to));
            let own = self.page;
            let path =
                format!("/repos/{}/actions/runs?per_page={PAGE}&page={own}&created={first}..{last}", repository.name);
            let runs =
                self.json::<Runs>(&path)?.ok_or_else(|| Error::Missing(format!("repository {}", repository.name)))?;
            if own == 1 && runs.total_count > LIST_MAX && to - from > 3_600 {
                // Two lists instead, each of which may be told whole.
                let middle = from + (to - from) / 2;
                self.spans.pop();
                self.spans.extend([(from, middle), (middle + 1, to)]);
                continue;
            }
            if runs.workflow_runs.is_empty() {
                self.spans.pop();
                self.page = 1;
                continue;
            }
            self.page += 1;
            return Ok(Some(runs.workflow_runs));
        }
        Ok(None)
    }

    fn jobs(&mut self, repository: &Repository, run: i64) -> Result<Option<Vec<Job>>> {
        let mut reason = "the list of jobs changed each time it was read";
        for _ in 0..LIST_TRIES {
            let mut found = std::collections::BTreeMap::new();
            let mut total = None;
            let is_same = loop {
                let page = found.len() / PAGE + 1;
                let path = format!(
                    "/repos/{}/actions/runs/{run}/jobs?filter=all&per_page={PAGE}&page={page}",
                    repository.name
                );
                let Some(jobs) = self.json::<Jobs>(&path)? else { return Ok(None) };
                if *total.get_or_insert(jobs.total_count) != jobs.total_count {
                    break false;
                }
                let before = found.len();
                found.extend(jobs.jobs.into_iter().map(|job| (job.id, Job { run_id: run, ..job })));
                if found.len() as u64 >= jobs.total_count {
                    break true;
                }
                // A page that brings nothing new, while something is missing: the list has moved between two pages.
                if found.len() == before || !found.len().is_multiple_of(PAGE) {
                    reason = "the list of jobs has fewer than it says each time it was read";
                    break false;
                }
            };
            if is_same {
                return Ok(Some(found.into_values().collect()));
            }
        }
        Err(Error::Malformed { what: format!("run {run}"), reason: reason.to_owned() })
    }

    fn log(&mut self, repository: &Repository, job: i64) -> Result<Option<Box<dyn BufRead>>> {
        // Nobody gets one without a token.
        if self.options.token.is_none() {
            return Ok(None);
        }
        let path = format!("/repos/{}/actions/jobs/{job}/logs", repository.name);
        let Some(response) = self.get(&path)? else { return Ok(None) };
        let body = Body { response, runtime: self.runtime.clone(), rest: Default::default() };
        Ok(Some(Box::new(BufReader::with_capacity(64 << 10, body))))
    }

    fn reports(&mut self, repository: &Repository, run: i64, jobs: &[Job], take: &mut TakeReport<'_>) -> Result<()> {
        if self.options.token.is_none() {
            return Ok(());
        }
        let wanted = Regex::new(&repository.reports)
            .map_err(|error| Error::Malformed { what: "repository.reports".to_owned(), reason: error.to_string() })?;
        for page in 1.. {
            let path = format!("/repos/{}/actions/runs/{run}/artifacts?per_page={PAGE}&page={page}", repository.name);
            let Some(list) = self.json::<Artifacts>(&path)? else { return Ok(()) };
            let is_last = list.artifacts.len() < PAGE;
            for artifact in
                list.artifacts.iter().filter(|artifact| !artifact.expired && wanted.is_match(&artifact.name))
            {
                let made = artifact.created_at.as_deref().and_then(times::parse);
                let Some(job) = zipped::job_of(&artifact.name, made, jobs) else { continue };
                // One that cannot be read keeps none of the others from it.
                if let Err(error) = self.artifact(repository, run, artifact, job, take) {
                    take(Err(error))?;
                }
            }
            if is_last {
                break;
            }
        }
        Ok(())
    }

    fn required(&mut self, repository: &Repository) -> Result<Option<Vec<String>>> {
        #[derive(Deserialize)]
        struct Branch {
            #[serde(default)]
            protection: Protection,
        }
        #[derive(Deserialize, Default)]
        struct Protection {
            #[serde(default)]
            required_status_checks: Checks,
        }
        #[derive(Deserialize, Default)]
        struct Checks {
            #[serde(default)]
            contexts: Vec<String>,
        }
        let branch = self.json::<Branch>(&format!("/repos/{}/branches/{}", repository.name, repository.branch))?;
        Ok(branch.map(|branch| branch.protection.required_status_checks.contexts))
    }

    fn pull(&mut self, repository: &Repository, run: &Run) -> Result<Option<i64>> {
        #[derive(Deserialize)]
        struct Found {
            number: i64,
        }
        let owner = run.head_repository.as_ref().and_then(|head| head.full_name.as_deref()?.split_once('/'));
        let (Some((owner, _)), Some(branch)) = (owner, run.head_branch.as_deref()) else { return Ok(None) };
        // Of several of one branch, one after another, the newest.
        let head = format!("{owner}:{branch}");
        let head: String = head
            .bytes()
            .map(|byte| match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
                other => format!("%{other:02X}"),
            })
            .collect();
        let pulls =
            self.json::<Vec<Found>>(&format!("/repos/{}/pulls?state=all&head={head}&per_page=1", repository.name))?;
        Ok(pulls.and_then(|pulls| pulls.first().map(|pull| pull.number)))
    }
}

/// An answer's body, read as it comes.
struct Body {
    response: Response,
    runtime: std::sync::Arc<Runtime>,
    rest: std::collections::VecDeque<u8>,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.rest.is_empty() {
            match self.runtime.block_on(self.response.chunk()) {
                Ok(Some(chunk)) => self.rest.extend(chunk),
                Ok(None) => return Ok(0),
                Err(error) => return Err(std::io::Error::other(with_causes(&error))),
            }
        }
        self.rest.read(buffer)
    }
}

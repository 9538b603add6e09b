//! Who is told of what: a job that has failed so many times in a row on its branch, once; that it has recovered, once; nothing of one that is muted.
//! And once a week, how it all is.

use std::io::Write as _;
use std::time::Duration;

use rusqlite::{OptionalExtension as _, params};
use serde::Serialize;

use crate::error::{Error, Result, of};
use crate::settings::{Settings, Sink};
use crate::store::Store;
use crate::times::{self, DAY};
use crate::views::{self, Filter};

/// What is told.
#[derive(Debug, Clone, Serialize, PartialEq)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Alert {
    /// A job is red.
    Opened {
        /// Its number.
        job: i64,
        /// Its name.
        name: String,
        /// Owner and name of its repository.
        repository: String,
        /// Whether a change must pass it.
        required: bool,
        /// Who looks after it.
        owner: String,
        /// How to reach them.
        contact: String,
        /// For how many runs.
        failures: i64,
        /// Since when.
        since: Option<String>,
        /// The first bad commit.
        first_bad: Option<String>,
        /// The last good one.
        last_good: Option<String>,
    },
    /// A job that was told of is green again.
    Recovered {
        /// Its number.
        job: i64,
        /// Its name.
        name: String,
        /// Owner and name of its repository.
        repository: String,
        /// Who looks after it.
        owner: String,
        /// When it was told that it is red.
        opened: String,
    },
    /// How it all is, once a week.
    Digest {
        /// Jobs that are red.
        failed: Vec<String>,
        /// Jobs that became slower.
        slower: Vec<String>,
        /// Jobs that should become required, or stop being so, and why.
        advice: Vec<String>,
        /// The tests with most flaky commits.
        flaky: Vec<String>,
        /// Minutes of runners in the week.
        minutes: i64,
    },
}

/// Works out what is new and tells it. What could not be told to a sink is told the next time, to all of them: who reads is to take one twice
/// rather than never.
///
/// # Errors
/// Of the store; [`Error::Server`] and [`Error::File`] of a sink.
pub fn alert(store: &mut Store, settings: &Settings, now: i64) -> Result<Vec<Alert>> {
    let overview = views::overview(store, &Filter::default())?;
    let mut told = Vec::new();
    for job in &overview.jobs {
        let open = open(store, job.id)?;
        let is_red = job.state == "failed"
            && job.streak >= i64::from(settings.alerts.after)
            && (job.required || !settings.alerts.required_only);
        if is_red && open.is_none() && !is_muted(store, job.id, now)? {
            let alert = Alert::Opened {
                job: job.id,
                name: job.name.clone(),
                repository: job.repository.clone(),
                required: job.required,
                owner: job.owner.clone(),
                contact: job.contact.clone(),
                failures: job.streak,
                since: job.since.map(times::moment),
                first_bad: job.first_bad.clone(),
                last_good: job.last_good.clone(),
            };
            tell(settings, &alert)?;
            store.change(|transaction| {
                let insert = "INSERT INTO alert (job, opened, first_bad, told) VALUES (?1, ?2, ?3, ?2)";
                transaction.execute(insert, params![job.id, now, job.since])
            })?;
            told.push(alert);
        } else if let Some((alert_id, opened)) = open
            && job.state == "passed"
        {
            let alert = Alert::Recovered {
                job: job.id,
                name: job.name.clone(),
                repository: job.repository.clone(),
                owner: job.owner.clone(),
                opened: times::moment(opened),
            };
            tell(settings, &alert)?;
            store.change(|transaction| {
                transaction.execute("UPDATE alert SET recovered = ?2 WHERE id = ?1", params![alert_id, now])
            })?;
            told.push(alert);
        }
    }
    if let Some(digest) = digest(store, settings, &overview, now)? {
        told.push(digest);
    }
    Ok(told)
}

fn open(store: &Store, job: i64) -> Result<Option<(i64, i64)>> {
    store.read(|connection| {
        let find = "SELECT id, opened FROM alert WHERE job = ?1 AND recovered IS NULL";
        connection.query_row(find, [job], |row| Ok((row.get(0)?, row.get(1)?))).optional()
    })
}

fn is_muted(store: &Store, job: i64, now: i64) -> Result<bool> {
    store.read(|connection| {
        let find = "SELECT EXISTS (SELECT 1 FROM mute WHERE job = ?1 AND until > ?2)";
        connection.query_row(find, [job, now], |row| row.get(0))
    })
}

/// Says that a job is not to be told of, until then.
///
/// # Errors
/// [`Error::Missing`] where there is no such job.
pub fn mute(store: &mut Store, job: i64, until: i64, reason: &str) -> Result<()> {
    views::job(store, job)?;
    store.change(|transaction| {
        transaction.execute("INSERT OR REPLACE INTO mute VALUES (?1, ?2, ?3)", params![job, until, reason]).map(|_| ())
    })
}

fn digest(store: &mut Store, settings: &Settings, overview: &views::Overview, now: i64) -> Result<Option<Alert>> {
    let last = store.fact("digest")?.as_deref().and_then(times::parse);
    if last.is_some_and(|last| now - last < 7 * DAY) {
        return Ok(None);
    }
    let names = |is: &dyn Fn(&views::Job) -> bool| {
        overview.jobs.iter().filter(|job| is(job)).map(|job| job.name.clone()).collect()
    };
    let week = Filter { days: "7".to_owned(), ..Filter::default() };
    let flakes = views::flakes(store, &Filter::default())?;
    let advice = overview.jobs.iter().filter(|job| !job.advice.is_empty());
    let alert = Alert::Digest {
        failed: names(&|job| job.state == "failed"),
        slower: names(&|job| job.trend.is_some_and(|factor| factor > 1.0)),
        advice: advice.map(|job| format!("{} {}: {}", job.advice, job.name, job.advice_reason)).collect(),
        flaky: flakes
            .tests
            .iter()
            .take(10)
            .map(|flake| format!("{}: {}", flake.test_name, flake.commits.text()))
            .collect(),
        minutes: views::cost(store, &week, &settings.minute_costs)?.minutes,
    };
    tell(settings, &alert)?;
    store.set_fact("digest", &times::moment(now))?;
    Ok(Some(alert))
}

fn tell(settings: &Settings, alert: &Alert) -> Result<()> {
    let text = serde_json::to_string(alert)
        .map_err(|error| Error::Malformed { what: "an alert".to_owned(), reason: error.to_string() })?;
    settings.alerts.sink.iter().try_for_each(|sink| send(sink, &text))
}

fn send(sink: &Sink, text: &str) -> Result<()> {
    if let Some(path) = &sink.file {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(of(path))?;
        return file.write_all(format!("{text}\n").as_bytes()).map_err(of(path));
    }
    let Some(address) = &sink.webhook else { return Ok(()) };
    // The address is a secret with many services: errors name the host alone.
    let host = address.split('/').nth(2).unwrap_or("webhook").to_owned();
    let fault = |reason: String| Error::Server { what: format!("the webhook at {host}"), reason };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| fault(error.to_string()))?;
    runtime.block_on(async {
        let client = reqwest::Client::builder().timeout(Duration::from_secs(30)).build();
        let client = client.map_err(|error| fault(error.without_url().to_string()))?;
        let request = client.post(address).header("content-type", "application/json").body(text.to_owned());
        let response = request.send().await.map_err(|error| fault(error.without_url().to_string()))?;
        if response.status().is_success() { Ok(()) } else { Err(fault(format!("status {}", response.status()))) }
    })
}

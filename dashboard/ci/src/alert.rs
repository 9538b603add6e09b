//! Who is told of what: a job that has failed so many times in a row on its branch, once; that it has recovered, once; nothing of one that is muted.
//! And once a week, how it all is.

use std::io::Write as _;
use std::time::Duration;

use rusqlite::{OptionalExtension as _, Transaction, params};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

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

/// Works out what is new, puts it into each sink's outbox together with the note that it was told, and empties the outboxes. What a sink could not take stays
/// in its own: it is told the next time, in its order, and no other sink waits for it. A sink may hear one twice, where its answer was lost.
///
/// # Errors
/// Of the store; the first [`Error::Server`] or [`Error::File`] of a sink, after all others had theirs.
pub fn alert(store: &mut Store, settings: &Settings, now: i64) -> Result<Vec<Alert>> {
    let overview = views::overview(store, &Filter::default())?;
    let mut told = Vec::new();
    for job in &overview.jobs {
        let open = open(store, job.id)?;
        let is_red = job.state == "failed"
            && job.streak >= i64::from(settings.alerts.after)
            && (job.required || !settings.alerts.required_only);
        let is_muted = is_muted(store, job.id, now)?;
        if is_red && open.is_none() && !is_muted {
            let alert = opened(job);
            note(store, settings, Some(&alert), |transaction| {
                let insert = "INSERT INTO alert (job, opened) VALUES (?1, ?2)";
                transaction.execute(insert, params![job.id, now]).map(drop)
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
            note(store, settings, Some(&alert).filter(|_| !is_muted), |transaction| {
                let update = "UPDATE alert SET recovered = ?2 WHERE id = ?1";
                transaction.execute(update, params![alert_id, now]).map(drop)
            })?;
            told.extend((!is_muted).then_some(alert));
        }
    }
    told.extend(digest(store, settings, &overview, now)?);
    deliver(store, settings)?;
    Ok(told)
}

fn opened(job: &views::Job) -> Alert {
    Alert::Opened {
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
    }
}

/// What a sink is called in the store: not by its address, which is a secret with many services.
fn key(sink: &Sink) -> String {
    let address = sink.webhook.clone().or_else(|| sink.file.as_ref().map(|file| file.display().to_string()));
    hex::encode(Sha256::digest(address.unwrap_or_default()))
}

/// Notes something, and what is to be told of it, together or not at all.
fn note(
    store: &mut Store,
    settings: &Settings,
    alert: Option<&Alert>,
    change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
) -> Result<()> {
    let body = alert.map(serde_json::to_string).transpose();
    let body = body.map_err(|error| Error::Malformed { what: "an alert".to_owned(), reason: error.to_string() })?;
    store.change(|transaction| {
        for (sink, body) in settings.alerts.sink.iter().flat_map(|sink| body.iter().map(move |body| (sink, body))) {
            transaction.execute("INSERT INTO outbox (sink, body) VALUES (?1, ?2)", params![key(sink), body])?;
        }
        change(transaction)
    })
}

/// Empties each sink's outbox, up to the first one that it does not take.
fn deliver(store: &mut Store, settings: &Settings) -> Result<()> {
    let mut first = Ok(());
    for sink in &settings.alerts.sink {
        let key = key(sink);
        let waiting: Vec<(i64, String)> = store.read(|connection| {
            let mut find = connection.prepare("SELECT id, body FROM outbox WHERE sink = ?1 ORDER BY id")?;
            find.query_map([&key], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
        })?;
        for (id, body) in waiting {
            if let Err(error) = send(sink, &body) {
                first = first.and(Err(error));
                break;
            }
            store.change(|transaction| transaction.execute("DELETE FROM outbox WHERE id = ?1", [id]).map(drop))?;
        }
    }
    first
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
    let moment = times::moment(now);
    note(store, settings, Some(&alert), |transaction| crate::store::set_fact(transaction, "digest", &moment))?;
    Ok(Some(alert))
}

fn send(sink: &Sink, text: &str) -> Result<()> {
    if let Some(path) = &sink.file {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).map_err(of(path))?;
        return file.write_all(format!("{text}\n").as_bytes()).map_err(of(path));
    }
    let Some(address) = &sink.webhook else { return Ok(()) };
    // The address is a secret with many services: errors name the host alone.
    let parsed = reqwest::Url::parse(address);
    let host =
        parsed.as_ref().ok().and_then(|address| address.host_str()).unwrap_or("an address that is none").to_owned();
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

//! Pages by HTTP. Reading the store is done beside the loop that answers, by a few readers at a time; what was written once is kept until the next
//! collection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::error::{Error, Result};
use crate::pages::{self, Form, Links, Page};
use crate::settings::Settings;
use crate::store::Store;
use crate::views::{self, Filter};

/// How many read the store at once.
const READERS: usize = 4;
/// How many connections there may be; how long one may take to say what it wants, and in all.
const CONNECTIONS: usize = 256;
const PATIENCE: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(300);
/// How long to wait where nobody can be let in.
const PAUSE: Duration = Duration::from_millis(100);
/// The most bytes of pages that are kept.
const KEPT_MAX: usize = 16 << 20;
/// The longest path and query.
const ADDRESS_MAX: usize = 2_048;

/// What is served, and where.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The database.
    pub database: PathBuf,
    /// The address.
    pub listen: SocketAddr,
    /// The path below which pages lie, with a slash at each end.
    pub root: String,
}

struct Board {
    options: ServeOptions,
    settings: Settings,
    links: Links,
    stores: Mutex<Vec<Store>>,
    readers: Arc<Semaphore>,
    kept: Mutex<Kept>,
}

/// Pages of one collection.
#[derive(Default)]
struct Kept {
    generation: i64,
    bytes: usize,
    pages: HashMap<String, Bytes>,
}

/// Serves until `end` comes.
///
/// # Errors
/// [`Error::Listen`], and [`Error::Database`] where the store cannot be read at the start.
pub async fn serve(
    options: ServeOptions,
    settings: Settings,
    end: impl Future<Output = ()> + Send + 'static,
    ready: impl FnOnce(SocketAddr),
) -> Result<()> {
    let fault = |source| Error::Listen { address: options.listen.to_string(), source };
    let first = Store::open_to_read(&options.database)?;
    let listener = TcpListener::bind(options.listen).await.map_err(fault)?;
    ready(listener.local_addr().map_err(fault)?);
    let board = Arc::new(Board {
        links: Links::Served(options.root.clone()),
        options: options.clone(),
        settings,
        stores: Mutex::new(vec![first]),
        readers: Arc::new(Semaphore::new(READERS)),
        kept: Mutex::default(),
    });
    let router = Router::new().fallback(answer).with_state(board);
    let connections = Arc::new(Semaphore::new(CONNECTIONS));
    let mut served = tokio::task::JoinSet::new();
    let mut end = std::pin::pin!(end);
    loop {
        let accepted = tokio::select! {
            () = &mut end => break,
            Some(_) = served.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        // One that is gone before it is taken, or no descriptors for now: others come, and nothing tells when.
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        // Who comes when there are too many is turned away at once.
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else { continue };
        let service = hyper_util::service::TowerToHyperService::new(router.clone());
        served.spawn(async move {
            let mut http = hyper::server::conn::http1::Builder::new();
            http.timer(hyper_util::rt::TokioTimer::new()).header_read_timeout(PATIENCE).keep_alive(true);
            let connection = http.serve_connection(hyper_util::rt::TokioIo::new(stream), service);
            // Who does not read its answer is left, too.
            let _ = tokio::time::timeout(LONGEST, connection).await;
            drop(permit);
        });
    }
    // Answers that are on their way may end.
    let _ = tokio::time::timeout(PAUSE * 10, async { while served.join_next().await.is_some() {} }).await;
    Ok(())
}

async fn answer(State(board): State<Arc<Board>>, method: Method, uri: Uri, RawQuery(query): RawQuery) -> Response {
    let query = query.unwrap_or_default();
    if method != Method::GET && method != Method::HEAD {
        return StatusCode::METHOD_NOT_ALLOWED.into_response();
    }
    if uri.path().len() + query.len() > ADDRESS_MAX {
        return StatusCode::URI_TOO_LONG.into_response();
    }
    let path = uri.path().to_owned();
    // A reader that is not there ends the server; it closes the semaphore never.
    let Ok(permit) = Arc::clone(&board.readers).acquire_owned().await else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let done = tokio::task::spawn_blocking(move || {
        let answered = board.answer(&path, &query);
        drop(permit);
        answered
    });
    done.await.unwrap_or_else(|_| StatusCode::INTERNAL_SERVER_ERROR.into_response())
}

/// What an address asks for.
enum Asked<'a> {
    Page(&'a str),
    Api(&'a str),
    Badge(&'a str),
    Asset(&'a str),
    Schema,
    Health,
}

fn asked(path: &str) -> Asked<'_> {
    match path {
        "api/v1/schema" => Asked::Schema,
        "healthz" => Asked::Health,
        _ => {
            if let Some(rest) = path.strip_prefix("api/v1/") {
                Asked::Api(rest)
            } else if let Some(rest) = path.strip_prefix("badge/") {
                Asked::Badge(rest.trim_end_matches(".svg"))
            } else if let Some(rest) = path.strip_prefix("assets/") {
                Asked::Asset(rest)
            } else {
                Asked::Page(path)
            }
        }
    }
}

const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const SVG: &str = "image/svg+xml";

impl Board {
    fn answer(&self, path: &str, query: &str) -> Response {
        let root = self.options.root.as_str();
        // The root without its slash is the root.
        let rest = if path == root.trim_end_matches('/') { Some("") } else { path.strip_prefix(root) };
        let Some(path) = rest else {
            return self.fault(&Error::Missing(format!("page {path}")), false);
        };
        let asked = asked(path);
        if let Asked::Asset(name) = asked {
            let found = pages::ASSETS.iter().find(|(known, ..)| *known == name);
            return found.map_or_else(
                || StatusCode::NOT_FOUND.into_response(),
                |(_, kind, contents)| reply(StatusCode::OK, kind, Bytes::from_static(contents.as_bytes()), true),
            );
        }
        let kind = match asked {
            Asked::Page(_) => HTML,
            Asked::Badge(_) => SVG,
            _ => JSON,
        };
        match self.page(&asked, query) {
            Ok(body) => reply(StatusCode::OK, kind, body, false),
            Err(error) => self.fault(&error, kind == JSON),
        }
    }

    fn page(&self, asked: &Asked<'_>, query: &str) -> Result<Bytes> {
        let store = self.stores.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let store = store.map_or_else(|| Store::open_to_read(&self.options.database), Ok)?;
        let done = self.with(&store, asked, query);
        // A database that could not be read is opened anew next time: it may be another file by then.
        if !matches!(done, Err(Error::Database { .. })) {
            self.stores.lock().unwrap_or_else(PoisonError::into_inner).push(store);
        }
        done
    }

    fn with(&self, store: &Store, asked: &Asked<'_>, query: &str) -> Result<Bytes> {
        let form = match asked {
            Asked::Schema => return Ok(pages::schema()?.into()),
            Asked::Health => {
                views::generation(store)?;
                return Ok(Bytes::from_static(b"{\"state\":\"ok\"}"));
            }
            Asked::Badge(which) => return badge(store, which).map(Bytes::from),
            Asked::Api(_) => Form::Json,
            _ => Form::Html(&self.links),
        };
        let (Asked::Page(path) | Asked::Api(path)) = asked else { return Err(Error::Missing("page".to_owned())) };
        let page = Page::at(path).ok_or_else(|| Error::Missing(format!("page {path}")))?;
        let filter = filter(query)?;
        let generation = views::generation(store)?;
        // Ages are as of a minute.
        let minute = crate::times::now() / 60;
        let key = format!("{minute} {} {path}?{query}", form == Form::Json);
        if let Some(body) = self.kept(generation, &key) {
            return Ok(body);
        }
        let body = Bytes::from(pages::write(store, &self.settings, &page, &filter, form)?);
        self.keep(generation, key, &body);
        Ok(body)
    }

    fn kept(&self, generation: i64, key: &str) -> Option<Bytes> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.generation == generation { kept.pages.get(key).cloned() } else { None }
    }

    fn keep(&self, generation: i64, key: String, body: &Bytes) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.generation != generation || kept.bytes + body.len() + key.len() > KEPT_MAX {
            *kept = Kept { generation, ..Kept::default() };
        }
        kept.bytes += body.len() + key.len();
        kept.pages.insert(key, body.clone());
    }

    fn fault(&self, error: &Error, is_api: bool) -> Response {
        let status = match error {
            Error::Missing(_) => StatusCode::NOT_FOUND,
            Error::Query(_) => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        // What went wrong inside is for the log; who asks learns that it did.
        let reason = if status.is_client_error() {
            error.to_string()
        } else {
            eprintln!("coracle-ci: {error}");
            "This page could not be made; the server's log says why.".to_owned()
        };
        if is_api {
            let body = serde_json::json!({ "error": reason }).to_string();
            return reply(status, JSON, body.into(), false);
        }
        let page = pages::fault(&self.settings, &self.links, status.canonical_reason().unwrap_or("fault"), &reason);
        reply(status, HTML, page.unwrap_or(reason).into(), false)
    }
}

/// A query's filter: each name at most once, none that is unknown.
fn filter(query: &str) -> Result<Filter> {
    let uri: Uri =
        format!("/?{query}").parse().map_err(|error: axum::http::uri::InvalidUri| Error::Query(error.to_string()))?;
    let parsed = axum::extract::Query::<Filter>::try_from_uri(&uri);
    parsed.map(|query| query.0).map_err(|error| Error::Query(error.to_string()))
}

/// `overview`, or `job/ID`.
fn badge(store: &Store, which: &str) -> Result<String> {
    match Page::at(which) {
        Some(Page::Overview) => {
            let view = views::overview(store, &Filter { kind: "required".to_owned(), ..Filter::default() })?;
            let state = match (view.jobs.is_empty(), view.failed_required) {
                (true, _) => "none",
                (false, 0) => "passed",
                (false, _) => "failed",
            };
            Ok(pages::badge("required checks", state))
        }
        Some(Page::Job(id)) => {
            let view = views::job(store, id)?;
            Ok(pages::badge(&view.job.name, &view.job.state))
        }
        _ => Err(Error::Missing(format!("badge {which}"))),
    }
}

fn reply(status: StatusCode, kind: &'static str, body: Bytes, lasts: bool) -> Response {
    let headers: [(HeaderName, HeaderValue); 6] = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        (header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(pages::POLICY)),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY")),
        (header::CACHE_CONTROL, HeaderValue::from_static(if lasts { "max-age=3600" } else { "no-cache" })),
    ];
    (status, headers, body).into_response()
}

//! `coracle monitor`: the figures of all pods by HTTP, for Prometheus.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use coracle_protocol::metrics::{Families, Kind, Process, count_of, process};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::pods;

/// Serve the figures of all pods of this host by HTTP.
///
/// /metrics has them for Prometheus (?sandbox=ID for one pod, ?filter_family=NAME for names that begin so), /sandboxes the ids of the pods, and /pods
/// what they are, as JSON. Nothing of it can change anything.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The address at which it listens.
    #[arg(long, alias = "listen-address", default_value = "127.0.0.1:8090", value_name = "ADDRESS:PORT")]
    listen: SocketAddr,
}

/// How long a connection may be there, whatever its client does.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(60);

/// How long a client may take to say what it wants.
const HEAD_PATIENCE: Duration = Duration::from_secs(5);

/// How many connections there may be.
const CONNECTIONS: usize = 32;

/// The format of the figures, by its name.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What it counts of itself.
#[derive(Debug, Default)]
struct Counts {
    scrapes: AtomicU64,
    failures: AtomicU64,
    microseconds: AtomicU64,
    turn: tokio::sync::Mutex<()>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("listen at {}: give another address with --listen", args.listen))?;
    let address = listener.local_addr().context("the address")?;
    eprintln!("coracle: figures of pods at http://{address}/metrics");
    let (counts, places) = (Arc::new(Counts::default()), Arc::new(Semaphore::new(CONNECTIONS)));
    loop {
        let place = Arc::clone(&places).acquire_owned().await.context("a place")?;
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, or a client that has gone: the next one may be served.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let counts = Arc::clone(&counts);
        tokio::spawn(async move {
            let _place = place;
            let serve = service_fn(|request| {
                let counts = Arc::clone(&counts);
                async move { Ok::<_, Infallible>(answer(&request, &counts).await) }
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_PATIENCE)
                .serve_connection(TokioIo::new(stream), serve);
            // One that reads nothing, or says nothing, is given up; nobody waits for it.
            let _ = tokio::time::timeout(CONNECTION_PATIENCE, connection).await;
        });
    }
}

/// A value of the query.
fn parameter<'a>(request: &'a Request<Incoming>, name: &str) -> Option<&'a str> {
    let mut pairs = request.uri().query()?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.find(|(found, _)| *found == name).map(|(_, value)| value)
}

fn reply(code: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = code;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

async fn answer(request: &Request<Incoming>, counts: &Counts) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET is answered\n".into());
    }
    let found = match request.uri().path() {
        "/metrics" => {
            metrics(parameter(request, "sandbox"), parameter(request, "filter_family"), counts).await.map(|text| (TEXT, text))
        }
        "/sandboxes" => pods::described().await.map(|pods| {
            let ids: Vec<_> = pods.into_iter().map(|(_, about)| about.id + "\n").collect();
            ("text/plain; charset=utf-8", ids.concat())
        }),
        "/pods" => pods::described().await.and_then(|pods| {
            let about: Vec<_> = pods.into_iter().map(|(_, about)| about).collect();
            Ok(("application/json", serde_json::to_string_pretty(&about)? + "\n"))
        }),
        "/" => Ok((
            "text/plain; charset=utf-8",
            "/metrics    figures of all pods; ?sandbox=ID, ?filter_family=NAME\n/sandboxes  ids of pods\n/pods       what they are\n".into(),
        )),
        _ => return reply(StatusCode::NOT_FOUND, TEXT, "there is /metrics, /sandboxes and /pods\n".into()),
    };
    match found {
        Ok((kind, text)) => reply(StatusCode::OK, kind, text),
        Err(error) => reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, format!("{error:#}\n")),
    }
}

/// The figures of all pods, or of one, and of this program.
async fn metrics(sandbox: Option<&str>, family: Option<&str>, counts: &Counts) -> Result<String> {
    let begun = Instant::now();
    // One at a time: however many ask at once, each pod is asked by one of them.
    let _turn = counts.turn.lock().await;
    let (mut pods, silent) = pods::looked_at().await?;
    let running = pods.len() + silent;
    pods.retain(|(_, about)| sandbox.is_none_or(|id| about.id == id));
    let (mut families, failed) = pods::figures(pods).await;
    let add = |counter: &AtomicU64, more: u64| counter.fetch_add(more, Ordering::Relaxed) + more;
    let scrapes = add(&counts.scrapes, 1);
    let failures = add(&counts.failures, (failed + silent) as u64);
    let spent = add(&counts.microseconds, u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
    if sandbox.is_none() {
        own(&mut families, running, [scrapes, failures, spent]);
    }
    if let Some(start) = family {
        families.retain(|name| name.starts_with(start));
    }
    Ok(families.to_string())
}

fn own(families: &mut Families, running: usize, [scrapes, failures, spent]: [u64; 3]) {
    process(families, "kata_monitor", "coracle monitor", &Process::of(std::path::Path::new("/proc/self")));
    let running = count_of(running as u64);
    families.figure("kata_monitor_running_shim_count", Kind::Gauge, "Shims that run.", running);
    families.figure("kata_monitor_scrape_count", Kind::Counter, "How often figures were asked for.", count_of(scrapes));
    let help = "Pods that have not answered when they were asked for figures.";
    families.figure("kata_monitor_scrape_failed_count", Kind::Counter, help, count_of(failures));
    let help = "How long all of that took.";
    families.figure("coracle_monitor_scrape_seconds_total", Kind::Counter, help, count_of(spent) / 1e6);
}

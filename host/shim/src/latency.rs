//! How long things take, as histograms: requests of containerd's, requests to the agent, and the phases of a pod's start.
//!
//! They come of the spans by which the code says what it does ([`Timer`]); nobody measures beside them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_protocol::metrics::{Families, Kind};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// The bounds of a histogram's counts in milliseconds.
const BOUNDS: [f64; 17] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0,
    65536.0,
];

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Of {
    Request,
    Agent,
    Phase,
}

impl Of {
    /// By a span's name.
    fn span(metadata: &Metadata<'_>) -> Option<Self> {
        if !metadata.target().starts_with("coracle_sandbox")
            && !metadata.target().starts_with("containerd_shim_coracle")
        {
            return None;
        }
        match metadata.name() {
            "request" => Some(Self::Request),
            "agent_call" => Some(Self::Agent),
            "files" | "network" | "machine" | "greeting" | "agent" | "boot" | "create" | "start" => Some(Self::Phase),
            _ => None,
        }
    }
}

#[derive(Debug, Default)]
struct Histogram {
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let milliseconds = time.as_secs_f64() * 1000.0;
        self.sum += milliseconds;
        let at = BOUNDS.iter().position(|bound| milliseconds <= *bound).unwrap_or(BOUNDS.len());
        if let Some(count) = self.counts.get_mut(at) {
            *count += 1;
        }
    }
}

/// The histograms of a shim.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    // Spans end on any thread.
    histograms: Mutex<BTreeMap<(Of, String), Histogram>>,
}

impl Latencies {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Of, String), Histogram>> {
        self.histograms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, of: Of, what: String, time: Duration) {
        self.lock().entry((of, what)).or_default().add(time);
    }

    /// Adds them as figures; those of requests under Kata's names.
    pub(crate) fn figures(&self, families: &mut Families) {
        for ((of, what), histogram) in &*self.lock() {
            let (name, help, label) = match of {
                Of::Request => (
                    "kata_shim_rpc_durations_histogram_milliseconds",
                    "How long containerd's requests take.",
                    ("action", what),
                ),
                Of::Agent => (
                    "kata_shim_agent_rpc_durations_histogram_milliseconds",
                    "How long requests to the agent take.",
                    ("action", what),
                ),
                Of::Phase => (
                    "coracle_start_phase_milliseconds",
                    "How long the phases of a start take: boot is files, network, machine, greeting and agent together.",
                    ("phase", what),
                ),
            };
            let labels = [(label.0, label.1.as_str())];
            families.family(name, Kind::Histogram, help).histogram(&labels, &BOUNDS, &histogram.counts, histogram.sum);
        }
    }
}

/// The layer that measures spans.
pub(crate) struct Timer(pub(crate) Arc<Latencies>);

/// What a span carries.
struct Began {
    at: Instant,
    of: Of,
    what: String,
}

/// The field `method` of a span.
#[derive(Default)]
struct Method(Option<String>);

impl Visit for Method {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "method" {
            self.0 = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Timer {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let (Some(of), Some(span)) = (Of::span(attributes.metadata()), context.span(id)) else { return };
        let mut method = Method::default();
        attributes.record(&mut method);
        let what = match (of, method.0) {
            // Kata names the agent's by their messages, and containerd's in small letters.
            (Of::Agent, Some(method)) => format!("grpc.{method}Request"),
            (Of::Request, Some(method)) => snake(&method),
            _ => attributes.metadata().name().to_owned(),
        };
        span.extensions_mut().insert(Began { at: Instant::now(), of, what });
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        if let Some(Began { at, of, what }) = span.extensions_mut().remove() {
            self.0.add(of, what, at.elapsed());
        }
    }
}

/// `ResizePty` is `resize_pty`, `CloseIO` is `close_io`.
fn snake(name: &str) -> String {
    let mut text = String::new();
    let mut after_small = false;
    for c in name.chars() {
        if c.is_ascii_uppercase() && after_small {
            text.push('_');
        }
        after_small = !c.is_ascii_uppercase();
        text.push(c.to_ascii_lowercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn spans_become_histograms() {
        let latencies = Arc::new(Latencies::default());
        let subscriber = tracing_subscriber::registry().with(Timer(Arc::clone(&latencies)));
        tracing::subscriber::with_default(subscriber, || {
            for _ in 0..3 {
                let request = tracing::debug_span!("request", method = "ResizePty").entered();
                tracing::debug_span!("agent_call", method = "TtyWinResize").in_scope(|| ());
                drop(request);
            }
            tracing::debug_span!("boot").in_scope(|| tracing::debug_span!("unmeasured").in_scope(|| ()));
            tracing::debug_span!(target: "h2", "request", method = "Other").in_scope(|| ());
        });
        latencies.add(Of::Phase, "boot".into(), Duration::from_millis(3000));
        let mut families = Families::default();
        latencies.figures(&mut families);
        let text = families.to_string();
        for line in [
            "kata_shim_rpc_durations_histogram_milliseconds_count{action=\"resize_pty\"} 3",
            "kata_shim_agent_rpc_durations_histogram_milliseconds_count{action=\"grpc.TtyWinResizeRequest\"} 3",
            "coracle_start_phase_milliseconds_bucket{phase=\"boot\",le=\"2048\"} 1",
            "coracle_start_phase_milliseconds_bucket{phase=\"boot\",le=\"4096\"} 2",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}: {text}");
        }
        assert!(!text.contains("other") && !text.contains("unmeasured"));
        assert_eq!(snake("CloseIO"), "close_io");
    }
}

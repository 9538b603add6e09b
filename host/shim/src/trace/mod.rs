//! One trace of what a pod does: from containerd's context, or a root of the pod's own, through shim, sandbox and driver to the guest's agent.
//!
//! ```text
//! request (requests.rs) ─▶ create, boot, machine, … (sandbox) ─▶ agent_call ─traceparent▶ agent: its span ─fetched▶ here ─▶ export.rs ─OTLP▶ collector
//! ```
//!
//! Where no collector is set nothing is recorded: this layer looks at a place that is empty.

mod export;
mod otlp;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use coracle_protocol::spans::{Context, Spans, nanoseconds};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing::{Span, Subscriber};
use tracing_subscriber::layer::Context as LayerContext;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

use export::Exporter;
use otlp::{Done, Of};

/// What is traced, and to where: empty until the settings name a collector. A span's end is told by the subscriber, which is the process's one.
static EXPORTER: OnceLock<Exporter> = OnceLock::new();

/// Traces that this process has been part of, the newest last: of others a guest may not tell spans.
static TRACES: Mutex<VecDeque<u128>> = Mutex::new(VecDeque::new());

/// How many of them are known: the oldest is forgotten.
const TRACES_MAX: usize = 1024;

/// Begins to export to the collector at this address, whose paths begin so (OTLP 1.5: OTLP/HTTP).
pub(crate) fn start((address, path): &(SocketAddr, String), namespace: &str, pod: &str) {
    let about = [("coracle.namespace", namespace), ("coracle.pod", pod)];
    let start = || Exporter::start(*address, format!("{path}/v1/traces"), about);
    let _ = EXPORTER.get_or_init(start);
}

/// Sends what is left, and ends.
pub(crate) async fn end() {
    if let Some(exporter) = EXPORTER.get() {
        exporter.flush().await;
    }
}

/// Spans that a collector has not taken.
pub(crate) fn lost() -> Option<u64> {
    EXPORTER.get().map(Exporter::lost)
}

/// How the sandbox becomes part of it.
pub(crate) fn of_sandbox() -> Option<coracle_sandbox::Trace> {
    EXPORTER.get().map(|_| coracle_sandbox::Trace { current, guest })
}

/// The context of the current span.
fn current() -> Option<String> {
    let context = Span::current().with_subscriber(|(id, dispatch)| {
        let span = dispatch.downcast_ref::<Registry>()?.span(id)?;
        span.extensions().get::<Begun>().map(|begun| begun.context)
    });
    context.flatten().map(|context| context.to_string())
}

/// Takes the guest's spans; how many there were.
fn guest(bytes: &[u8]) -> usize {
    let Some(exporter) = EXPORTER.get() else { return 0 };
    let is_known = |trace| TRACES.lock().unwrap_or_else(PoisonError::into_inner).contains(&trace);
    let spans = Spans::read(bytes, is_known);
    let count = spans.len();
    for (context, span) in spans {
        exporter.send(Done {
            of: Of::Guest,
            context,
            parent: Some(span.parent),
            name: span.name,
            begun: span.begun,
            ended: span.ended,
            fields: Vec::new(),
            error: span.error,
        });
    }
    count
}

/// The layer that records spans.
pub(crate) struct Recorder;

/// A span that is recorded.
struct Begun {
    context: Context,
    parent: Option<u64>,
    at: SystemTime,
    fields: Fields,
}

/// A span's fields, and containerd's context among them.
#[derive(Default)]
struct Fields {
    parent: Option<Context>,
    /// Whether it begins a trace where it has no parent.
    is_root: bool,
    all: Vec<(&'static str, String)>,
    error: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            // One that is there, and says that nobody records it, begins nothing.
            "traceparent" => (self.parent, self.is_root) = (Context::parse(value), value.is_empty()),
            "error" => value.clone_into(&mut self.error),
            name if !value.is_empty() => self.all.push((name, value.to_owned())),
            _ => {}
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.all.push((field.name(), value.to_string()));
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Recorder {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, layers: LayerContext<'_, S>) {
        let Some(exporter) = EXPORTER.get() else { return };
        let Some(span) = layers.span(id) else { return };
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let above = span.parent().and_then(|parent| parent.extensions().get::<Begun>().map(|begun| begun.context));
        // Libraries' spans are theirs; and what is below nothing that is recorded, is not.
        let above = above.or(fields.parent).or_else(|| fields.is_root.then(|| exporter.root()));
        let Some(above) = above else { return };
        let mut traces = TRACES.lock().unwrap_or_else(PoisonError::into_inner);
        if !traces.contains(&above.trace) {
            let surplus = (traces.len() + 1).saturating_sub(TRACES_MAX);
            traces.drain(..surplus);
            traces.push_back(above.trace);
        }
        drop(traces);
        let begun = Begun { context: above.below(), parent: Some(above.span), at: SystemTime::now(), fields };
        span.extensions_mut().insert(begun);
    }

    fn on_record(&self, id: &Id, values: &tracing::span::Record<'_>, layers: LayerContext<'_, S>) {
        let Some(span) = layers.span(id) else { return };
        if let Some(begun) = span.extensions_mut().get_mut::<Begun>() {
            values.record(&mut begun.fields);
        }
    }

    fn on_close(&self, id: Id, layers: LayerContext<'_, S>) {
        let (Some(exporter), Some(span)) = (EXPORTER.get(), layers.span(&id)) else { return };
        let Some(Begun { context, parent, at, fields }) = span.extensions_mut().remove() else { return };
        let method = fields.all.iter().find(|(name, _)| *name == "method").map(|(_, method)| method.clone());
        let name = method.map_or_else(|| span.name().to_owned(), |method| format!("{} {method}", span.name()));
        let (begun, ended) = (nanoseconds(at), nanoseconds(SystemTime::now()));
        let (fields, error) = (fields.all, fields.error);
        exporter.send(Done { of: Of::Host, context, parent, name, begun, ended: ended.max(begun), fields, error });
    }
}

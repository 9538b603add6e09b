//! What spans say of the request on whose behalf something is done.

use tracing::field::{Field, Visit};
use tracing::span::Attributes;
use tracing::{Event, Id, Subscriber};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// The fields that lines have.
const FIELDS: [&str; 3] = ["request", "container", "exec"];

/// A span's fields.
#[derive(Default)]
struct Fields(Vec<(&'static str, String)>);

impl Fields {
    fn add(&mut self, field: &Field, value: String) {
        if let Some(name) = FIELDS.iter().find(|name| **name == field.name()).filter(|_| !value.is_empty()) {
            self.0.push((name, value));
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.to_owned());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.to_string());
    }

    fn record_debug(&mut self, _: &Field, _: &dyn std::fmt::Debug) {}
}

/// Keeps a new span's fields.
pub(super) fn remember<S>(attributes: &Attributes<'_>, id: &Id, context: &Context<'_, S>)
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let mut fields = Fields::default();
    attributes.record(&mut fields);
    if let Some(span) = context.span(id).filter(|_| !fields.0.is_empty()) {
        span.extensions_mut().insert(fields);
    }
}

/// The fields of the spans that an event is in; of two that have one, that of the inner.
pub(super) fn fields<S>(event: &Event<'_>, context: &Context<'_, S>) -> Vec<(&'static str, String)>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let mut found: Vec<(&'static str, String)> = Vec::new();
    for span in context.event_scope(event).into_iter().flatten() {
        let extensions = span.extensions();
        for (name, value) in extensions.get::<Fields>().into_iter().flat_map(|fields| &fields.0) {
            if !found.iter().any(|(known, _)| known == name) {
                found.push((name, value.clone()));
            }
        }
    }
    found
}

/// The text of an event.
#[derive(Default)]
pub(super) struct Message(pub(super) String);

impl Visit for Message {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.0);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.0 = format!("{value:?}");
        }
    }
}

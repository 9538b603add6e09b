//! Spans in the form of OTLP (OTLP 1.5: JSON of `ExportTraceServiceRequest`).

use coracle_protocol::spans::Context;
use serde_json::{Value, json};

/// Who has done it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    /// The shim and what is in its process.
    Host,
    /// The guest's agent.
    Guest,
}

/// A span that has ended.
#[derive(Debug, Clone)]
pub(super) struct Done {
    pub(super) of: Of,
    pub(super) context: Context,
    pub(super) parent: Option<u64>,
    pub(super) name: String,
    /// In nanoseconds since 1970.
    pub(super) begun: u64,
    pub(super) ended: u64,
    pub(super) fields: Vec<(&'static str, String)>,
    /// Why it failed; empty where it did not.
    pub(super) error: String,
}

impl Done {
    fn json(&self) -> Value {
        let mut span = json!({
            "traceId": format!("{:032x}", self.context.trace),
            "spanId": format!("{:016x}", self.context.span),
            "name": self.name,
            // SPAN_KIND_INTERNAL
            "kind": 1,
            "startTimeUnixNano": self.begun.to_string(),
            "endTimeUnixNano": self.ended.to_string(),
            "attributes": attributes(self.fields.iter().map(|(name, value)| (*name, value.as_str()))),
            // STATUS_CODE_UNSET, STATUS_CODE_ERROR
            "status": if self.error.is_empty() { json!({}) } else { json!({ "code": 2, "message": self.error }) },
        });
        if let (Some(parent), Some(span)) = (self.parent, span.as_object_mut()) {
            span.insert("parentSpanId".into(), format!("{parent:016x}").into());
        }
        span
    }
}

fn attributes<'a>(all: impl Iterator<Item = (&'a str, &'a str)>) -> Value {
    all.map(|(key, value)| json!({ "key": key, "value": { "stringValue": value } })).collect()
}

/// A request that exports these spans, of a pod of these attributes.
pub(super) fn request(spans: &[Done], pod: &[(&'static str, String)]) -> String {
    let resource = |of: Of, service: &str| {
        let own: Vec<_> = spans.iter().filter(|span| span.of == of).map(Done::json).collect();
        let about = [("service.name", service), ("service.version", coracle_protocol::VERSION)];
        let about = about.into_iter().chain(pod.iter().map(|(key, value)| (*key, value.as_str())));
        (!own.is_empty()).then(|| {
            json!({
                "resource": { "attributes": attributes(about) },
                "scopeSpans": [{ "scope": { "name": "coracle" }, "spans": own }],
            })
        })
    };
    let all: Vec<_> =
        [resource(Of::Host, "coracle-shim"), resource(Of::Guest, "coracle-agent")].into_iter().flatten().collect();
    json!({ "resourceSpans": all }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_the_standards() {
        let context = Context { trace: 0xabc, span: 0x12 };
        let done = |of, error: &str| Done {
            of,
            context,
            parent: Some(3),
            name: "boot".into(),
            begun: 5,
            ended: 9,
            fields: vec![("container", "c".into())],
            error: error.into(),
        };
        let text = request(&[done(Of::Host, ""), done(Of::Guest, "gone")], &[("coracle.pod", "p".into())]);
        let found: Value = serde_json::from_str(&text).unwrap();
        let resources = found["resourceSpans"].as_array().unwrap();
        assert_eq!(resources.len(), 2);
        let span = &resources[0]["scopeSpans"][0]["spans"][0];
        assert_eq!((span["traceId"].as_str().unwrap().len(), span["spanId"].as_str()), (32, Some("0000000000000012")));
        assert_eq!((&span["parentSpanId"], &span["startTimeUnixNano"]), (&json!("0000000000000003"), &json!("5")));
        assert_eq!(span["attributes"][0]["value"]["stringValue"], "c");
        assert_eq!(resources[1]["scopeSpans"][0]["spans"][0]["status"], json!({ "code": 2, "message": "gone" }));
        assert!(text.contains("coracle-agent") && request(&[], &[]).contains("[]"));
    }
}

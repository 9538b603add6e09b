//! Spans of what the host asks for with the context of a trace, kept until it fetches them ([`coracle_protocol::spans`]).

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use coracle_protocol::spans::{Context, METADATA, SERVICE, SPANS, SPANS_MAX, Span, Spans, TEXT_BYTES, nanoseconds};
use coracle_protocol::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use coracle_protocol::ttrpc::{self, Code, Request, Response};
use tokio::sync::Notify;

use crate::state::Agent;
use crate::{Error, gate};

/// Spans that have ended.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    // Handlers run side by side; held for a push or a take.
    spans: Mutex<VecDeque<Span>>,
    came: Notify,
}

/// A span that has begun.
pub(crate) struct Begun {
    context: Context,
    parent: u64,
    name: &'static str,
    at: SystemTime,
}

/// Begins one where the request comes with a context.
pub(crate) fn begin(context: &TtrpcContext, name: &'static str) -> Option<Begun> {
    let parent = Context::parse(context.metadata.get(METADATA)?.first()?)?;
    Some(Begun { context: parent.below(), parent: parent.span, name, at: SystemTime::now() })
}

impl Ended {
    /// Keeps it, if the host has not left more of them than one answer holds.
    pub(crate) fn end(&self, span: Option<Begun>, error: Option<&Error>) {
        let Some(Begun { context, parent, name, at }) = span else { return };
        let (begun, ended) = (nanoseconds(at), nanoseconds(SystemTime::now()));
        let error = error.map(|error| error.to_string().replace(char::is_control, " ")).unwrap_or_default();
        let end = (0..=TEXT_BYTES.min(error.len())).rev().find(|end| error.is_char_boundary(*end)).unwrap_or(0);
        let error = error.get(..end).unwrap_or_default().to_owned();
        // A clock that was set back meanwhile.
        let ended = ended.max(begun);
        let span = Span { context: context.to_string(), parent, name: name.into(), begun, ended, error };
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if spans.len() < SPANS_MAX {
            spans.push_back(span);
        }
        drop(spans);
        self.came.notify_one();
    }

    /// Waits for some.
    async fn take(&self) -> Spans {
        loop {
            let spans: Vec<_> = self.spans.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
            if !spans.is_empty() {
                return Spans { spans };
            }
            self.came.notified().await;
        }
    }
}

/// The service by which the host fetches them.
pub(crate) fn service(agent: &Arc<Agent>) -> HashMap<String, Service> {
    let method: Box<dyn MethodHandler + Send + Sync> = Box::new(Take(Arc::clone(agent)));
    let methods = HashMap::from([(SPANS.to_owned(), method)]);
    HashMap::from([(SERVICE.to_owned(), Service { methods, streams: HashMap::new() })])
}

struct Take(Arc<Agent>);

#[async_trait::async_trait]
impl MethodHandler for Take {
    async fn handler(&self, _: TtrpcContext, _: Request) -> ttrpc::Result<Response> {
        gate::admit_spans()?;
        let spans = self.0.spans.take().await;
        let mut response = Response::new();
        response.set_status(ttrpc::get_status(Code::OK, String::new()));
        response.payload = serde_json::to_vec(&spans)
            .map_err(|error| ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, error.to_string())))?;
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn spans_wait_for_the_host_and_it_for_them() {
        let ended = Arc::new(Ended::default());
        let waiting = tokio::spawn({
            let ended = Arc::clone(&ended);
            async move { ended.take().await.spans }
        });
        let parent = Context::new();
        let begun = || Some(Begun { context: parent.below(), parent: parent.span, name: "X", at: SystemTime::now() });
        ended.end(None, None);
        ended.end(begun(), Some(&Error::State("a\nb".into())));
        let spans = waiting.await.unwrap();
        assert_eq!((spans.len(), spans[0].error.as_str(), spans[0].parent), (1, "a b", parent.span));
        for _ in 0..2 * SPANS_MAX {
            ended.end(begun(), None);
        }
        assert_eq!(ended.take().await.spans.len(), SPANS_MAX);
    }
}

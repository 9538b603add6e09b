//! Each request to the shim: a span, and a count where it fails. The one way by which a service's methods are called.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::CodedInputStream;
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Request, Response};
use coracle_protocol::spans::METADATA;
use coracle_settings::deprecation::{self, Kind};
use tracing::Instrument;

use crate::shim::Shim;

/// A method, seen by whoever counts.
struct Seen {
    method: Box<dyn MethodHandler + Send + Sync>,
    shim: Arc<Shim>,
    /// Whether it is containerd's, or one of our own for the command line.
    is_containerds: bool,
}

#[async_trait]
impl MethodHandler for Seen {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let name = request.method.clone();
        let number = self.shim.counts.request();
        if let Some(entry) = deprecation::of(Kind::Method, &name) {
            self.shim.counts.deprecated(entry.kind.name(), entry.name);
        }
        if !self.is_containerds {
            // Somebody's look at the pod is no part of what it does.
            let span = tracing::debug_span!("management", method = name, request = number);
            return self.method.handler(context, request).instrument(span).await;
        }
        // A wait, or a question, is no part of a trace.
        let traceparent = context.metadata.get(METADATA).and_then(|all| all.first()).map_or("", String::as_str);
        let traceparent = Some(traceparent).filter(|_| !QUIET.contains(&name.as_str()));
        let (container, exec) = names(&name, &request.payload);
        let span = tracing::debug_span!(
            "request",
            method = name,
            request = number,
            container = container,
            exec = exec,
            traceparent = traceparent,
            error = tracing::field::Empty
        );
        let answer = self.method.handler(context, request).instrument(span.clone()).await;
        // A refusal comes as a response whose status is not OK, or as an error.
        let code = match &answer {
            Ok(response) => response.status.as_ref().map(|status| status.code()).unwrap_or_default(),
            Err(ttrpc::Error::RpcStatus(status)) => status.code(),
            Err(_) => ttrpc::Code::UNKNOWN,
        };
        if code != ttrpc::Code::OK {
            span.record("error", format!("{code:?}").as_str());
            self.shim.counts.failed(&name, &format!("{code:?}"));
        }
        answer
    }
}

/// Requests that begin no trace.
const QUIET: [&str; 8] = ["Wait", "WaitSandbox", "State", "Stats", "Pids", "Connect", "SandboxStatus", "PingSandbox"];

/// Of which container a request is, and of which process: each of containerd's has them in its first two fields, but for those whose second
/// is something else.
fn names(method: &str, payload: &[u8]) -> (String, String) {
    let mut names = [String::new(), String::new()];
    let mut stream = CodedInputStream::from_bytes(payload);
    while let Ok(Some(tag)) = stream.read_raw_tag_or_eof() {
        let text = match tag {
            FIRST | SECOND => stream.read_string().ok(),
            // They are in order, and no others are looked at.
            _ => None,
        };
        let Some(text) = text.filter(|text| text.len() <= NAME_BYTES) else { break };
        names[usize::from(tag == SECOND)] = text;
    }
    let [container, exec] = names;
    let has_exec = matches!(method, "State" | "Start" | "Delete" | "Exec" | "Kill" | "Wait" | "ResizePty" | "CloseIO");
    (container, if has_exec { exec } else { String::new() })
}

/// The tags of texts in the fields 1 and 2 (protobuf: encoding).
const FIRST: u32 = 1 << 3 | 2;
const SECOND: u32 = 2 << 3 | 2;

/// The longest name that is told.
const NAME_BYTES: usize = 256;

/// These services, whose requests are seen.
pub(crate) fn seen(services: HashMap<String, Service>, shim: &Arc<Shim>) -> HashMap<String, Service> {
    let of = |name: &str, service: Service| {
        let is_containerds = name.starts_with("containerd.");
        let wrap = |method| {
            Box::new(Seen { method, shim: Arc::clone(shim), is_containerds }) as Box<dyn MethodHandler + Send + Sync>
        };
        let methods = service.methods.into_iter().map(|(name, method)| (name, wrap(method))).collect();
        Service { methods, streams: service.streams }
    };
    services.into_iter().map(|(name, service)| (name.clone(), of(&name, service))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_name_their_process() {
        let payload = b"\x0a\x02c1\x12\x02e1\x1a\x01x";
        assert_eq!(names("Start", payload), ("c1".into(), "e1".into()));
        // The second field of a create is its bundle.
        assert_eq!(names("Create", payload), ("c1".into(), String::new()));
        assert_eq!(names("Start", b"\x0a\xff\xff\xff\xff\x0f"), Default::default());
        assert_eq!(names("Describe", b"{}"), Default::default());
    }
}

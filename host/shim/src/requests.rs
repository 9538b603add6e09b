//! Each request to the shim: a span, and a count where it fails. The one way by which a service's methods are called.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Request, Response};
use tracing::Instrument;

use crate::shim::Shim;

/// A method, seen by whoever counts.
struct Seen {
    method: Box<dyn MethodHandler + Send + Sync>,
    shim: Arc<Shim>,
}

#[async_trait]
impl MethodHandler for Seen {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let name = request.method.clone();
        let span = tracing::debug_span!("request", method = name);
        let answer = self.method.handler(context, request).instrument(span).await;
        // A refusal comes as a response whose status is not OK, or as an error.
        let code = match &answer {
            Ok(response) => response.status.as_ref().map(|status| status.code()).unwrap_or_default(),
            Err(ttrpc::Error::RpcStatus(status)) => status.code(),
            Err(_) => ttrpc::Code::UNKNOWN,
        };
        if code != ttrpc::Code::OK {
            self.shim.counts.failed(&name, &format!("{code:?}"));
        }
        answer
    }
}

/// These services, whose requests are seen.
pub(crate) fn seen(services: HashMap<String, Service>, shim: &Arc<Shim>) -> HashMap<String, Service> {
    let wrap = |method| Box::new(Seen { method, shim: Arc::clone(shim) }) as Box<dyn MethodHandler + Send + Sync>;
    let of = |service: Service| Service {
        methods: service.methods.into_iter().map(|(name, method)| (name, wrap(method))).collect(),
        streams: service.streams,
    };
    services.into_iter().map(|(name, service)| (name, of(service))).collect()
}

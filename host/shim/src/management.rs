//! The service of the pod itself, for `coracle metrics` and `coracle monitor` (see [`coracle_protocol::management`]).

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Code, Request, Response};
use coracle_protocol::management::{DESCRIBE, METRICS, POD};

use crate::error::status;
use crate::exposition;
use crate::shim::Shim;

/// The services to add to the Task API's.
pub(crate) fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let method = |verb| Box::new(Method { verb, shim: Arc::clone(shim) }) as Box<dyn MethodHandler + Send + Sync>;
    let methods =
        [(DESCRIBE, Verb::Describe), (METRICS, Verb::Metrics)].map(|(name, verb)| (name.to_owned(), method(verb)));
    HashMap::from([(POD.to_owned(), Service { methods: methods.into(), streams: HashMap::new() })])
}

#[derive(Debug, Clone, Copy)]
enum Verb {
    Describe,
    Metrics,
}

struct Method {
    verb: Verb,
    shim: Arc<Shim>,
}

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, _: TtrpcContext, _: Request) -> ttrpc::Result<Response> {
        let payload = match self.verb {
            Verb::Metrics => exposition::collect(&self.shim).await.to_string().into_bytes(),
            Verb::Describe => serde_json::to_vec(&self.shim.describe_pod().await)
                .map_err(|error| status(Code::INTERNAL, error.to_string()))?,
        };
        let mut response = Response::new();
        response.set_status(ttrpc::get_status(Code::OK, String::new()));
        response.payload = payload;
        Ok(response)
    }
}

//! The service of the pod itself, for `coracle metrics` and `coracle monitor` (see [`coracle_protocol::management`]).

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Code, Request, Response};
use coracle_protocol::management::{DESCRIBE, LEVELS, METRICS, POD};
use coracle_settings::Levels;
use serde_json::{Value, json};

use crate::error::status;
use crate::exposition;
use crate::shim::Shim;

/// The services to add to the Task API's.
pub(crate) fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let method = |verb| Box::new(Method { verb, shim: Arc::clone(shim) }) as Box<dyn MethodHandler + Send + Sync>;
    let verbs = [(DESCRIBE, Verb::Describe), (METRICS, Verb::Metrics), (LEVELS, Verb::Levels)];
    let methods = verbs.map(|(name, verb)| (name.to_owned(), method(verb)));
    HashMap::from([(POD.to_owned(), Service { methods: methods.into(), streams: HashMap::new() })])
}

#[derive(Debug, Clone, Copy)]
enum Verb {
    Describe,
    Metrics,
    Levels,
}

struct Method {
    verb: Verb,
    shim: Arc<Shim>,
}

impl Method {
    fn levels(&self, payload: &[u8]) -> ttrpc::Result<Value> {
        let invalid = |text: String| status(Code::INVALID_ARGUMENT, text);
        let wanted: Value = serde_json::from_slice(payload).map_err(|error| invalid(format!("{POD}: {error}")))?;
        if let Some(text) = wanted["levels"].as_str() {
            let levels = Levels::parse(text)
                .ok_or_else(|| invalid(format!("{text:?} is no list of levels: see the setting log.levels")))?;
            self.shim.log.set_levels(&levels);
        }
        Ok(json!({ "levels": self.shim.log.levels().to_string() }))
    }
}

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let payload = match self.verb {
            Verb::Metrics => exposition::collect(&self.shim).await.to_string().into_bytes(),
            Verb::Describe => serde_json::to_vec(&self.shim.describe_pod().await)
                .map_err(|error| status(Code::INTERNAL, error.to_string()))?,
            Verb::Levels => self.levels(&request.payload)?.to_string().into_bytes(),
        };
        let mut response = Response::new();
        response.set_status(ttrpc::get_status(Code::OK, String::new()));
        response.payload = payload;
        Ok(response)
    }
}

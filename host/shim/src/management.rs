//! The service of the pod itself (see [`coracle_protocol::management`]): what it is, its figures, how much is logged, what its containers use, its
//! packet filter and its console.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Code, Request, Response};
use coracle_protocol::management::{CONSOLE, DESCRIBE, IPTABLES, LEVELS, METRICS, POD, USAGE};
use coracle_sandbox::Error;
use coracle_settings::Levels;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{answer, status};
use crate::shim::Shim;
use crate::{exposition, metrics};

/// The services to add to the Task API's.
pub(crate) fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let method = |name: &str| Box::new(Method { shim: Arc::clone(shim), name: name.to_owned() }) as _;
    let names = [DESCRIBE, METRICS, LEVELS, USAGE, IPTABLES, CONSOLE];
    let methods = names.map(|name| (name.to_owned(), method(name)));
    HashMap::from([(POD.to_owned(), Service { methods: methods.into(), streams: HashMap::new() })])
}

struct Method {
    shim: Arc<Shim>,
    name: String,
}

impl Method {
    async fn run(&self, wanted: &Value) -> Result<Value, Error> {
        let failed = |error: serde_json::Error| Error::Failed(error.to_string());
        match self.name.as_str() {
            DESCRIBE => serde_json::to_value(self.shim.describe_pod().await).map_err(failed),
            LEVELS => self.levels(wanted),
            USAGE => {
                let all = self.shim.sandbox()?.stats_of_all().await?.into_iter();
                let all: Vec<_> = all.map(|(container, stats)| metrics::usage(container, &stats)).collect();
                serde_json::to_value(all).map_err(failed)
            }
            IPTABLES => {
                let (sandbox, is_ipv6) = (self.shim.sandbox()?, wanted["ipv6"] == true);
                if let Some(rules) = wanted["rules"].as_str() {
                    sandbox.set_iptables(is_ipv6, rules.into()).await?;
                    return Ok(json!({}));
                }
                let rules = sandbox.iptables(is_ipv6).await?;
                Ok(json!({ "rules": String::from_utf8_lossy(&rules) }))
            }
            CONSOLE => {
                let lines =
                    wanted["lines"].as_u64().and_then(|lines| usize::try_from(lines).ok()).unwrap_or(usize::MAX);
                Ok(json!(self.shim.sandbox()?.console(lines).await?))
            }
            other => Err(Error::Unsupported(format!("{POD}: {other}"))),
        }
    }

    fn levels(&self, wanted: &Value) -> Result<Value, Error> {
        if let Some(text) = wanted["levels"].as_str() {
            let levels = Levels::parse(text);
            let levels = levels
                .ok_or_else(|| Error::Invalid(format!("{text:?} is no list of levels: see the setting log.levels")))?;
            self.shim.log.set_levels(levels);
        }
        Ok(json!({ "levels": self.shim.log.levels().each().to_string() }))
    }
}

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        if self.name == METRICS {
            return replied(Ok(exposition::collect(&self.shim).await.to_string()));
        }
        replied(match parsed(&request) {
            Ok(wanted) => answer(&self.name, self.run(&wanted).await).map(|found| found.to_string()),
            Err(refused) => Err(refused),
        })
    }
}

/// A request of one of our own services, which are JSON. Nothing is an empty object.
pub(crate) fn parsed<T: DeserializeOwned>(request: &Request) -> ttrpc::Result<T> {
    let text = if request.payload.is_empty() { b"{}".as_slice() } else { &request.payload };
    let parsed = serde_json::from_slice(text);
    parsed.map_err(|error| status(Code::INVALID_ARGUMENT, format!("{}: {error}", request.service)))
}

/// The answer to one. A refusal is one as well: as an error, the server would tell it as "unknown" with all of its structure in the text.
pub(crate) fn replied(outcome: ttrpc::Result<String>) -> ttrpc::Result<Response> {
    let (refused, text) = match outcome {
        Ok(text) => (ttrpc::get_status(Code::OK, String::new()), text),
        Err(ttrpc::Error::RpcStatus(refused)) => (refused, String::new()),
        Err(other) => return Err(other),
    };
    let mut response = Response::new();
    response.set_status(refused);
    response.payload = text.into_bytes();
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_an_answer_with_its_own_code_and_words() {
        let refused = replied(Err(status(Code::NOT_FOUND, "no such volume".into()))).unwrap();
        assert_eq!((refused.status().code(), refused.status().message()), (Code::NOT_FOUND, "no such volume"));
        let found = replied(Ok("{}".into())).unwrap();
        assert_eq!((found.status().code(), found.payload.as_slice()), (Code::OK, b"{}".as_slice()));
        assert!(replied(Err(ttrpc::Error::Others("broken".into()))).is_err());
    }
}

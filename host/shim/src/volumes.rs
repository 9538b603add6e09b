//! The service `coracle.Volumes`, for `coracle volume`: its requests and answers are JSON.
//!
//! `Stats {"path"}` gives `{"usage": [{"unit", "total", "used", "available"}]}`, `Resize {"path", "bytes"}` gives `{}`. A path is the
//! volume's folder on the host, as it is mounted into a container.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use containerd_shim_protos::ttrpc::{self, Request, Response};
use coracle_protocol::csi::volume_usage::Unit;
use coracle_protocol::management::VOLUMES as SERVICE;
use coracle_sandbox::Error;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::answer;
use crate::management::{parsed, replied};
use crate::shim::Shim;

/// The services to add to the Task API's.
pub(crate) fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let method = |verb: Verb| Box::new(Method { verb, shim: Arc::clone(shim) }) as Box<dyn MethodHandler + Send + Sync>;
    let methods =
        HashMap::from([("Stats".to_owned(), method(Verb::Stats)), ("Resize".to_owned(), method(Verb::Resize))]);
    HashMap::from([(SERVICE.to_owned(), Service { methods, streams: HashMap::new() })])
}

#[derive(Debug, Clone, Copy)]
enum Verb {
    Stats,
    Resize,
}

struct Method {
    verb: Verb,
    shim: Arc<Shim>,
}

#[derive(Debug, Deserialize)]
struct Wanted {
    path: PathBuf,
    #[serde(default)]
    bytes: u64,
}

impl Method {
    async fn run(&self, wanted: Wanted) -> Result<Value, Error> {
        let sandbox = self.shim.sandbox()?;
        match self.verb {
            Verb::Resize => sandbox.resize_volume(&wanted.path, wanted.bytes).await.map(|()| json!({})),
            Verb::Stats => {
                let stats = sandbox.volume_stats(&wanted.path).await?;
                let usage = stats.usage.iter().map(|usage| {
                    let unit = match usage.unit.enum_value() {
                        Ok(Unit::BYTES) => "bytes",
                        Ok(Unit::INODES) => "inodes",
                        _ => "unknown",
                    };
                    json!({ "unit": unit, "total": usage.total, "used": usage.used, "available": usage.available })
                });
                Ok(json!({ "usage": usage.collect::<Vec<_>>() }))
            }
        }
    }
}

#[async_trait]
impl MethodHandler for Method {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        replied(match parsed(&request) {
            Ok(wanted) => answer(&request.method, self.run(wanted).await).map(|found| found.to_string()),
            Err(refused) => Err(refused),
        })
    }
}

//! The agent's client: every request to the guest goes through here, with its deadline.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use coracle_faults as faults;
use coracle_machine::GuestStream;
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_protocol::spans;
use coracle_protocol::ttrpc::asynchronous::Client;
use coracle_protocol::ttrpc::asynchronous::transport::Socket;
use coracle_protocol::ttrpc::{self, Request, context};

use tracing::Instrument;

use crate::{Error, Result};

/// How much later than the host the guest gives up a request.
pub(crate) const GUEST_GRACE: Duration = Duration::from_secs(1);

/// A connection to the agent.
pub(crate) struct Agent {
    client: AgentServiceClient,
    /// The same connection, for what is ours beside Kata's.
    own: Client,
    /// Gives the context of the current span, where anybody traces.
    trace: Option<fn() -> Option<String>>,
    timeout: Duration,
    calls: AtomicU64,
}

/// Whether a request has a deadline.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Patience {
    /// The configured one.
    Bounded,
    /// None: it waits for an event in the guest.
    Event,
}

impl Agent {
    pub(crate) fn new(stream: GuestStream, timeout: Duration, trace: Option<fn() -> Option<String>>) -> Self {
        let own = Client::new(Socket::new(stream));
        let client = AgentServiceClient::new(own.clone());
        Self { client, own, trace, timeout, calls: AtomicU64::new(0) }
    }

    /// How long it may take over what is not a wait.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Makes a request: `request` gets the client and the context.
    pub(crate) async fn call<'a, T, F>(
        &'a self,
        name: &'static str,
        patience: Patience,
        request: impl FnOnce(&'a AgentServiceClient, context::Context) -> F,
    ) -> Result<T>
    where
        F: Future<Output = ttrpc::Result<T>>,
    {
        let count = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        log::debug!("agent call {count}: {name}");
        let mut context = match patience {
            // The agent's own deadline comes after ours, which says what it is.
            Patience::Bounded => context::with_duration(self.timeout + GUEST_GRACE),
            Patience::Event => context::with_timeout(0),
        };
        let span = match patience {
            Patience::Bounded => tracing::debug_span!("agent_call", method = name),
            // How long an event takes to come says nothing of the agent.
            Patience::Event => tracing::Span::none(),
        };
        if let Some(own) = self.trace.and_then(|current| span.in_scope(current)) {
            context.add(spans::METADATA.into(), own);
        }
        faults::at("host.agent.request").await?;
        let answer = request(&self.client, context).instrument(span);
        let answer = match patience {
            Patience::Event => answer.await,
            Patience::Bounded => tokio::time::timeout(self.timeout, answer).await.map_err(|_| self.late(name))?,
        };
        log::debug!("agent answer {count}");
        faults::at("host.agent.answer").await?;
        Ok(answer?)
    }

    fn late(&self, name: &str) -> Error {
        let seconds = self.timeout.as_secs();
        Error::Timeout(format!("the agent does not answer {name} within {seconds} s (`agent.timeout_seconds`)"))
    }

    /// Waits for spans of the guest's, as their JSON. Not every agent has any.
    pub(crate) async fn spans(&self) -> Result<Vec<u8>> {
        let mut request = Request::new();
        (request.service, request.method) = (spans::SERVICE.into(), spans::SPANS.into());
        Ok(self.own.request(request).await?.payload)
    }
}

//! An agent that only pretends, and hangs where a test wants it to; it keeps what it was asked.

use std::sync::{Arc, Mutex};

use coracle_machine::fake::{FakeGuest, Program};
use coracle_protocol::agent_ttrpc::{AgentService, create_agent_service};
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use coracle_protocol::ttrpc::asynchronous::transport::Listener;
use coracle_protocol::ttrpc::asynchronous::{Server, TtrpcContext};
use coracle_protocol::{agent as msg, hello, ports, ttrpc};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// See the module.
#[derive(Debug)]
pub struct Scripted {
    hangs_in: String,
    /// The requests that made containers.
    pub created: Mutex<Vec<msg::CreateContainerRequest>>,
    /// The requests that set pods up.
    pub sandboxes: Mutex<Vec<msg::CreateSandboxRequest>>,
    /// How often the clock was set.
    pub clocks: watch::Sender<u32>,
    killed: watch::Sender<bool>,
    streams: Mutex<Vec<UnixStream>>,
}

/// In place of a method: the agent never ends a stream.
pub const STREAMS: &str = "(streams)";

/// In place of a method: the agent takes the clock once, and then answers no more.
pub const SILENT_CLOCK: &str = "(silent clock)";

/// In place of a method: the agent's policy keeps the host from its clock.
pub const DENIED_CLOCK: &str = "(clock)";

impl Scripted {
    /// An agent that hangs in the method of this name, and in none where there is none of it.
    #[must_use]
    pub fn hanging_in(method: &str) -> Arc<Self> {
        Arc::new(Self {
            hangs_in: method.into(),
            created: Mutex::default(),
            sandboxes: Mutex::default(),
            clocks: watch::channel(0).0,
            killed: watch::channel(false).0,
            streams: Mutex::default(),
        })
    }

    /// A guest that runs it.
    #[must_use]
    pub fn program(self: &Arc<Self>) -> Program {
        let agent = Arc::clone(self);
        Arc::new(move |guest: FakeGuest| {
            let (agent, held) = (Arc::clone(&agent), Arc::clone(&agent));
            Box::pin(async move {
                let listener =
                    Listener::bind(format!("unix://{}", guest.port_socket(ports::AGENT).display())).expect("a socket");
                let mut server = Server::new().add_listener(listener).register_service(create_agent_service(agent));
                server.start().await.expect("a server");
                let streams = UnixListener::bind(guest.port_socket(ports::STREAMS)).expect("a socket");
                let keeper = Arc::clone(&held);
                let streams = tokio::spawn(async move {
                    while let Ok((stream, _)) = streams.accept().await {
                        // A stream that is not held is at its end.
                        keeper.maybe_hold(stream);
                    }
                });
                crate::greet(&guest, &hello::line()).await;
                streams.abort();
                "the host has hung up".into()
            })
        })
    }

    fn maybe_hold(&self, stream: UnixStream) {
        if self.hangs_in == STREAMS {
            self.streams.lock().expect("streams").push(stream);
        }
    }

    async fn maybe_hang(&self, method: &str) {
        if self.hangs_in == method {
            std::future::pending::<()>().await;
        }
    }
}

type Answer<T> = ttrpc::Result<T>;

#[async_trait::async_trait]
impl AgentService for Scripted {
    async fn create_sandbox(&self, _: &TtrpcContext, request: msg::CreateSandboxRequest) -> Answer<Empty> {
        self.sandboxes.lock().expect("requests").push(request);
        self.maybe_hang("CreateSandbox").await;
        Ok(Empty::new())
    }

    async fn set_guest_date_time(&self, _: &TtrpcContext, _: msg::SetGuestDateTimeRequest) -> Answer<Empty> {
        self.clocks.send_modify(|count| *count += 1);
        if self.hangs_in == SILENT_CLOCK && *self.clocks.borrow() > 1 {
            return std::future::pending().await;
        }
        if self.hangs_in == DENIED_CLOCK {
            let status = ttrpc::get_status(ttrpc::Code::PERMISSION_DENIED, "SetGuestDateTime is blocked by policy");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, request: msg::CreateContainerRequest) -> Answer<Empty> {
        self.created.lock().expect("requests").push(request);
        self.maybe_hang("CreateContainer").await;
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, _: msg::StartContainerRequest) -> Answer<Empty> {
        self.maybe_hang("StartContainer").await;
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, _: msg::RemoveContainerRequest) -> Answer<Empty> {
        self.maybe_hang("RemoveContainer").await;
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, _: msg::SignalProcessRequest) -> Answer<Empty> {
        self.maybe_hang("SignalProcess").await;
        self.killed.send_replace(true);
        Ok(Empty::new())
    }

    async fn wait_process(&self, _: &TtrpcContext, _: msg::WaitProcessRequest) -> Answer<msg::WaitProcessResponse> {
        self.maybe_hang("WaitProcess").await;
        let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
        Ok(msg::WaitProcessResponse { status: 137, ..Default::default() })
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        _: msg::StatsContainerRequest,
    ) -> Answer<msg::StatsContainerResponse> {
        self.maybe_hang("StatsContainer").await;
        Ok(msg::StatsContainerResponse::new())
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: msg::GetOOMEventRequest) -> Answer<msg::OOMEvent> {
        std::future::pending().await
    }
}

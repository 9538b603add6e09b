//! A guest with the real agent, whose life and wire are in a test's hands, and so is who asks for things.

use std::path::PathBuf;
use std::sync::Arc;

use coracle_machine::fake::{FakeGuest, Program};
use coracle_protocol::ports;
use futures::FutureExt;
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, watch};

/// What is done to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Runs,
    /// Its monitor was killed.
    MonitorKilled,
    /// Its agent was, and its kernel goes on.
    AgentKilled,
}

/// What is done to the connections to its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Nothing.
    Open,
    /// Those that there are break, and new ones do.
    Cut,
    /// Nothing goes through any more, and nobody is told: a guest or a monitor that was stopped.
    Still,
}

/// See the module. Clones hold the same guest.
#[derive(Debug, Clone)]
pub struct Hands {
    life: Arc<watch::Sender<Life>>,
    wire: Arc<watch::Sender<Wire>>,
    caller: Arc<Notify>,
}

impl Default for Hands {
    fn default() -> Self {
        let (life, wire) = (watch::channel(Life::Runs).0, watch::channel(Wire::Open).0);
        Self { life: Arc::new(life), wire: Arc::new(wire), caller: Arc::new(Notify::new()) }
    }
}

impl Hands {
    /// The machine ends at once, as when its monitor is killed.
    pub fn kill_monitor(&self) {
        self.life.send_replace(Life::MonitorKilled);
    }

    /// The agent is gone, and its guest stays.
    pub fn kill_agent(&self) {
        self.life.send_replace(Life::AgentKilled);
    }

    /// Who has asked for something, if anybody, is gone and waits for no answer: a containerd that is restarted.
    pub fn hang_up(&self) {
        self.caller.notify_one();
    }

    /// Until that is so, once.
    pub async fn hung_up(&self) {
        self.caller.notified().await;
    }

    /// Does this to the connections.
    pub fn set_wire(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }

    /// A guest in these hands.
    #[must_use]
    pub fn program(&self) -> Program {
        let hands = self.clone();
        Arc::new(move |guest| Box::pin(hands.clone().run(guest)))
    }

    async fn run(self, guest: FakeGuest) -> String {
        let (mut life, inner) = (self.life.subscribe(), guest.sockets.join("agent"));
        let outer = UnixListener::bind(guest.port_socket(ports::AGENT)).expect("a socket");
        // What it carries breaks when the machine is gone, as a real one's connections do.
        let mut proxy = tokio::task::JoinSet::new();
        proxy.spawn(self.clone().carry(outer, inner.clone()));
        // A process that can't have what it needs ends; in a guest of its own that would be its agent.
        let agent = std::panic::AssertUnwindSafe(crate::run_agent(guest, inner)).catch_unwind();
        let reason = tokio::select! {
            biased;
            _ = life.wait_for(|life| *life != Life::Runs) => None,
            ended = agent => Some(ended.unwrap_or_else(|_| "the guest's agent has failed".into())),
        };
        drop(proxy);
        let Some(reason) = reason else {
            let _ = life.wait_for(|life| *life == Life::MonitorKilled).await;
            return "the monitor was killed by signal 9".into();
        };
        reason
    }

    /// Carries connections to the agent.
    async fn carry(self, outer: UnixListener, inner: PathBuf) {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut host, _)) = outer.accept().await {
            let (mut wire, inner) = (self.wire.subscribe(), inner.clone());
            connections.spawn(async move {
                let Ok(mut agent) = UnixStream::connect(&inner).await else { return };
                tokio::select! {
                    biased;
                    _ = wire.wait_for(|wire| *wire != Wire::Open) => {}
                    _ = copy_bidirectional(&mut host, &mut agent) => return,
                }
                // Held until it is cut.
                let _ = wire.wait_for(|wire| *wire == Wire::Cut).await;
            });
        }
    }
}

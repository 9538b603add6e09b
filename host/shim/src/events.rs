//! Events to containerd (service `containerd.services.events.ttrpc.v1.Events`), in order, across its restarts.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics::TASK_OOM_EVENT_TOPIC;
use containerd_shim_protos::ttrpc::context;
use coracle_protocol::protobuf::well_known_types::any::Any;
use tokio::sync::{mpsc, oneshot};

use crate::metrics::timestamp;

/// How long containerd may take over one event.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(5);

/// The waits between two tries to reach a containerd that is being restarted: the one place where waiting is all there is.
const RETRY: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
];

/// How many events wait for a containerd that is away; then the oldest are lost, and that is logged.
const QUEUE: usize = 1024;

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// Sends events. Without an address they are only logged (CRI-O has no publisher).
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

impl Publisher {
    pub(crate) fn new(namespace: &str) -> Self {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let address = std::env::var("TTRPC_ADDRESS").ok().filter(|address| !address.is_empty());
        tokio::spawn(forward_all(address, receiver));
        Self { namespace: namespace.to_owned(), queue }
    }

    /// Queues an event; `name` is its message's full name.
    pub(crate) fn publish(&self, topic: &str, name: &str, event: &impl Message) {
        let Ok(value) = event.write_to_bytes() else { return };
        if topic == TASK_OOM_EVENT_TOPIC && self.queue.capacity() < QUEUE / 2 {
            // The guest causes these: they must not crowd out the end of a task.
            log::warn!("an event for {topic} is left out");
            return;
        }
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any { type_url: name.to_owned(), value, ..Default::default() }),
            ..Default::default()
        };
        if self.queue.try_send(Item::Event(Box::new(envelope))).is_err() {
            log::error!("an event for {topic} is lost: {QUEUE} wait already");
        }
    }

    /// Waits until what was queued before is sent.
    pub(crate) async fn flush(&self) {
        let (sender, done) = oneshot::channel();
        if self.queue.send(Item::Flush(sender)).await.is_ok() {
            let _ = done.await;
        }
    }
}

async fn forward_all(address: Option<String>, mut queue: mpsc::Receiver<Item>) {
    let mut client = None;
    while let Some(item) = queue.recv().await {
        match item {
            Item::Flush(done) => drop(done.send(())),
            Item::Event(envelope) => match &address {
                Some(address) => forward(address, &mut client, *envelope).await,
                None => log::debug!("event {} (no publisher)", envelope.topic),
            },
        }
    }
}

async fn forward(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
    for wait in std::iter::once(Duration::ZERO).chain(RETRY) {
        tokio::time::sleep(wait).await;
        if client.is_none() {
            match connect(address).await {
                Ok(connected) => *client = Some(connected),
                Err(error) => {
                    log::warn!("containerd's events can't be reached: {error}");
                    continue;
                }
            }
        }
        if let Some(connected) = client {
            match connected.forward(context::with_duration(FORWARD_TIMEOUT), &request).await {
                Ok(_) => return,
                Err(error) => {
                    log::warn!("event {topic} was not taken: {error}");
                    *client = None;
                }
            }
        }
    }
    log::error!("event {topic} is lost: containerd did not come back");
}

async fn connect(address: &str) -> Result<EventsClient, containerd_shim_protos::ttrpc::Error> {
    let address = if address.contains("://") { address.to_owned() } else { format!("unix://{address}") };
    Ok(EventsClient::new(Client::connect(&address).await?))
}

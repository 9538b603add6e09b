//! A monitor and an agent that answer rubbish: the control channel of QEMU, and the frames of ttrpc with what is in them.

use std::cell::RefCell;
use std::time::Duration;

use coracle_driver_qemu::qmp;
use coracle_protocol::agent::StatsContainerRequest;
use coracle_protocol::agent_ttrpc::AgentServiceClient;
use coracle_protocol::ttrpc::asynchronous::Client;
use coracle_protocol::ttrpc::asynchronous::transport::Socket;
use coracle_protocol::ttrpc::context;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};

use crate::input::Input;

/// How long an answer may take after the other side has hung up.
const PATIENCE: Duration = Duration::from_secs(10);

thread_local! {
    static RUNTIME: RefCell<Option<Runtime>> = RefCell::default();
}

/// Runs one input: to whom it is said, and what.
///
/// # Panics
/// Where somebody still waits when the other side has hung up.
pub fn one(data: &[u8]) {
    let mut input = Input::new(data);
    let is_agent = input.byte() % 2 == 1;
    let said = if is_agent { framed(&mut input) } else { input.rest().to_vec() };
    RUNTIME.with_borrow_mut(|runtime| {
        let runtime =
            runtime.get_or_insert_with(|| Builder::new_current_thread().enable_all().build().expect("an event loop"));
        let work = async {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair");
            theirs.write_all(&said).await.expect("said");
            // It says no more, and still takes what is said to it: whoever waits for an answer must hear of that.
            theirs.shutdown().await.expect("its end");
            if is_agent {
                let agent = AgentServiceClient::new(Client::new(Socket::new(ours)));
                let request = StatsContainerRequest { container_id: "c".into(), ..Default::default() };
                let _ = agent.stats_container(context::with_timeout(0), &request).await;
            } else if let Ok((client, _events)) = qmp::Client::connect(ours).await {
                let _ = client.execute("query-status", serde_json::Value::Null).await;
            }
        };
        runtime
            .block_on(async { tokio::time::timeout(PATIENCE, work).await })
            .expect("nobody waits for who has hung up");
    });
}

/// Frames of ttrpc (PROTOCOL.md: length, stream, kind, flags), whose lengths are mostly right.
fn framed(input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..4 {
        let (length, stream, kind, flags, lie) = (input.byte(), input.byte(), input.byte(), input.byte(), input.byte());
        let body: Vec<u8> = (0..length % 64).map(|_| input.byte()).collect();
        let said = if lie > 240 { u32::from(lie) << (lie % 24) } else { body.len() as u32 };
        bytes.extend(said.to_be_bytes());
        bytes.extend(u32::from(stream % 4).to_be_bytes());
        bytes.extend([kind % 5, flags % 8]);
        bytes.extend(body);
    }
    bytes
}

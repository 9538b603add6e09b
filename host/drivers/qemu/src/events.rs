//! What QEMU reports of its devices.

use std::time::Duration;

use serde_json::Value;
use tokio::sync::broadcast;

use crate::qmp;

/// Where QEMU keeps devices that have a name.
pub(crate) const DEVICES: &str = "/machine/peripheral/";

/// Waits for an event, of a device where it is named; false where none comes.
pub(crate) async fn reported(
    events: &mut broadcast::Receiver<qmp::Event>,
    name: &str,
    device: Option<&str>,
    patience: Duration,
) -> bool {
    let path = device.map(|device| format!("{DEVICES}{device}"));
    // Of a processor only the end of one of its parts is told, by its path.
    let is_it = |event: &qmp::Event| {
        let found = event.data.get("path").and_then(Value::as_str).unwrap_or_default();
        let is_below =
            |path: &String| found.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        event.name == name && path.as_ref().is_none_or(is_below)
    };
    let wait = async {
        loop {
            match events.recv().await {
                Ok(event) if is_it(&event) => return true,
                // Which ones were missed nobody knows: whoever waits looks for itself.
                Err(broadcast::error::RecvError::Lagged(_)) => return device.is_none(),
                Err(broadcast::error::RecvError::Closed) => return false,
                Ok(_) => {}
            }
        }
    };
    tokio::time::timeout(patience, wait).await.unwrap_or(false)
}

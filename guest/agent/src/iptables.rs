//! GetIPTables and SetIPTables: by the tools of the guest image, where it has them.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use coracle_protocol::agent::{GetIPTablesRequest, GetIPTablesResponse, SetIPTablesRequest, SetIPTablesResponse};

use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result, program};

/// How long a tool may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// All rules, in the form of iptables-save(8).
pub(crate) async fn get(_: &Arc<Agent>, request: GetIPTablesRequest) -> Result<GetIPTablesResponse> {
    let data = run(request.is_ipv6, "save", &[], Vec::new()).await?;
    Ok(GetIPTablesResponse { data, ..Default::default() })
}

/// Replaces the rules by those of the request.
pub(crate) async fn set(_: &Arc<Agent>, request: SetIPTablesRequest) -> Result<SetIPTablesResponse> {
    let data = run(request.is_ipv6, "restore", &["--wait", "5"], request.data).await?;
    Ok(SetIPTablesResponse { data, ..Default::default() })
}

async fn run(is_ipv6: bool, what: &str, arguments: &'static [&'static str], input: Vec<u8>) -> Result<Vec<u8>> {
    let name = format!("ip{}tables-{what}", if is_ipv6 { "6" } else { "" });
    let folders = ["/usr/sbin", "/sbin"];
    let Some(path) = folders.iter().map(|folder| Path::new(folder).join(&name)).find(|path| path.exists()) else {
        return Err(Error::Unsupported(format!("{name}, which the guest image does not have,")));
    };
    let step = name.clone();
    let work = move || {
        let mut command = Command::new(path);
        command.args(arguments);
        program::run(command, &input, PATIENCE).map_err(Error::system(step))
    };
    let outcome = on_thread(work).await?;
    if !outcome.status.success() {
        let text = String::from_utf8_lossy(&outcome.stderr).trim().to_owned();
        return Err(Error::State(format!("{name} ended with {}: {text}", outcome.status)));
    }
    Ok(outcome.stdout)
}

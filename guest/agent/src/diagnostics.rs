//! GetDiagnosticData, and a look at shared mounts that makes their server forget what is gone.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use coracle_protocol::agent::{
    GetDiagnosticDataRequest, GetDiagnosticDataResponse, RemoveStaleVirtiofsShareMountsRequest,
};
use coracle_protocol::paths;
use coracle_protocol::protobuf::well_known_types::empty::Empty;
use oci_spec::runtime::Spec;

use crate::state::Agent;
use crate::thread::on_thread;
use crate::{Error, Result};

/// The one kind of data that there is.
const TERMINATION_LOG: &str = "termination_log";

/// What Kubernetes takes of a termination message, in bytes.
const MESSAGE_BYTES_MAX: u64 = 4096;

/// Where a container's termination message is in the guest: the source of the mount at the path that its annotation names.
pub(crate) fn termination_log(spec: &Spec) -> Option<PathBuf> {
    let path = spec.annotations().as_ref()?.get("io.kubernetes.container.terminationMessagePath")?;
    let mount = spec.mounts().iter().flatten().find(|mount| mount.destination().as_os_str() == path.as_str())?;
    mount.source().clone()
}

/// A container's termination message; empty where it has written none.
pub(crate) async fn data(agent: &Arc<Agent>, request: GetDiagnosticDataRequest) -> Result<GetDiagnosticDataResponse> {
    if request.log_type != TERMINATION_LOG {
        return Err(Error::Invalid(format!(
            "there is no diagnostic data of type {}",
            request.log_type.escape_default()
        )));
    }
    let container = agent.container(&request.container_id)?;
    let path = container.termination_log.clone();
    let path = path.ok_or_else(|| Error::NotFound(format!("a termination message of container {}", container.id)))?;
    // The file may be on a volume of the host's, which takes its time.
    let bytes = on_thread(move || read_message(&path)).await?;
    Ok(GetDiagnosticDataResponse { data: String::from_utf8_lossy(&bytes).into_owned(), ..Default::default() })
}

fn read_message(path: &Path) -> Result<Vec<u8>> {
    let step = || Error::system::<std::io::Error>(format!("read {}", path.display()));
    let mut options = std::fs::File::options();
    // The container may have put anything in its place.
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
    let mut bytes = Vec::new();
    match options.open(path) {
        Ok(file) if file.metadata().is_ok_and(|metadata| metadata.is_file()) => {
            file.take(MESSAGE_BYTES_MAX).read_to_end(&mut bytes).map_err(step())?;
        }
        Ok(_) => return Err(Error::State(format!("{} is no file", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(step()(error)),
    }
    Ok(bytes)
}

/// Looks at every mount below the shared folder: what the host has taken away is noticed by that, here and at the server.
pub(crate) async fn look_at_shares(_: &Arc<Agent>, _: RemoveStaleVirtiofsShareMountsRequest) -> Result<Empty> {
    let work = || {
        let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(Error::system("list the mounts"))?;
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| point.starts_with(paths::SHARED)) {
            let _ = std::fs::metadata(point);
        }
        Ok::<_, Error>(())
    };
    on_thread(work).await?;
    Ok(Empty::new())
}

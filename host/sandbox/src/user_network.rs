//! A network that the host's user has made for the pod: by passt where it is there, else by the monitor.

use std::path::PathBuf;

use coracle_machine::{Descriptor, Device};
use coracle_network::user;
use coracle_process::{Child, Output, Ring, Spawn};

use crate::{Error, Result, UserNetwork};

/// The descriptor at which passt finds its end of the connection.
const PASST_FD: i32 = 3;

/// How much of what passt says is kept, in bytes.
const MESSAGES_BYTES: usize = 4096;

/// What serves such a network beside the monitor; it ends with this.
pub(crate) struct Served {
    /// None where it is the monitor itself.
    pub(crate) passt: Option<(Child, Ring)>,
}

/// Starts what serves the network, and gives the device.
pub(crate) fn start(wanted: &UserNetwork) -> Result<(Served, Device)> {
    let Some(program) = program(wanted) else {
        let device = Device::NetUser { mac: user::MAC, forwards: wanted.forwards.clone() };
        return Ok((Served { passt: None }, device));
    };
    let pair = std::os::unix::net::UnixStream::pair();
    let (ours, theirs) = pair.map_err(|error| Error::Failed(format!("make a connection for passt: {error}")))?;
    let messages = Ring::new(MESSAGES_BYTES).logged("monitor::passt");
    let arguments = user::passt(PASST_FD, &wanted.forwards);
    let mut spawn = Spawn::new(program).arguments(arguments).descriptor(PASST_FD, theirs.into());
    spawn.stderr = Output::Ring(messages.clone());
    let passt = spawn.start().map_err(|error| Error::Missing(format!("passt: {error}")))?;
    let device = Device::NetStream { mac: user::MAC, stream: Descriptor::new(ours.into()) };
    Ok((Served { passt: Some((passt, messages)) }, device))
}

fn program(wanted: &UserNetwork) -> Option<PathBuf> {
    wanted.passt.iter().map(PathBuf::from).find(|path| path.is_file())
}

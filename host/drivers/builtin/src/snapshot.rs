//! Machines that are saved into a folder, and others that start where they stood. What is in the files only the monitor knows.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use coracle_machine::{DeviceKind, Error, MachineSpec, MemoryKind, Result};
use coracle_monitor_api::{self as api, Request};

use crate::control::Client;
use crate::describe::{Descriptors, open_vhost, readable};
use crate::hotplug::Outcome;

/// The files of a saved machine.
const STATE: &str = "state";
const MEMORY: &str = "memory";

/// What keeps a machine of this specification from being saved, and from being started from a saved one: others know of its guest, too.
pub(crate) fn obstacle(spec: &MachineSpec) -> Option<Error> {
    let savable =
        [DeviceKind::Vsock, DeviceKind::Rng, DeviceKind::Balloon, DeviceKind::Block, DeviceKind::Pmem, DeviceKind::Net];
    let mut kinds = spec.devices.iter().map(coracle_machine::Device::kind);
    let other = kinds.clone().find(|kind| !savable.contains(kind));
    let has_rng = kinds.clone().any(|kind| kind == DeviceKind::Rng);
    let what = match other {
        _ if spec.memory.kind == MemoryKind::Shared => "memory that device servers map".to_owned(),
        _ if spec.memory.huge_pages => "huge pages".to_owned(),
        Some(kind) => format!("a device {kind:?}"),
        // Its guests would be twins.
        None if !has_rng => "no randomness from the host (a device Rng)".to_owned(),
        None if kinds.any(|kind| kind == DeviceKind::Net) && open_vhost().is_some() => {
            "network links that vhost-net serves".to_owned()
        }
        None => return None,
    };
    Some(Error::Unsupported(format!("saving it with {what}")))
}

/// How a machine starts from a saved one.
pub(crate) fn start(folder: &Path, fds: &mut Descriptors) -> Result<api::Start> {
    let mend = "save a machine into this folder first";
    let mut open = |name: &str| Ok::<_, Error>(fds.add(readable("the saved machine", &folder.join(name), mend)?));
    Ok(api::Start::Saved { state_fd: open(STATE)?, memory_fd: open(MEMORY)? })
}

/// A folder that is gone again unless it is kept.
struct Attempt(Option<PathBuf>);

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(folder) = self.0.take()
            && let Err(error) = std::fs::remove_dir_all(&folder)
        {
            log::warn!("what was saved of a machine stays in {}: {error}", folder.display());
        }
    }
}

/// Saves the machine into a new folder. When this future is dropped, nothing is left of it. A folder that is there is whole, whatever happens to
/// the host: it has another name until all of it is on the disk.
pub(crate) async fn save(control: &Client, folder: PathBuf) -> Outcome<()> {
    let into =
        |error: std::io::Error| Error::Invalid(format!("a machine can't be saved into {}: {error}", folder.display()));
    if folder.exists() {
        return Err(into(std::io::ErrorKind::AlreadyExists.into()).into());
    }
    let mut name = folder.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = folder.with_file_name(name);
    // Of one that was killed meanwhile.
    let _ = std::fs::remove_dir_all(&part);
    DirBuilder::new().mode(0o700).create(&part).map_err(into)?;
    let mut attempt = Attempt(Some(part.clone()));
    let create = |name: &str| {
        // What the guest has in its memory is nobody's business.
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(part.join(name));
        file.map_err(Error::system(format!("make {}", part.join(name).display())))
    };
    let files = [create(STATE)?, create(MEMORY)?];
    let again: std::io::Result<Vec<_>> = files.iter().map(File::try_clone).collect();
    let again = again.map_err(Error::system("save a machine"))?;
    control.ask_with(&Request::Save, &files.map(Into::into)).await?;
    // The machine runs again.
    let moved = move || {
        again.iter().try_for_each(File::sync_all)?;
        std::fs::rename(&part, &folder)?;
        // Of a bare name that is the folder that this process is in.
        let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    };
    let moved = tokio::task::spawn_blocking(moved).await;
    moved.map_err(std::io::Error::other).flatten().map_err(Error::system("save a machine"))?;
    attempt.0 = None;
    Ok(())
}

//! What a pod shares of the host's files: a folder, and the server that shows it to the machine. A pod that needs none has neither.

use std::path::PathBuf;

use coracle_machine::Device;
use coracle_process::{Child, Confinement, Output, Ring, Role, Spawn};
use coracle_protocol::agent::Storage;
use coracle_storage::{SOCKET_FD, SharedFsPlan};

use crate::{Config, Error, Result, mount};

/// See the module.
#[derive(Default)]
pub(crate) struct Files {
    pub(crate) shared: Option<Shared>,
    pub(crate) virtiofsd: Option<(Child, Ring)>,
    /// For the guest.
    pub(crate) storage: Option<Storage>,
    /// For the machine.
    pub(crate) device: Option<Device>,
}

impl Files {
    /// Makes the folder and starts its server, where files are to be shared at all.
    pub(crate) async fn of(config: &Config, are_shared: bool) -> Result<Self> {
        if !are_shared {
            return Ok(Self::default());
        }
        let shared = Shared::make(config.folder.join("shared"))?;
        let Some((candidates, open_files)) = config.virtiofsd.clone() else {
            return Ok(Self { shared: Some(shared), ..Self::default() });
        };
        let server = tokio::task::spawn_blocking(move || coracle_storage::find_virtiofsd(&candidates));
        let server = server.await.map_err(|error| Error::Failed(error.to_string()))??;
        let socket = config.folder.join("fs.sock");
        let plan = coracle_storage::shared_fs(&server, &shared.folder, &socket, possible(open_files));
        let virtiofsd = Some(start_virtiofsd(&plan)?);
        Ok(Self { shared: Some(shared), virtiofsd, storage: Some(plan.storage), device: Some(plan.device) })
    }
}

/// As many open files as were asked for, or as this process can have where it can't raise that, or nobody can have as many.
fn possible(open_files: u64) -> u64 {
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let host = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|text| text.trim().parse().ok());
    let most = if Confinement::is_possible() { host } else { own };
    most.map_or(open_files, |most: u64| most.min(open_files))
}

/// Undoes the shared folder where the boot fails.
pub(crate) struct Shared {
    pub(crate) folder: PathBuf,
    kept: bool,
}

impl Shared {
    fn make(folder: PathBuf) -> Result<Self> {
        let made = Self { folder, kept: false };
        mount::share(&made.folder)?;
        Ok(made)
    }

    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        mount::unshare(&self.folder);
        let _ = std::fs::remove_file(self.folder.with_file_name("fs.sock"));
    }
}

fn start_virtiofsd(plan: &SharedFsPlan) -> Result<(Child, Ring)> {
    let listener = std::os::unix::net::UnixListener::bind(&plan.socket)
        .map_err(|error| Error::Failed(format!("listen at {}: {error}", plan.socket.display())))?;
    let messages = Ring::new(4096).logged("monitor::virtiofsd");
    let mut spawn =
        Spawn::new(&plan.program).arguments(plan.arguments.iter().cloned()).descriptor(SOCKET_FD, listener.into());
    // The one in the sandbox then ends with the one that waits for it, even where it was stopped and hears no signal. It takes root to make one.
    if rustix::process::geteuid().is_root() {
        spawn = spawn.in_own_pid_namespace();
    }
    spawn.capabilities = Some(Role::Virtiofsd.bounds().capabilities);
    spawn.stderr = Output::Ring(messages.clone());
    let child = spawn.start().map_err(|error| Error::Missing(format!("virtiofsd: {error}")))?;
    Ok((child, messages))
}

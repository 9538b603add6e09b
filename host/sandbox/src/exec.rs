//! Exec: notes a process beside a container's first one; start runs it.

use coracle_protocol::oci;

use crate::create::check_name;
use crate::io::Stdio;
use crate::state::{Process, Status};
use crate::{Error, ProcessId, Result, Sandbox, spec};

impl Sandbox {
    /// Notes a process. Nothing is asked of the guest yet.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Exists`], or [`Error::State`] where the container does not run.
    pub async fn exec(&self, id: &ProcessId, mut process: oci::Process, stdio: Stdio) -> Result<()> {
        check_name(&id.exec)?;
        let id = id.clone();
        spec::for_guest_process(&mut process, stdio.terminal, self.config.labels);
        let process = Process::new(stdio.terminal, stdio, Some(process));
        self.ask(move |state| {
            let container = state.container(&id.container)?;
            if container.is_pod {
                return Err(Error::State(format!("container {} is the pod itself and runs nothing", id.container)));
            }
            if container.init.status != Status::Running {
                return Err(Error::State(format!("container {} does not run", id.container)));
            }
            if container.paused {
                return Err(Error::State(format!("container {} is paused", id.container)));
            }
            if container.execs.contains_key(&id.exec) {
                return Err(Error::Exists(format!("process {}", id.exec)));
            }
            container.execs.insert(id.exec, process);
            Ok(())
        })
        .await?
    }
}

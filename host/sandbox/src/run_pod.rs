//! A pod whose containers come later, as CRI makes it: its first container is the pod itself. In the guest there is nothing of
//! it, no pause process and no root: the machine is what holds the pod's namespaces.

use coracle_protocol::oci;

use crate::create::{finish, reserve, unless};
use crate::io::Stdio;
use crate::state::Process;
use crate::to_its_end::to_its_end;
use crate::{Result, Sandbox, boot, spec};

impl Sandbox {
    /// Boots the machine of the pod that `spec` describes, and makes the container `id` that stands for it. When that one is
    /// killed the pod ends.
    ///
    /// # Errors
    /// Whatever a step says; then nothing of the pod is left.
    pub async fn run_pod(&self, id: &str, spec: &oci::Spec) -> Result<()> {
        spec::check(spec)?;
        let setup = spec::pod_setup(id, spec)?;
        let name = id.to_owned();
        let process = Process::new(false, Stdio::default(), None);
        let mut cancelled = self.ask(move |state| reserve(state, name, process, None)).await??;
        let (sandbox, name) = (self.clone(), id.to_owned());
        to_its_end(async move {
            let outcome = unless(&mut cancelled, &name, boot::ensure(&sandbox, setup)).await.map(drop);
            let finished = outcome.clone().map(|()| None);
            sandbox.ask(move |state| finish(state, &name, finished)).await?;
            outcome
        })
        .await
    }
}

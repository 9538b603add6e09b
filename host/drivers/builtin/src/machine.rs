//! A running monitor.

use std::sync::Arc;

use coracle_machine::{
    Accelerator, AgentAddress, Device, End, Error, GuestListener, GuestStream, Machine, MachineSpec, Result, Stats,
};
use coracle_monitor_api::{Ended, Request};
use coracle_process::{Child, ExitStatus, Ring};
use futures::future::BoxFuture;
use tokio::sync::{oneshot, watch};

use crate::boot::Root;
use crate::control::{Client, Failure};

/// The process and the files of a machine; all of them go when this is dropped.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) monitor: Child,
    #[expect(dead_code, reason = "it is held for its end")]
    pub(crate) root: Root,
}

impl Parts {
    /// Ends the process, and lets the pumps take its last words.
    pub(crate) async fn end(&mut self) -> ExitStatus {
        self.monitor.kill();
        let status = self.monitor.wait().await;
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        status
    }
}

/// See the module.
pub(crate) struct BuiltinMachine {
    address: AgentAddress,
    hello: GuestListener,
    control: Client,
    stats: Stats,
    console: Ring,
    end: watch::Receiver<Option<End>>,
    stop: Arc<tokio::sync::Notify>,
}

impl BuiltinMachine {
    #[expect(
        clippy::too_many_arguments,
        reason = "it is the end of the boot, called once, and each is a part of the machine"
    )]
    pub(crate) fn start(
        spec: &MachineSpec,
        mut parts: Parts,
        control: Client,
        ended: oneshot::Receiver<Ended>,
        address: AgentAddress,
        hello: GuestListener,
        console: Ring,
        messages: Ring,
    ) -> Self {
        let (sender, end) = watch::channel(None);
        let stop = Arc::new(tokio::sync::Notify::new());
        let (stopped, watched) = (Arc::clone(&stop), console.clone());
        tokio::spawn(async move {
            let reason = supervise(&mut parts, ended, &stopped, &watched, &messages).await;
            drop(parts);
            sender.send_replace(Some(End { reason }));
        });
        let stats = Stats { memory_bytes: spec.memory.size_mib << 20, cpus: spec.cpus.boot };
        Self { address, hello, control, stats, console, end, stop }
    }

    async fn ask(&self, request: Request) -> Result<()> {
        let ended = || self.end.borrow().as_ref().map(|end| Error::Ended(end.reason.clone()));
        if let Some(error) = ended() {
            return Err(error);
        }
        match self.control.ask(&request).await {
            Ok(_) => Ok(()),
            Err(Failure::Refused(fault)) => Err(Error::Monitor(fault.text)),
            Err(Failure::Closed) => Err(Error::Ended(self.wait().await.reason)),
        }
    }
}

impl Drop for BuiltinMachine {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

/// Waits for the machine's end, ends the monitor, and gives the reason.
async fn supervise(
    parts: &mut Parts,
    mut told: oneshot::Receiver<Ended>,
    stop: &tokio::sync::Notify,
    console: &Ring,
    messages: &Ring,
) -> String {
    let status = tokio::select! {
        biased;
        status = parts.monitor.wait() => status,
        () = stop.notified() => {
            parts.end().await;
            return "it was stopped".to_owned();
        }
    };
    // The pumps and the control channel see the end of their pipes in the next turns.
    parts.end().await;
    reason(status, told.try_recv().ok().as_ref(), console, messages)
}

fn reason(status: ExitStatus, told: Option<&Ended>, console: &Ring, messages: &Ring) -> String {
    let said = coracle_machine::console::reason(&console.last_lines(100));
    match (told, said, status) {
        // The console says more than that the guest has restarted: why it did.
        (Some(Ended::Shutdown | Ended::Reset | Ended::Panicked), Some(said), _) => said,
        (Some(ended), _, _) => ended.to_string(),
        (None, _, ExitStatus::Signal(31)) => {
            "the monitor was killed: it made a system call that its jail forbids".into()
        }
        (None, _, ExitStatus::Signal(signal)) => format!("the monitor was killed by signal {signal}"),
        (None, _, status) => {
            format!("the monitor ended with {status}: {}", messages.last_lines(3).join("; "))
        }
    }
}

fn unsupported<T: Send + 'static>(what: &str) -> BoxFuture<'static, Result<T>> {
    let error = Error::Unsupported(what.to_owned());
    Box::pin(async move { Err(error) })
}

impl Machine for BuiltinMachine {
    fn agent_address(&self) -> &AgentAddress {
        &self.address
    }

    fn guest_connection(&self) -> BoxFuture<'_, Result<GuestStream>> {
        Box::pin(self.hello.accept())
    }

    fn attach(&self, device: Device) -> BoxFuture<'_, Result<()>> {
        unsupported(&format!("attaching {:?}", device.kind()))
    }

    fn detach(&self, device: Device) -> BoxFuture<'_, Result<()>> {
        unsupported(&format!("detaching {:?}", device.kind()))
    }

    fn resize(&self, _: u32, _: u64) -> BoxFuture<'_, Result<()>> {
        unsupported("resizing")
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.ask(Request::Pause))
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.ask(Request::Resume))
    }

    fn stats(&self) -> BoxFuture<'_, Result<Stats>> {
        let answer = match &*self.end.borrow() {
            Some(end) => Err(Error::Ended(end.reason.clone())),
            None => Ok(self.stats),
        };
        Box::pin(async move { answer })
    }

    fn wait(&self) -> BoxFuture<'static, End> {
        let mut end = self.end.clone();
        Box::pin(async move {
            let reason = end.wait_for(Option::is_some).await.map(|end| end.clone());
            reason.ok().flatten().unwrap_or_else(|| End { reason: "the machine is gone".into() })
        })
    }

    fn stop(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.stop.notify_one();
            self.wait().await;
            Ok(())
        })
    }

    fn console(&self, lines: usize) -> Vec<String> {
        self.console.last_lines(lines)
    }

    fn accelerator(&self) -> Accelerator {
        Accelerator::Kvm
    }
}

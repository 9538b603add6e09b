//! A running monitor.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use coracle_machine::{
    Accelerator, AgentAddress, Balloon, Device, DeviceKind, End, Ends, Error, GuestListener, GuestStream, Limits,
    Machine, MachineSpec, MemoryKind, Result, Stats,
};
use coracle_monitor_api::{self as api, Answer, Ended, Request};
use coracle_process::{Child, ExitStatus, Ring};
use futures::future::BoxFuture;
use tokio::sync::{Mutex, oneshot, watch};

use crate::boot::Root;
use crate::control::{Client, Failure};
use crate::describe::open_vhost;
use crate::hotplug::{self, Hotplug, Outcome, Refused};
use crate::resize::Size;
use crate::snapshot;
use crate::vfio::Passed;

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
    console: Ring,
    end: Ends,
    stop: Arc<tokio::sync::Notify>,
    /// Held while a device comes or goes.
    hotplug: Mutex<Hotplug>,
    /// Held while it is changed.
    size: Mutex<Size>,
    /// For what depends on how it was made.
    spec: MachineSpec,
    /// The monitor's process.
    pid: i32,
}

impl BuiltinMachine {
    #[expect(
        clippy::too_many_arguments,
        reason = "it is the end of the boot, called once, and each is a part of the machine"
    )]
    pub(crate) fn start(
        spec: MachineSpec,
        mut parts: Parts,
        control: Client,
        ended: oneshot::Receiver<Ended>,
        address: AgentAddress,
        hello: GuestListener,
        console: Ring,
        messages: Ring,
        passed: Passed,
        is_restored: bool,
    ) -> Self {
        let pid = i32::try_from(parts.monitor.pid()).unwrap_or_default();
        let (sender, end) = watch::channel(None);
        let stop = Arc::new(tokio::sync::Notify::new());
        let (stopped, watched) = (Arc::clone(&stop), console.clone());
        tokio::spawn(async move {
            let reason = supervise(&mut parts, ended, &stopped, &watched, &messages).await;
            drop(parts);
            sender.send_replace(Some(End { reason }));
        });
        let (hotplug, size) = (Mutex::new(Hotplug::of(&spec, passed, pid)), Mutex::new(Size::of(&spec, is_restored)));
        Self { address, hello, control, console, end: Ends::new(end), stop, hotplug, spec, size, pid }
    }

    async fn ask(&self, request: Request) -> Result<Answer> {
        self.end.check()?;
        match self.control.ask(&request).await {
            Ok(answer) => Ok(answer),
            Err(failure) => Err(self.failed(failure).await),
        }
    }

    async fn failed(&self, failure: Failure) -> Error {
        match failure {
            Failure::Refused(fault) if fault.invalid => Error::Invalid(fault.text),
            Failure::Refused(fault) => Error::Monitor(fault.text),
            Failure::Closed => Error::Ended(self.wait().await.reason),
        }
    }

    /// [`Error::Unsupported`] for what this machine neither gains nor loses.
    fn can_be_plugged(&self, device: &Device, doing: &str) -> Result<()> {
        if hotplugged(&self.spec).contains(&device.kind()) {
            return Ok(());
        }
        Err(Error::Unsupported(format!("{doing} {:?}", device.kind())))
    }

    async fn plugged<T>(&self, outcome: Outcome<T>) -> Result<T> {
        match outcome {
            Ok(done) => Ok(done),
            Err(Refused::Error(error)) => Err(error),
            Err(Refused::Monitor(failure)) => Err(self.failed(failure).await),
        }
    }
}

/// What a machine of this specification gains and loses while it runs.
pub(crate) fn hotplugged(spec: &MachineSpec) -> Vec<DeviceKind> {
    if spec.access_platform {
        return Vec::new();
    }
    let mut kinds = vec![DeviceKind::Block, DeviceKind::Net];
    if spec.devices.iter().all(|device| device.kind() != DeviceKind::Pmem) {
        kinds.push(DeviceKind::Vfio);
        // Its server maps the memory.
        kinds.extend((spec.memory.kind == MemoryKind::Shared).then_some(DeviceKind::SharedFs));
    }
    kinds
}

/// What a machine can hold to a rate. Links that the host's kernel serves are for the host's kernel to limit.
pub(crate) fn limited() -> Vec<DeviceKind> {
    if open_vhost().is_some() { vec![DeviceKind::Block] } else { vec![DeviceKind::Block, DeviceKind::Net] }
}

/// Lets the monitor's threads run on these processors alone, or on any.
///
/// # Errors
/// [`Error::Invalid`] where the host has no such processor.
pub(crate) fn run_on(monitor: i32, cpus: &[u32]) -> Result<()> {
    coracle_process::run_on(monitor, cpus).map_err(|error| {
        Error::Invalid(format!(
            "the machine can't run on the processors {cpus:?} (`machine.host_cpus`, or a container's cpuset): {error}"
        ))
    })
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

/// The monitor's counts by name.
/// What the guest has left to the host, by its own words, among the monitor's figures.
const BALLOON: &str = "balloon_bytes";

fn figures(stats: &api::Stats) -> BTreeMap<String, u64> {
    let mut figures = BTreeMap::new();
    figures.extend(stats.exits.iter().map(|(reason, count)| (format!("exits_{reason}"), *count)));
    let times = stats.cpu_nanoseconds.iter().enumerate();
    figures.extend(times.map(|(number, time)| (format!("cpu{number}_nanoseconds"), *time)));
    for device in &stats.devices {
        let counts = [
            ("operations_out", device.operations_out),
            ("bytes_out", device.bytes_out),
            ("operations_in", device.operations_in),
            ("bytes_in", device.bytes_in),
            ("errors", device.errors),
        ];
        for (name, count) in counts {
            // Devices of one kind are counted together.
            *figures.entry(format!("{}_{name}", device.name)).or_default() += count;
        }
    }
    figures.extend(stats.guest.iter().map(|(name, figure)| (name.clone(), *figure)));
    figures.extend(stats.memory_resident_bytes.map(|bytes| ("memory_resident_bytes".to_owned(), bytes)));
    figures.insert("start_microseconds".into(), stats.start_microseconds);
    figures
}

impl Machine for BuiltinMachine {
    fn agent_address(&self) -> &AgentAddress {
        &self.address
    }

    fn guest_connection(&self) -> BoxFuture<'_, Result<GuestStream>> {
        Box::pin(self.hello.accept())
    }

    fn attach(&self, device: Device) -> BoxFuture<'_, Result<Option<String>>> {
        Box::pin(async move {
            self.can_be_plugged(&device, "attaching")?;
            let mut hotplug = self.hotplug.lock().await;
            // Looked at when it is this one's turn: a monitor that is gone has no process any more.
            self.end.check()?;
            let outcome = hotplug.attach(&self.control, &device).await;
            self.plugged(outcome).await
        })
    }

    fn place_of(&self, device: &Device) -> Option<String> {
        let at = self.spec.devices.iter().position(|own| own == device)?;
        Some(hotplug::place(u8::try_from(at + 1).ok()?))
    }

    fn detach(&self, device: Device) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            self.can_be_plugged(&device, "detaching")?;
            let outcome = self.hotplug.lock().await.detach(&self.control, &device).await;
            self.plugged(outcome).await
        })
    }

    fn resize_disk(&self, disk: Device, bytes: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            if disk.kind() != DeviceKind::Block {
                return Err(Error::Unsupported(format!("resizing {:?}", disk.kind())));
            }
            let outcome = self.hotplug.lock().await.resize(&self.control, &disk, bytes).await;
            self.plugged(outcome).await
        })
    }

    fn balloon(&self, bytes: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            Balloon::of(&self.spec).ok_or_else(Balloon::missing)?.left(bytes)?;
            let outcome = self.hotplug.lock().await.resize(&self.control, &Device::Balloon, bytes).await;
            self.plugged(outcome).await
        })
    }

    fn limit(&self, device: Device, limits: Limits) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            if !limited().contains(&device.kind()) {
                return Err(Error::Unsupported(format!("limiting {:?}", device.kind())));
            }
            let outcome = self.hotplug.lock().await.limit(&self.control, &device, limits).await;
            self.plugged(outcome).await
        })
    }

    fn resize(&self, cpus: u32, memory_mib: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            let outcome = self.size.lock().await.change(&self.control, cpus, memory_mib).await;
            self.plugged(outcome).await
        })
    }

    fn place(&self, host_cpus: Vec<u32>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            if self.spec.host_cpus.is_empty() { run_on(self.pid, &host_cpus) } else { Ok(()) }
        })
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.ask(Request::Pause).await.map(drop) })
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move { self.ask(Request::Resume).await.map(drop) })
    }

    fn save(&self, folder: PathBuf) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            if let Some(obstacle) = snapshot::obstacle(&self.spec) {
                return Err(obstacle);
            }
            // Neither devices nor size change meanwhile.
            let (mut hotplug, _size) = (self.hotplug.lock().await, self.size.lock().await);
            self.end.check()?;
            if !hotplug.is_as_from_start(&self.control) {
                return Err(Error::Unsupported("saving it with other devices than it had at its start".into()));
            }
            let outcome = snapshot::save(&self.control, folder).await;
            self.plugged(outcome).await
        })
    }

    fn stats(&self) -> BoxFuture<'_, Result<Stats>> {
        Box::pin(async move {
            match self.ask(Request::Stats).await? {
                Answer::Stats(found) => {
                    let balloon_bytes = found.guest.get(BALLOON).copied().unwrap_or(0).min(found.memory_bytes);
                    let (memory_bytes, cpus) = (found.memory_bytes, found.cpus);
                    Ok(Stats { memory_bytes, balloon_bytes, cpus, monitor: figures(&found) })
                }
                _ => Err(Error::Monitor("the monitor has not answered what it was asked".into())),
            }
        })
    }

    fn wait(&self) -> BoxFuture<'static, End> {
        self.end.wait()
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

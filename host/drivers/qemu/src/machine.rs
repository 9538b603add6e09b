//! A running QEMU.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use coracle_machine::{
    Accelerator, AgentAddress, Balloon, Device, End, Ends, Error, GuestListener, GuestStream, Limits, Machine,
    MachineSpec, Result, Stats, unsupported,
};
use coracle_process::{Child, ExitStatus, Ring};
use futures::future::BoxFuture;
use serde_json::{Value, json};
use tokio::sync::{Mutex, broadcast, mpsc, watch};

use crate::command::can_grow;
use crate::hotplug::{self, Hotplug, Jailed};
use crate::resize::Size;
use crate::vsock::Vsock;
use crate::{Config, devices, place, qmp, resize, vfio};

/// The processes and files of a machine; all of them go when this is dropped.
pub(crate) struct Parts {
    pub(crate) qemu: Option<Child>,
    vsock: Vsock,
    hello: Option<GuestListener>,
    folder: PathBuf,
    /// The host's devices that are QEMU's while it runs.
    pub(crate) given: vfio::Given,
}

impl Parts {
    pub(crate) fn new(vsock: Vsock, hello: GuestListener, folder: PathBuf) -> Self {
        Self { qemu: None, vsock, hello: Some(hello), folder, given: vfio::Given::default() }
    }

    /// Lets the pumps of a process that has ended take its last words.
    pub(crate) async fn drain_messages(&self) {
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        log::debug!("machine in {} has ended", self.folder.display());
    }
}

impl Drop for Parts {
    fn drop(&mut self) {
        // Where QEMU still runs, it goes with this, and has what it has opened until then.
        self.given.take_all();
        self.vsock.remove_files();
    }
}

/// See the module.
pub(crate) struct QemuMachine {
    accelerator: Accelerator,
    address: AgentAddress,
    hello: GuestListener,
    control: qmp::Client,
    /// Its size, and who changes it: one at a time.
    size: Mutex<Size>,
    /// Processors that it has, and memory from its start; and whether it can have more.
    cpus: AtomicU32,
    least_bytes: u64,
    can_grow: bool,
    /// By which its guest leaves memory to the host.
    balloon: Option<Balloon>,
    /// Devices that can go, and who changes them: one at a time. None where there is no place for them.
    hotplug: Option<Mutex<Hotplug>>,
    /// QEMU's process, and where it runs.
    pid: i32,
    host_cpus: Vec<u32>,
    /// What QEMU reports while it runs.
    events: broadcast::Sender<qmp::Event>,
    console: Ring,
    end: Ends,
    stop: Arc<tokio::sync::Notify>,
}

impl QemuMachine {
    pub(crate) fn start(
        config: &Config,
        spec: &MachineSpec,
        mut parts: Parts,
        (control, events): (qmp::Client, mpsc::Receiver<qmp::Event>),
        (console, messages): (Ring, Ring),
        jailed: Option<Jailed>,
    ) -> Self {
        let (accelerator, can_grow) = (config.accelerator, can_grow(config, spec));
        let pid = parts.qemu.as_ref().and_then(|qemu| i32::try_from(qemu.pid()).ok()).unwrap_or_default();
        let (sender, end) = watch::channel(None);
        let stop = Arc::new(tokio::sync::Notify::new());
        let address = parts.vsock.address.clone();
        #[expect(clippy::expect_used, reason = "it is put there by `new` and taken here only")]
        let hello = parts.hello.take().expect("the listener");
        let stopped = Arc::clone(&stop);
        let (reports, _) = broadcast::channel(REPORTS);
        let watched = Outputs { console: console.clone(), messages, reports: reports.clone() };
        tokio::spawn(async move {
            let reason = supervise(&mut parts, events, &stopped, &watched).await;
            drop(parts);
            sender.send_replace(Some(End { reason }));
        });
        let size = Mutex::new(Size::of(spec, can_grow));
        let (cpus, least_bytes) = (spec.cpus.boot.into(), spec.memory.size_mib << 20);
        let can_grow = can_grow && spec.memory.max_mib > spec.memory.size_mib;
        Self {
            accelerator,
            address,
            hello,
            control,
            size,
            cpus,
            least_bytes,
            can_grow,
            balloon: Balloon::of(spec),
            hotplug: devices::has_hotplug(config, spec).then(|| Mutex::new(Hotplug::of(config, spec, jailed))),
            pid,
            host_cpus: spec.host_cpus.clone(),
            events: reports,
            console,
            end: Ends::new(end),
            stop,
        }
    }

    /// Work that takes its time, or the machine's end where that comes first.
    async fn until_end<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.end.check()?;
        tokio::select! {
            biased;
            end = self.wait() => Err(Error::Ended(end.reason)),
            done = work => done,
        }
    }

    async fn command(&self, name: &str) -> Result<()> {
        self.end.check()?;
        self.control.execute(name, Value::Null).await?;
        Ok(())
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

struct Outputs {
    console: Ring,
    messages: Ring,
    reports: broadcast::Sender<qmp::Event>,
}

/// The most reports that wait for whoever reads them; who is slower misses the oldest.
const REPORTS: usize = 64;

/// Waits for the end of any process of the machine, ends the others, and gives the reason.
async fn supervise(
    parts: &mut Parts,
    mut events: mpsc::Receiver<qmp::Event>,
    stop: &tokio::sync::Notify,
    outputs: &Outputs,
) -> String {
    let Some(qemu) = &parts.qemu else { return "QEMU was not started".into() };
    let server = async {
        match &parts.vsock.server {
            Some(server) => server.wait().await,
            None => std::future::pending().await,
        }
    };
    let mut shutdown = None;
    let mut report = |event: qmp::Event| {
        if event.name == "SHUTDOWN" {
            shutdown = Some(event.data.clone());
        }
        // Mostly nobody waits for one.
        let _ = outputs.reports.send(event);
    };
    let reports = async {
        while let Some(event) = events.recv().await {
            report(event);
        }
        std::future::pending::<()>().await;
    };
    let reason = tokio::select! {
        biased;
        status = qemu.wait() => {
            // The pumps and the control channel see the end of their pipes in the same turns.
            parts.drain_messages().await;
            while let Ok(event) = events.try_recv() {
                report(event);
            }
            reason(status, shutdown.as_ref(), outputs)
        }
        () = reports => String::new(),
        status = server => {
            // The server ends with QEMU, too: then QEMU's end is the one to tell, and comes within the same moment.
            let grace = std::time::Duration::from_millis(500);
            match tokio::time::timeout(grace, qemu.wait()).await {
                Ok(ended) => reason(ended, None, outputs),
                Err(_) => format!("the vsock server ended with {status}"),
            }
        }
        () = stop.notified() => "it was stopped".to_owned(),
    };
    qemu.kill();
    qemu.wait().await;
    if let Some(server) = &parts.vsock.server {
        server.kill();
        server.wait().await;
    }
    reason
}

fn reason(status: ExitStatus, shutdown: Option<&Value>, outputs: &Outputs) -> String {
    if let ExitStatus::Signal(signal) = status {
        return format!("QEMU was killed by signal {signal}");
    }
    if let Some(reason) = coracle_machine::console::reason(&outputs.console.last_lines(100)) {
        return reason;
    }
    if status != ExitStatus::Code(0) {
        let last = outputs.messages.last_lines(3).join("; ");
        return format!("QEMU ended with {status}: {last}");
    }
    let how = shutdown.and_then(|data| data.get("reason")).and_then(Value::as_str).unwrap_or("no reason given");
    format!("the guest has shut down ({how})")
}

impl Machine for QemuMachine {
    fn agent_address(&self) -> &AgentAddress {
        &self.address
    }

    fn guest_connection(&self) -> BoxFuture<'_, Result<GuestStream>> {
        Box::pin(self.hello.accept())
    }

    fn attach(&self, device: Device) -> BoxFuture<'_, Result<Option<String>>> {
        let Some(hotplug) = &self.hotplug else { return unsupported(&format!("attaching {:?}", device.kind())) };
        Box::pin(async move { self.until_end(hotplug.lock().await.attach(&self.control, &device)).await })
    }

    fn detach(&self, device: Device) -> BoxFuture<'_, Result<()>> {
        let Some(hotplug) = &self.hotplug else { return unsupported(&format!("detaching {:?}", device.kind())) };
        Box::pin(async move { self.until_end(hotplug.lock().await.detach(&self.control, &self.events, &device)).await })
    }

    fn resize_disk(&self, disk: Device, bytes: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let Device::Block { serial, .. } = &disk else {
                return Err(Error::Unsupported(format!("resizing {:?}", disk.kind())));
            };
            let name = devices::disk_name(serial)?;
            self.until_end(hotplug::resize_disk(&self.control, &name, bytes)).await
        })
    }

    fn limit(&self, device: Device, limits: Limits) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let Device::Block { serial, .. } = &device else {
                return Err(Error::Unsupported(format!("limiting {:?}", device.kind())));
            };
            let name = devices::disk_name(serial)?;
            self.until_end(hotplug::limit_disk(&self.control, &name, limits)).await
        })
    }

    fn resize(&self, cpus: u32, memory_mib: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            let mut size = self.size.lock().await;
            let resized = self.until_end(size.change(&self.control, &self.events, cpus, memory_mib)).await;
            self.cpus.store(size.cpus(), Ordering::Relaxed);
            // Processors that were added are threads of their own.
            resized?;
            place::pin(self.pid, &self.control, &self.host_cpus).await
        })
    }

    fn place(&self, host_cpus: Vec<u32>) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            if !self.host_cpus.is_empty() {
                return Ok(());
            }
            self.until_end(place::place(self.pid, &self.control, &host_cpus)).await
        })
    }

    fn balloon(&self, bytes: u64) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.end.check()?;
            let left = self.balloon.ok_or_else(Balloon::missing)?.left(bytes)?;
            self.control.execute("balloon", json!({ "value": left })).await?;
            Ok(())
        })
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.command("stop"))
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(self.command("cont"))
    }

    fn stats(&self) -> BoxFuture<'_, Result<Stats>> {
        Box::pin(async move {
            self.end.check()?;
            let taken = if self.can_grow { resize::taken(&self.control).await? } else { 0 };
            let cpus = self.cpus.load(Ordering::Relaxed);
            let balloon_bytes = match self.balloon {
                Some(balloon) => balloon.given(resize::left(&self.control).await?),
                None => 0,
            };
            Ok(Stats { memory_bytes: self.least_bytes + taken, balloon_bytes, cpus, ..Stats::default() })
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
        self.accelerator
    }
}

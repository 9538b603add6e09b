//! A machine that is no machine: its guest is a task of this process. It takes the same ways as a real one, so the
//! sandbox can be tested without a monitor.

use std::path::PathBuf;
use std::sync::Arc;

use coracle_faults as faults;
use futures::future::BoxFuture;
use tokio::sync::watch;

use crate::{
    Accelerator, AgentAddress, Capabilities, Device, DeviceKind, Driver, End, Ends, Error, GuestListener, GuestStream,
    Limits, Machine, MachineSpec, Result, Stats, unsupported,
};

/// The guest's port number on the host, for a fake.
const HELLO_PORT: u32 = 3;

/// What a fake guest gets: the folder of its sockets. It listens at `<port>` there and dials `host_<port>`.
#[derive(Debug, Clone)]
pub struct FakeGuest {
    /// The folder of sockets.
    pub sockets: PathBuf,
    /// The specification that it was booted with.
    pub spec: MachineSpec,
}

impl FakeGuest {
    /// Where the guest says that it serves.
    #[must_use]
    pub fn hello_socket(&self) -> PathBuf {
        self.sockets.join(format!("host_{HELLO_PORT}"))
    }

    /// Where the guest serves `port`.
    #[must_use]
    pub fn port_socket(&self, port: u32) -> PathBuf {
        self.sockets.join(port.to_string())
    }
}

/// A guest's program: it runs until the future ends, and gives the reason.
pub type Program = Arc<dyn Fn(FakeGuest) -> BoxFuture<'static, String> + Send + Sync>;

/// Boots fakes.
pub struct FakeDriver {
    program: Program,
    takes: Vec<DeviceKind>,
}

impl FakeDriver {
    /// A driver whose guests run `program`.
    pub fn new(program: Program) -> Self {
        Self { program, takes: Vec::new() }
    }

    /// One whose machines take devices of these kinds while they run, and do nothing with them.
    #[must_use]
    pub fn taking(self, takes: Vec<DeviceKind>) -> Self {
        Self { takes, ..self }
    }
}

impl Driver for FakeDriver {
    fn capabilities(&self, _: &MachineSpec) -> Capabilities {
        Capabilities {
            coldplug: vec![DeviceKind::Vsock, DeviceKind::Rng, DeviceKind::SharedFs],
            hotplug: self.takes.clone(),
            limits: Vec::new(),
            resize: false,
            balloon: false,
            pause: false,
            snapshot: false,
        }
    }

    fn boot(&self, spec: MachineSpec) -> BoxFuture<'_, Result<Box<dyn Machine>>> {
        Box::pin(async move {
            if !spec.kernel.path.exists() {
                return Err(Error::Missing(format!("{} is missing", spec.kernel.path.display())));
            }
            faults::at("machine.boot").await?;
            let sockets = spec.folder.join("fake");
            // Of a guest that could not remove them.
            let _ = std::fs::remove_dir_all(&sockets);
            std::fs::create_dir_all(&sockets).map_err(Error::system("make the fake's folder"))?;
            let address = AgentAddress::Sockets(sockets.clone());
            let hello = address.listen(HELLO_PORT)?;
            let (sender, end) = watch::channel(None);
            let stats = Stats { memory_bytes: spec.memory.size_mib << 20, cpus: spec.cpus.boot, ..Stats::default() };
            let guest = (self.program)(FakeGuest { sockets: sockets.clone(), spec });
            let (stop, mut stopped) = watch::channel(false);
            let task = tokio::spawn(async move {
                let reason = tokio::select! {
                    // The stop first: a guest of a machine that is gone already must not begin.
                    biased;
                    _ = stopped.wait_for(|stop| *stop) => "it was stopped".to_owned(),
                    reason = guest => reason,
                };
                let _ = std::fs::remove_dir_all(&sockets);
                sender.send_replace(Some(End { reason }));
            });
            let takes = self.takes.clone();
            let machine = FakeMachine { address, hello, end: Ends::new(end), stop, stats, takes, _task: task };
            faults::at("machine.booted").await?;
            Ok(Box::new(machine) as Box<dyn Machine>)
        })
    }
}

struct FakeMachine {
    address: AgentAddress,
    hello: GuestListener,
    end: Ends,
    stop: watch::Sender<bool>,
    stats: Stats,
    takes: Vec<DeviceKind>,
    _task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeMachine {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

impl Machine for FakeMachine {
    fn agent_address(&self) -> &AgentAddress {
        &self.address
    }

    fn guest_connection(&self) -> BoxFuture<'_, Result<GuestStream>> {
        Box::pin(self.hello.accept())
    }

    fn attach(&self, device: Device) -> BoxFuture<'_, Result<Option<String>>> {
        if !self.takes.contains(&device.kind()) {
            return unsupported("attaching a device");
        }
        Box::pin(async move {
            faults::at("machine.attach").await?;
            self.end.check().map(|()| None)
        })
    }

    fn detach(&self, device: Device) -> BoxFuture<'_, Result<()>> {
        if !self.takes.contains(&device.kind()) {
            return unsupported("detaching a device");
        }
        Box::pin(async move {
            faults::at("machine.detach").await?;
            self.end.check()
        })
    }

    fn resize_disk(&self, _: Device, _: u64) -> BoxFuture<'_, Result<()>> {
        unsupported("resizing a disk")
    }

    fn limit(&self, _: Device, _: Limits) -> BoxFuture<'_, Result<()>> {
        unsupported("limiting a device")
    }

    fn resize(&self, _: u32, _: u64) -> BoxFuture<'_, Result<()>> {
        unsupported("resizing")
    }

    fn place(&self, _: Vec<u32>) -> BoxFuture<'_, Result<()>> {
        unsupported("a place on the host")
    }

    fn pause(&self) -> BoxFuture<'_, Result<()>> {
        unsupported("pausing")
    }

    fn resume(&self) -> BoxFuture<'_, Result<()>> {
        unsupported("resuming")
    }

    fn stats(&self) -> BoxFuture<'_, Result<Stats>> {
        Box::pin(async move {
            faults::at("machine.stats").await?;
            self.end.check().map(|()| self.stats.clone())
        })
    }

    fn wait(&self) -> BoxFuture<'static, End> {
        self.end.wait()
    }

    fn stop(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            faults::at("machine.stop").await?;
            self.stop.send_replace(true);
            self.wait().await;
            Ok(())
        })
    }

    fn console(&self, _: usize) -> Vec<String> {
        Vec::new()
    }

    fn accelerator(&self) -> Accelerator {
        Accelerator::Emulation
    }
}

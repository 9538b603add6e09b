//! Where processors are made that come while the machine runs: a thread of its own, which may still make threads. Nobody else in the
//! monitor may by then.

use std::sync::Arc;
use std::sync::mpsc::{self, SyncSender};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::Error;
use crate::arch::Processors;
use crate::arch::boot::Entry;
use crate::jail::{self, Kind};
use crate::vcpu::{self, Processor, Shared};

/// What is asked of it: a processor of this number.
struct Wanted {
    number: u8,
    answer: SyncSender<Result<Processor, Error>>,
}

/// See the module.
pub(crate) struct Nursery {
    asks: mpsc::Sender<Wanted>,
}

/// What processors are made with.
pub(crate) struct Maker {
    pub(crate) factory: Processors,
    pub(crate) vm: Arc<VmFd>,
    /// Where the first one begins; none where it takes a saved one's place.
    pub(crate) entry: Option<Entry>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) confined: bool,
}

impl Maker {
    /// Makes a processor.
    pub(crate) fn create(&self, number: u8) -> Result<VcpuFd, Error> {
        self.factory.create(&self.vm, number, self.entry.as_ref())
    }

    /// Starts its thread, which enters the guest.
    pub(crate) fn start(&self, number: u8, fd: VcpuFd) -> Result<Processor, Error> {
        let confined = self.confined;
        let confine = move || if confined { jail::confine(Kind::Processor) } else { Ok(()) };
        vcpu::start(usize::from(number), fd, Arc::clone(&self.shared), confine)
    }
}

fn gone() -> Error {
    Error::Invalid("the thread that makes processors is gone".into())
}

impl Nursery {
    /// Starts the thread. It is confined when this returns.
    pub(crate) fn start(maker: Arc<Maker>) -> Result<Self, Error> {
        let (asks, wanted) = mpsc::channel::<Wanted>();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let run = move || {
            let confined = if maker.confined { jail::confine(Kind::Nursery) } else { Ok(()) };
            let is_confined = confined.is_ok();
            let _ = ready.send(confined);
            if !is_confined {
                return;
            }
            for Wanted { number, answer } in wanted {
                // Whoever has asked waits for it.
                let _ = answer.send(maker.create(number).and_then(|fd| maker.start(number, fd)));
            }
        };
        let thread = std::thread::Builder::new().name("nursery".into()).stack_size(256 << 10);
        thread.spawn(run).map_err(Error::system("start a thread"))?;
        is_ready.recv().map_err(|_| gone())??;
        Ok(Self { asks })
    }

    /// Has a processor made.
    pub(crate) fn make(&self, number: u8) -> Result<Processor, Error> {
        let (answer, made) = mpsc::sync_channel(1);
        self.asks.send(Wanted { number, answer }).map_err(|_| gone())?;
        made.recv().map_err(|_| gone())?
    }
}

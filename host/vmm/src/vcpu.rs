//! Processors: a thread each, which enters the guest and answers what KVM leaves to the monitor.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use coracle_monitor_api::Ended;
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::Error;
use crate::News;
use crate::arch;
use crate::pci::Bus;
use crate::plug::{Gone, Plug};
use crate::ports::Ports;

/// What all processors share.
pub(crate) struct Shared {
    pub(crate) bus: Arc<Bus>,
    pub(crate) ports: Ports,
    /// What comes and goes.
    pub(crate) plug: Plug,
    gate: Gate,
    /// The registers that a processor's state has, beside those that all have.
    registers: Vec<u32>,
    /// Tells the monitor's main thread.
    tell: Box<dyn Fn(News) + Send + Sync>,
}

impl Shared {
    pub(crate) fn new(
        bus: Arc<Bus>,
        ports: Ports,
        plug: Plug,
        registers: Vec<u32>,
        tell: Box<dyn Fn(News) + Send + Sync>,
    ) -> Self {
        Self { bus, ports, plug, gate: Gate::default(), registers, tell }
    }

    /// Processors that the guest has let go of enter it only when they are wanted again. None runs yet.
    pub(crate) fn park_from_start(&self, processors: impl Iterator<Item = usize>) {
        self.gate.state().parked = processors.collect();
    }

    /// The machine has ended.
    pub(crate) fn ended(&self, how: Ended) {
        (self.tell)(News::Ended(how));
    }

    /// The guest writes to a port. The machine's end, where the write is that.
    fn write_port(&self, port: u16, data: &[u8]) -> Option<Ended> {
        if !Plug::has(port) {
            return self.ports.write(port, data);
        }
        for gone in self.plug.write(port, data) {
            match gone {
                Gone::Device(number) if !self.bus.remove(number) => {}
                Gone::Device(number) => (self.tell)(News::Ejected(number)),
                Gone::Processor(gone) => (self.tell)(News::Processors { gone, left: self.plug.processors() }),
            }
        }
        None
    }
}

/// Whether processors may run, and how many have stopped. The main thread sets the one and waits for the other.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    paused: bool,
    stopped: usize,
    /// How many of those that have stopped will never go on.
    left: usize,
    /// Processors that the guest has let go of.
    parked: BTreeSet<usize>,
    /// Processors that are to say, while they wait, what state they are in; and what they have said.
    asked: BTreeSet<usize>,
    told: BTreeMap<usize, Result<arch::Processor, Error>>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On a processor's thread: waits while the machine is paused, or does not have this processor. Whoever wants to know its state is told
    /// by `tell` meanwhile; where that has ended the machine, so.
    fn pass(
        &self,
        number: usize,
        mut tell: impl FnMut() -> Result<Result<arch::Processor, Error>, Ended>,
    ) -> Option<Ended> {
        let mut state = self.state();
        let waits = |state: &State| state.paused || state.parked.contains(&number);
        if !waits(&state) {
            return None;
        }
        state.stopped += 1;
        self.changed.notify_all();
        while waits(&state) {
            if !state.asked.remove(&number) {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(state);
            let (said, ended) = match tell() {
                Ok(said) => (said, None),
                Err(ended) => (Err(Error::Invalid(format!("the machine has ended: {ended}"))), Some(ended)),
            };
            state = self.state();
            state.told.insert(number, said);
            self.changed.notify_all();
            if ended.is_some() {
                // It leaves in a moment, and is counted once more then.
                state.stopped -= 1;
                return ended;
            }
        }
        state.stopped -= 1;
        None
    }

    /// On a processor's thread: it enters the guest no more.
    fn leave(&self) {
        let mut state = self.state();
        state.stopped += 1;
        state.left += 1;
        drop(state);
        self.changed.notify_all();
    }
}

/// Exits by their reason. Written by one thread, read by another.
#[derive(Default)]
struct Exits([AtomicU64; REASONS.len()]);

/// The reasons that are counted, in the order of [`reason`].
const REASONS: [&str; 7] = ["port_in", "port_out", "mmio_read", "mmio_write", "interrupted", "halted", "other"];

/// One processor.
pub(crate) struct Processor {
    thread: JoinHandle<()>,
    exits: Arc<Exits>,
    /// Where KVM looks before it enters the guest; valid as long as the thread runs.
    immediate_exit: Arc<AtomicPtr<u8>>,
}

/// The signal that interrupts a processor. Its handler does nothing.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn nothing(_: libc::c_int) {}

/// Makes the signal interrupt calls. Once a process.
pub(crate) fn prepare() -> Result<(), Error> {
    // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask; the handler is set below.
    #[expect(unsafe_code, reason = "the structure has no constructor")]
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the structure is whole, and the handler does nothing at all, which is async-signal-safe.
    #[expect(unsafe_code, reason = "sigaction")]
    let result = unsafe { libc::sigaction(kick_signal(), &raw const action, std::ptr::null_mut()) };
    if result < 0 { Err(Error::system("handle a signal")(std::io::Error::last_os_error())) } else { Ok(()) }
}

/// Starts a processor. `confine` is called on its thread before it first enters the guest.
pub(crate) fn start(
    number: usize,
    mut processor: VcpuFd,
    shared: Arc<Shared>,
    confine: impl FnOnce() -> Result<(), Error> + Send + 'static,
) -> Result<Processor, Error> {
    let exits = Arc::new(Exits::default());
    let counted = Arc::clone(&exits);
    let run = processor.get_kvm_run();
    let immediate_exit = Arc::new(AtomicPtr::new(&raw mut run.immediate_exit));
    let flag = Arc::clone(&immediate_exit);
    let thread = std::thread::Builder::new()
        .name(format!("vcpu{number}"))
        .stack_size(256 << 10)
        .spawn(move || {
            let ended = match confine() {
                Ok(()) => run_guest(number, &mut processor, &shared, &counted),
                Err(error) => Ended::Failed(error.to_string()),
            };
            // The processor's page is gone after this: nobody may write to it.
            flag.store(std::ptr::null_mut(), Ordering::Release);
            std::mem::forget(processor);
            shared.gate.leave();
            shared.ended(ended);
        })
        .map_err(Error::system("start a processor's thread"))?;
    Ok(Processor { thread, exits, immediate_exit })
}

/// What an entry into the guest came to.
enum Entered {
    /// The guest asked for something, and has it when it goes on.
    Answered,
    /// A signal, or the wish to leave at once.
    Interrupted,
}

fn run_guest(number: usize, processor: &mut VcpuFd, shared: &Shared, exits: &Exits) -> Ended {
    loop {
        let ended = shared.gate.pass(number, || {
            settle(processor, shared, exits)?;
            let state = arch::Processor::of(processor, &shared.registers);
            // Saving takes its time.
            arch::tell_of_pause(processor);
            Ok(state)
        });
        let ended = ended.map_or_else(|| enter(processor, shared, exits).err(), Some);
        match ended {
            None => {}
            Some(Ended::Crashed(text)) => return Ended::Crashed(format!("{text} (processor {number})")),
            Some(other) => return other,
        }
    }
}

/// Has the guest take what it was answered last: KVM keeps it until the processor is entered again (KVM API, `KVM_RUN`), and tells nobody
/// who asks for its state.
fn settle(processor: &mut VcpuFd, shared: &Shared, exits: &Exits) -> Result<(), Ended> {
    loop {
        processor.set_kvm_immediate_exit(1);
        // What it asks for in several parts it asks for again.
        if matches!(enter(processor, shared, exits)?, Entered::Interrupted) {
            return Ok(());
        }
    }
}

fn enter(processor: &mut VcpuFd, shared: &Shared, exits: &Exits) -> Result<Entered, Ended> {
    let exit = processor.run();
    let reason = match &exit {
        Ok(VcpuExit::IoIn(..)) => 0,
        Ok(VcpuExit::IoOut(..)) => 1,
        Ok(VcpuExit::MmioRead(..)) => 2,
        Ok(VcpuExit::MmioWrite(..)) => 3,
        Err(_) => 4,
        Ok(VcpuExit::Hlt) => 5,
        Ok(_) => 6,
    };
    if let Some(count) = exits.0.get(reason) {
        count.fetch_add(1, Ordering::Relaxed);
    }
    match exit {
        Ok(VcpuExit::IoIn(port, data)) if Plug::has(port) => shared.plug.read(port, data),
        Ok(VcpuExit::IoIn(port, data)) => shared.ports.read(port, data),
        Ok(VcpuExit::IoOut(port, data)) => {
            if let Some(ended) = shared.write_port(port, data) {
                return Err(ended);
            }
        }
        Ok(VcpuExit::MmioRead(address, data)) => shared.bus.read(address, data),
        Ok(VcpuExit::MmioWrite(address, data)) => drop(shared.bus.write(address, data)),
        Ok(VcpuExit::Shutdown) => return Err(Ended::Crashed("a triple fault".into())),
        Ok(VcpuExit::SystemEvent(kind, _)) => return Err(Ended::Crashed(format!("system event {kind}"))),
        Ok(VcpuExit::FailEntry(reason, _)) => {
            return Err(Ended::Crashed(format!("the processor refuses to enter the guest (reason {reason:#x})")));
        }
        Ok(VcpuExit::InternalError) => return Err(Ended::Crashed("KVM can't emulate an instruction".into())),
        Ok(VcpuExit::Intr | VcpuExit::Hlt) => {}
        Ok(other) => return Err(Ended::Crashed(format!("KVM left the guest for {other:?}"))),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            processor.set_kvm_immediate_exit(0);
            return Ok(Entered::Interrupted);
        }
        Err(error) => {
            let error = std::io::Error::from_raw_os_error(error.errno());
            return Err(Ended::Crashed(format!("KVM can't go on: {error}")));
        }
    }
    Ok(Entered::Answered)
}

impl Processor {
    /// Makes it leave the guest, if it is there, and look at the gate.
    fn kick(&self) {
        let flag = self.immediate_exit.load(Ordering::Acquire);
        if flag.is_null() {
            return;
        }
        // SAFETY: the pointer is to a byte of the processor's shared page, which stays mapped: the thread sets the pointer to
        // null before it leaves, and never unmaps the page. KVM and the thread read the byte at any time, so it is
        // written atomically.
        #[expect(unsafe_code, reason = "the byte is shared with the kernel")]
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::Release);
        // SAFETY: the thread was not joined, so its handle is valid; the signal's handler does nothing.
        #[expect(unsafe_code, reason = "pthread_kill")]
        let _ = unsafe { libc::pthread_kill(self.thread.as_pthread_t(), kick_signal()) };
    }

    /// The processor time of its thread, in nanoseconds.
    pub(crate) fn cpu_nanoseconds(&self) -> u64 {
        let mut clock = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the thread was not joined; both pointers are to live variables of the types that the calls write.
        #[expect(unsafe_code, reason = "the clock of another thread")]
        let known = unsafe {
            libc::pthread_getcpuclockid(self.thread.as_pthread_t(), &raw mut clock) == 0
                && libc::clock_gettime(clock, &raw mut time) == 0
        };
        let (seconds, rest) = (u64::try_from(time.tv_sec).unwrap_or(0), u64::try_from(time.tv_nsec).unwrap_or(0));
        if known { seconds * 1_000_000_000 + rest } else { 0 }
    }

    /// Adds its exits to the counts.
    pub(crate) fn count_exits(&self, counts: &mut BTreeMap<String, u64>) {
        for (reason, count) in REASONS.iter().zip(&self.exits.0) {
            *counts.entry((*reason).to_owned()).or_default() += count.load(Ordering::Relaxed);
        }
    }
}

/// Stops all processors; returns when none is in the guest.
pub(crate) fn pause(processors: &[Processor], shared: &Shared) {
    let mut state = shared.gate.state();
    state.paused = true;
    for processor in processors {
        processor.kick();
    }
    while state.stopped < processors.len() {
        state = shared.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

/// What state each processor is in. The machine is paused.
///
/// # Errors
/// Where one can't be told, or has left the guest for ever.
pub(crate) fn states(processors: &[Processor], shared: &Shared) -> Result<Vec<arch::Processor>, Error> {
    let mut state = shared.gate.state();
    if !state.paused || state.left > 0 {
        return Err(Error::Invalid("the machine is ending".into()));
    }
    state.told.clear();
    state.asked = (0..processors.len()).collect();
    shared.gate.changed.notify_all();
    while state.told.len() < processors.len() {
        if state.left > 0 {
            return Err(Error::Invalid("the machine is ending".into()));
        }
        state = shared.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    std::mem::take(&mut state.told).into_values().collect()
}

/// The processors that the guest has let go of.
pub(crate) fn parked(shared: &Shared) -> Vec<usize> {
    shared.gate.state().parked.iter().copied().collect()
}

/// Makes a processor that the guest has let go of stop, whatever it still does.
pub(crate) fn park(number: usize, processor: &Processor, shared: &Shared) {
    shared.gate.state().parked.insert(number);
    processor.kick();
}

/// Lets a processor go on that was parked.
pub(crate) fn unpark(number: usize, shared: &Shared) {
    shared.gate.state().parked.remove(&number);
    shared.gate.changed.notify_all();
}

/// Lets all processors go on.
pub(crate) fn resume(shared: &Shared) {
    shared.gate.state().paused = false;
    shared.gate.changed.notify_all();
}

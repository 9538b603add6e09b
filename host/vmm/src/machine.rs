//! A machine from its description to its running processors.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use coracle_monitor_api as api;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::Error;
use crate::arch::{self, boot, layout};
use crate::devices::{self, Inherited};
use crate::events::Watch;
use crate::irq::{Interrupts, Wires};
use crate::jail::{self, Kind};
use crate::memory::Memory;
use crate::pci::{Bus, Function};
use crate::ports::Ports;
use crate::vcpu::{self, Processor, Shared};

/// More than any host has; it keeps sums of addresses in their range.
const MEMORY_MIB_MAX: u64 = 16 << 20;

/// A machine whose processors run.
pub(crate) struct Machine {
    processors: Vec<Processor>,
    pub(crate) shared: Arc<Shared>,
    memory: Memory,
    start_microseconds: u64,
    paused: bool,
    _vm: Arc<VmFd>,
}

/// What a machine is made from beside its description.
pub(crate) struct Host {
    pub(crate) started: Instant,
    /// The loop of the devices that never wait.
    pub(crate) main: Watch,
    /// Tells the main thread of the end.
    pub(crate) ended: Box<dyn Fn(api::Ended) + Send + Sync>,
}

impl Machine {
    /// Makes the machine and lets its processors run.
    pub(crate) fn boot(spec: &api::Machine, host: Host) -> Result<Self, Error> {
        let mut inherited = Inherited::new();
        let kvm = open_kvm(inherited.take(spec.kvm_fd)?);
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("make a machine"))?);
        if spec.memory_mib == 0 || spec.memory_mib > MEMORY_MIB_MAX {
            return Err(Error::Invalid(format!("a machine can't have {} MiB of memory", spec.memory_mib)));
        }
        let memory = Memory::new(&layout::ram(spec.memory_mib << 20), spec.shared, spec.huge_pages)?;
        give_memory(&vm, &memory.map)?;
        arch::create_interrupt_controller(&vm)?;
        let rsdp = arch::write_tables(&memory.map, spec.cpus, memory.bytes)?;
        let images = boot::Images {
            kernel: &File::from(inherited.take(spec.kernel_fd)?),
            form: spec.kernel,
            initrd: &File::from(inherited.take(spec.initrd_fd)?),
            command_line: &spec.command_line,
        };
        let entry = boot::load(&memory.map, &images, rsdp)?;
        let wires: Arc<dyn Wires> = Arc::clone(&vm) as _;
        let interrupts = Arc::new(Interrupts::new(Arc::clone(&wires)));
        let console = if spec.console { Some((console()?, interrupts.pin(layout::SERIAL_IRQ)?)) } else { None };
        let (bus, loops) = make_devices(spec, &wires, &memory.map, &interrupts, &mut inherited, &host.main)?;
        let shared = Arc::new(Shared::new(bus, Ports::new(console), loops, host.ended));
        vcpu::prepare()?;
        let factory = arch::Processors::new(&kvm, spec.cpus)?;
        let count = u8::try_from(spec.cpus).unwrap_or(u8::MAX);
        let fds: Result<Vec<_>, _> = (0..count).map(|id| factory.create(&vm, id, &entry)).collect();
        let fds = fds?;
        serve_disks(&shared, &host.main, spec.jail.enabled)?;
        let start_microseconds = u64::try_from(host.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        let confined = spec.jail.enabled;
        let start = |(number, fd)| {
            let confine = move || if confined { jail::confine(Kind::Processor) } else { Ok(()) };
            vcpu::start(number, fd, Arc::clone(&shared), confine)
        };
        let processors: Result<Vec<_>, _> = fds.into_iter().enumerate().map(start).collect();
        Ok(Self { processors: processors?, shared, memory, start_microseconds, paused: false, _vm: vm })
    }

    /// Stops the processors.
    pub(crate) fn pause(&mut self) {
        if !std::mem::replace(&mut self.paused, true) {
            vcpu::pause(&self.processors, &self.shared);
        }
    }

    /// Lets them go on.
    pub(crate) fn resume(&mut self) {
        if std::mem::replace(&mut self.paused, false) {
            vcpu::resume(&self.shared);
        }
    }

    /// What it has used.
    pub(crate) fn stats(&self) -> api::Stats {
        let mut stats = api::Stats {
            cpu_nanoseconds: self.processors.iter().map(Processor::cpu_nanoseconds).collect(),
            memory_bytes: self.memory.bytes,
            memory_resident_bytes: self.memory.resident_bytes(),
            start_microseconds: self.start_microseconds,
            ..Default::default()
        };
        for processor in &self.processors {
            processor.count_exits(&mut stats.exits);
        }
        for slot in self.shared.bus.slots() {
            let mut function = slot.function();
            let device = function.transport().device_ref();
            let counters = device.counters();
            stats.devices.push(api::DeviceStats {
                name: device.name().to_owned(),
                operations_out: counters.operations_out,
                bytes_out: counters.bytes_out,
                operations_in: counters.operations_in,
                bytes_in: counters.bytes_in,
                errors: counters.errors,
            });
        }
        stats
    }
}

fn open_kvm(device: OwnedFd) -> Kvm {
    // SAFETY: the descriptor is owned, and given to `Kvm`, which owns it from here.
    #[expect(unsafe_code, reason = "the type takes its number only")]
    let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
    kvm
}

/// The monitor's standard output, so that the guest's console never makes a processor wait.
fn console() -> Result<File, Error> {
    let output = rustix::stdio::stdout().try_clone_to_owned().map_err(Error::system("open the console"))?;
    rustix::io::ioctl_fionbio(&output, true).map_err(Error::system("open the console"))?;
    Ok(output.into())
}

fn give_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (region, slot) in memory.iter().zip(0..) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a mapping of ours of that size, which lives until this process ends: `Machine` owns it and
        // is dropped by the process's end only. Regions do not overlap (`GuestMemoryMmap` holds that).
        #[expect(unsafe_code, reason = "KVM writes to this process's memory from now on")]
        unsafe { vm.set_user_memory_region(region) }.map_err(Error::kvm("give the guest its memory"))?;
    }
    Ok(())
}

/// Makes all devices, and gives each its loop.
fn make_devices(
    spec: &api::Machine,
    wires: &Arc<dyn Wires>,
    memory: &GuestMemoryMmap,
    interrupts: &Arc<Interrupts>,
    inherited: &mut Inherited,
    main: &Watch,
) -> Result<(Arc<Bus>, Vec<Watch>), Error> {
    let memory = GuestMemoryAtomic::new(memory.clone());
    let (mut functions, mut loops) = (Vec::new(), Vec::new());
    for device in &spec.devices {
        let made = devices::make(device, inherited, spec.shared)?;
        loops.push(if made.waits { Watch::new()? } else { main.clone() });
        functions.push(Function::new(Arc::clone(wires), made.device, memory.clone(), interrupts)?);
    }
    Ok((Arc::new(Bus::new(functions)?), loops))
}

/// A thread for each loop that is not the main thread's.
fn serve_disks(shared: &Arc<Shared>, main: &Watch, confined: bool) -> Result<(), Error> {
    for (watch, number) in shared.loops.iter().zip(0..).filter(|(watch, _)| !watch.is(main)) {
        let (watch, shared) = (watch.clone(), Arc::clone(shared));
        let serve = move || {
            let served = if confined { jail::confine(Kind::Disk) } else { Ok(()) };
            if let Err(error) = served.and_then(|()| watch.run(&shared.bus, |_| true)) {
                (shared.ended)(api::Ended::Failed(error.to_string()));
            }
        };
        let thread = std::thread::Builder::new().name(format!("disk{number}")).stack_size(256 << 10);
        thread.spawn(serve).map_err(Error::system("start a disk's thread"))?;
    }
    Ok(())
}

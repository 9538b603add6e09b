//! A machine from its description to its running processors.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use coracle_monitor_api as api;
use coracle_virtio::device::Device;
use coracle_virtio::limit::Limits;
use coracle_virtio::mem::{BLOCK_BYTES, Mem, Observer};
use coracle_virtio::transport::Transport;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::{self, Count, boot, layout};
use crate::devices::{self, Descriptors};
use crate::events::Watch;
use crate::files::Files;
use crate::irq::{Interrupts, Wires};
use crate::jail::{self, Kind};
use crate::memory::{self, Memory};
use crate::nursery::{self, Nursery};
use crate::pci::{Bus, Place, Virtio};
use crate::plug::Plug;
use crate::ports::Ports;
use crate::snapshot::{self, Snapshot};
use crate::vcpu::{self, Processor, Shared};
use crate::vfio::{self, Iommu, Numbers, Passed, Reach};
use crate::{Error, News};

/// More than any host has; it keeps sums of addresses in their range.
const MEMORY_MIB_MAX: u64 = 16 << 20;

/// Numbers in KVM's list of memory, behind those of the guest's own: of files, and the first of those that devices of the host's bring.
const FILE_NUMBERS: std::ops::Range<u32> = 16..FIRST_NUMBER;
const FIRST_NUMBER: u32 = 48;

/// A machine whose processors run.
pub(crate) struct Machine {
    /// Those that were ever made; one that the guest has let go of waits until it is wanted again.
    pub(crate) processors: Vec<Processor>,
    nursery: Option<Nursery>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) memory: Memory,
    pub(crate) maker: Maker,
    growth: Option<Growth>,
    start_microseconds: u64,
    paused: bool,
    pub(crate) makes_processors: Arc<nursery::Maker>,
    /// What it is when it is saved; none of one that can't be.
    pub(crate) shape: Option<snapshot::Shape>,
}

/// What a machine is made from beside its description.
pub(crate) struct Host {
    pub(crate) started: Instant,
    /// The loop of the devices that never wait.
    pub(crate) main: Watch,
    /// Rung when the guest has gained or given memory.
    pub(crate) changed: EventFd,
    /// Tells the main thread.
    pub(crate) tell: Box<dyn Fn(News) + Send + Sync>,
}

impl Machine {
    /// Makes the machine and lets its processors run.
    pub(crate) fn boot(spec: &api::Machine, host: Host) -> Result<Self, Error> {
        let mut inherited = Descriptors::inherited();
        let kvm = open_kvm(inherited.take(spec.kvm_fd)?);
        let vm = Arc::new(kvm.create_vm().map_err(Error::kvm("make a machine"))?);
        let count = count_of(spec)?;
        let (ram_bytes, growth_bytes) = sizes_of(spec)?;
        let growth = Some((layout::growth(ram_bytes), growth_bytes)).filter(|_| growth_bytes > 0);
        let snapshot = match spec.start {
            api::Start::Kernel { .. } => None,
            api::Start::Saved { state_fd, memory_fd } => {
                let (state, memory) = (inherited.take(state_fd)?.into(), inherited.take(memory_fd)?.into());
                Some(Snapshot::open(&state, memory, spec)?)
            }
        };
        let ram = layout::ram(ram_bytes);
        let kind = memory::Kind { shared: spec.shared, huge_pages: spec.huge_pages, nodes: &spec.host_nodes };
        let memory = match &snapshot {
            Some(snapshot) => snapshot.memory(&ram, growth, &spec.host_nodes)?,
            None => Memory::new(&ram, growth, kind)?,
        };
        give_memory(&vm, &memory.map)?;
        let files = files_of(spec, layout::files(ram_bytes, growth_bytes), &mut inherited)?;
        files.give(&vm, FILE_NUMBERS)?;
        arch::create_interrupt_controller(&vm)?;
        let window = layout::pci_window_64(ram_bytes, growth_bytes, files.bytes());
        let entry = load(&spec.start, &memory, count, window, &mut inherited)?;
        snapshot::write_generation(&memory)?;
        let wires: Arc<dyn Wires> = Arc::clone(&vm) as _;
        let interrupts = Arc::new(Interrupts::new(Arc::clone(&wires)));
        let console = if spec.console { Some((console()?, interrupts.pin(layout::SERIAL_IRQ)?)) } else { None };
        let maker = Maker {
            wires: Arc::clone(&wires),
            interrupts,
            memory: GuestMemoryAtomic::new(files.behind(&memory.map)?),
            files,
            reach: Arc::new(Reach::new(memory.map.clone(), &memory.ram)),
            // Behind the guest's own memory.
            numbers: Arc::new(Numbers::from(FIRST_NUMBER)),
            is_shared: spec.shared,
            access_platform: spec.access_platform,
            main: host.main.clone(),
            later: Watch::new()?,
        };
        let (places, loops) = maker.make_all(&spec.devices, &mut inherited)?;
        let bus = Bus::new(places)?;
        // Behind the devices of the description, whose numbers are their order.
        let growth = growth.map(|growth| Growth::add(&bus, &maker, growth, &host.changed)).transpose()?;
        let plug = Plug::new(wires, count.boot.into(), count.most.into());
        let ports = match &snapshot {
            Some(snapshot) => Ports::restored(console, snapshot.serial())?,
            None => Ports::new(console),
        };
        let shared = Arc::new(Shared::new(Arc::new(bus), ports, plug, arch::registers(&kvm)?, host.tell));
        vcpu::prepare()?;
        let factory = arch::Processors::new(&kvm, count.most.into())?;
        let confined = spec.jail.enabled;
        let makes_processors = Arc::new(nursery::Maker { factory, vm, entry, shared: Arc::clone(&shared), confined });
        let processors = begin(&makes_processors, count, snapshot)?;
        serve_disks(&shared, loops, confined)?;
        let start_microseconds = u64::try_from(host.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        // Confined before the guest runs, as all other threads; and no processor runs before all are made.
        let has_room = count.most > count.boot;
        let nursery = has_room.then(|| Nursery::start(Arc::clone(&makes_processors))).transpose()?;
        let started = processors.into_iter().zip(0..).map(|(fd, number)| makes_processors.start(number, fd));
        let processors: Result<Vec<_>, _> = started.collect();
        Ok(Self {
            processors: processors?,
            nursery,
            shared,
            memory,
            maker,
            growth,
            start_microseconds,
            paused: false,
            makes_processors,
            shape: (!spec.shared && !spec.huge_pages).then(|| snapshot::Shape::of(spec)),
        })
    }

    /// Whether its processors are stopped.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused
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

    /// Adds a device, and has the guest look for it. Gives the number by which the guest finds it on its bus.
    pub(crate) fn attach(&self, device: &api::Device, descriptors: &mut Descriptors) -> Result<u8, Error> {
        let later = || Ok(self.maker.later.clone());
        let number = self.shared.bus.insert(self.maker.make(device, descriptors, later)?)?;
        self.shared.plug.come(number);
        Ok(number)
    }

    /// Asks the guest to let go of the device of this number. It has when that is told ([`News::Ejected`]).
    pub(crate) fn detach(&self, number: u8) -> Result<(), Error> {
        let place = self.shared.bus.slot(number).map(|slot| slot.place());
        if place.as_ref().is_none_or(|place| place.is_none()) {
            return Err(Error::Invalid(format!("there is no device {number}")));
        }
        self.shared.plug.go(number);
        Ok(())
    }

    /// Gives the device of this number so many bytes: a disk has them, the memory device offers them, the balloon asks for them.
    pub(crate) fn resize_device(&self, number: u8, bytes: u64) -> Result<(), Error> {
        self.change(number, "give a device another size", |transport| {
            transport.device().resize(bytes)?;
            transport.config_changed();
            Ok(())
        })
    }

    /// Holds the device of this number to these rates.
    pub(crate) fn limit(&self, number: u8, limits: Limits) -> Result<(), Error> {
        self.change(number, "limit a device", |transport| transport.device().limit(limits))
    }

    fn change(
        &self,
        number: u8,
        step: &'static str,
        change: impl FnOnce(&mut Transport) -> std::io::Result<()>,
    ) -> Result<(), Error> {
        let mut place = self.shared.bus.slot(number).map(|slot| slot.place());
        let place = place.as_mut().and_then(|place| place.as_mut());
        let transport = place.and_then(|place| place.function.transport());
        let transport = transport.ok_or_else(|| Error::Invalid(format!("there is no device {number}")))?;
        change(transport).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidInput | std::io::ErrorKind::Unsupported => Error::Invalid(error.to_string()),
            _ => Error::system(step)(error),
        })
    }

    /// Has the guest use so much memory, of which it has a part from its start.
    pub(crate) fn resize_memory(&self, bytes: u64) -> Result<(), Error> {
        let growth = self.growth.as_ref();
        let gained = bytes.checked_sub(self.memory.bytes).filter(|gained| *gained == 0 || growth.is_some());
        let gained = gained.ok_or_else(|| Error::Invalid(format!("the machine can't have {bytes} bytes of memory")))?;
        growth.map_or(Ok(()), |growth| self.resize_device(growth.number, gained))
    }

    /// Adds a processor, and has the guest look for it.
    pub(crate) fn add_processor(&mut self) -> Result<(), Error> {
        let full = || Error::Invalid("the machine has all the processors that it can have".into());
        let number = self.shared.plug.next_processor().ok_or_else(full)?;
        vcpu::unpark(number.into(), &self.shared);
        if usize::from(number) >= self.processors.len() {
            let nursery = self.nursery.as_ref().ok_or_else(full)?;
            self.processors.push(nursery.make(number)?);
        }
        self.shared.plug.processor_comes(number);
        Ok(())
    }

    /// Asks the guest to let go of its last processor. It has when that is told ([`News::Processors`]).
    pub(crate) fn take_processor(&self) {
        self.shared.plug.last_processor_goes();
    }

    /// The guest has let go of the processor of this number: it enters the guest no more until it is wanted again, which it may be
    /// already.
    pub(crate) fn park(&self, number: u8) {
        if let Some(processor) =
            self.processors.get(usize::from(number)).filter(|_| !self.shared.plug.has_processor(number))
        {
            vcpu::park(usize::from(number), processor, &self.shared);
        }
    }

    /// The device of this number is gone, and everybody knows it.
    pub(crate) fn release(&self, number: u8) {
        self.shared.plug.forget(number);
        self.shared.bus.release(number);
    }

    /// The guest need not let go of a processor any more.
    pub(crate) fn keep_processors(&self) {
        self.shared.plug.keep_processors();
    }

    /// The bytes of memory that the guest uses.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.memory.bytes + self.growth.as_ref().map_or(0, |growth| growth.gained.load(Ordering::Acquire))
    }

    /// What it has used.
    pub(crate) fn stats(&self) -> api::Stats {
        let mut stats = api::Stats {
            cpu_nanoseconds: self.processors.iter().map(Processor::cpu_nanoseconds).collect(),
            memory_bytes: self.memory_bytes(),
            cpus: self.shared.plug.processors(),
            memory_resident_bytes: self.memory.resident_bytes(),
            start_microseconds: self.start_microseconds,
            ..Default::default()
        };
        for processor in &self.processors {
            processor.count_exits(&mut stats.exits);
        }
        for slot in self.shared.bus.slots() {
            let mut place = slot.place();
            let Some(transport) = place.as_mut().and_then(|place| place.function.transport()) else { continue };
            match transport.device().figures() {
                Ok(figures) => stats.guest.extend(figures.into_iter().map(|(name, figure)| (name.to_owned(), figure))),
                Err(broken) => log::debug!("{}: {broken}", transport.device_ref().name()),
            }
            let device = transport.device_ref();
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

/// The bytes of memory that a description has from its start, and can gain.
fn sizes_of(spec: &api::Machine) -> Result<(u64, u64), Error> {
    if spec.memory_mib == 0 || spec.memory_mib > MEMORY_MIB_MAX || spec.growth_mib > MEMORY_MIB_MAX {
        let (memory, growth) = (spec.memory_mib, spec.growth_mib);
        return Err(Error::Invalid(format!("a machine can't have {memory} MiB of memory and {growth} MiB later")));
    }
    Ok((spec.memory_mib << 20, spec.growth_mib << 20))
}

/// The files among the devices, from this address of the guest's on.
fn files_of(spec: &api::Machine, start: u64, from: &mut Descriptors) -> Result<Files, Error> {
    let files = Files::map(&spec.devices, start, from)?;
    let reaches = |device: &api::Device| matches!(device, api::Device::Vfio { .. } | api::Device::Fs { .. });
    // Neither an IOMMU nor another process has been given them: a buffer there would break whoever is handed it.
    if files.bytes() > 0 && (spec.access_platform || spec.devices.iter().any(reaches)) {
        return Err(Error::Invalid("a machine with files as memory has no other devices that reach its memory".into()));
    }
    Ok(files)
}

/// Puts a kernel and what it needs into the memory; where it begins. None where all is there already: the machine was saved.
fn load(
    start: &api::Start,
    memory: &Memory,
    count: Count,
    window: u64,
    from: &mut Descriptors,
) -> Result<Option<boot::Entry>, Error> {
    let api::Start::Kernel { kernel_fd, form, initrd_fd, command_line } = start else { return Ok(None) };
    let rsdp = arch::write_tables(&memory.ram, count, window)?;
    let (kernel, initrd) = (&File::from(from.take(*kernel_fd)?), &File::from(from.take(*initrd_fd)?));
    boot::load(&memory.ram, &boot::Images { kernel, form: *form, initrd, command_line }, rsdp).map(Some)
}

/// Makes the processors that a machine begins with, and puts all of it into the state in which it was saved, where it was.
fn begin(maker: &nursery::Maker, count: Count, snapshot: Option<Snapshot>) -> Result<Vec<VcpuFd>, Error> {
    let number = snapshot.as_ref().map_or(count.boot, Snapshot::processors);
    if let Some(snapshot) = &snapshot {
        snapshot.check_processors(&maker.factory)?;
        maker.shared.park_from_start(snapshot.parked());
    }
    let processors: Result<Vec<_>, _> = (0..number).map(|number| maker.create(number)).collect();
    let processors = processors?;
    if let Some(snapshot) = snapshot {
        snapshot.put(maker, &processors)?;
    }
    Ok(processors)
}

/// The processors of a description.
fn count_of(spec: &api::Machine) -> Result<Count, Error> {
    let wrong = |_| Error::Invalid(format!("a machine can't have {} to {} processors", spec.cpus, spec.cpus_max));
    let (boot, most) = (u8::try_from(spec.cpus).map_err(wrong)?, u8::try_from(spec.cpus_max).map_err(wrong)?);
    Ok(Count { boot, most: most.max(boot) })
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
    memory.iter().zip(0..).try_for_each(|(region, slot)| memory::give(vm, region, slot, 0))
}

/// Memory that the guest gains and gives while it runs.
struct Growth {
    /// The memory device.
    number: u8,
    /// The bytes of it that the guest uses: the device tells, whoever asks reads.
    gained: Arc<AtomicU64>,
}

impl Growth {
    fn add(bus: &Bus, maker: &Maker, (start, bytes): (u64, u64), changed: &EventFd) -> Result<Self, Error> {
        let gained = Arc::new(AtomicU64::new(0));
        let bell = changed.try_clone().map_err(Error::system("make an eventfd"))?;
        let observer = Gains { count: Arc::clone(&gained), bell, reach: Arc::clone(&maker.reach) };
        let mem = Mem::new(start, bytes, BLOCK_BYTES, Box::new(observer));
        let mem = mem.map_err(|source| Error::Device { device: "mem", source })?;
        let number = bus.insert(maker.place(Box::new(mem), maker.main.clone())?)?;
        Ok(Self { number, gained })
    }
}

/// What is told of that memory.
struct Gains {
    count: Arc<AtomicU64>,
    bell: EventFd,
    reach: Arc<Reach>,
}

impl Observer for Gains {
    fn gains(&mut self, start: u64, bytes: u64) -> std::io::Result<()> {
        self.reach.gain(start, bytes)
    }

    fn loses(&mut self, start: u64, bytes: u64) -> std::io::Result<()> {
        self.reach.lose(start, bytes)
    }

    fn uses(&mut self, bytes: u64) {
        self.count.store(bytes, Ordering::Release);
        let _ = self.bell.write(1);
    }
}

/// What devices are made with.
pub(crate) struct Maker {
    wires: Arc<dyn Wires>,
    interrupts: Arc<Interrupts>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Of it, files.
    pub(crate) files: Files,
    /// What devices of the host's reach.
    pub(crate) reach: Arc<Reach>,
    numbers: Arc<Numbers>,
    /// Whether other processes may map the memory.
    pub(crate) is_shared: bool,
    /// Whether devices reach only what the guest lends them.
    access_platform: bool,
    main: Watch,
    /// The loop of all disks that come later: a thread can't be made any more then.
    later: Watch,
}

impl Maker {
    fn place(&self, device: Box<dyn Device>, watch: Watch) -> Result<Place, Error> {
        let (wires, memory) = (Arc::clone(&self.wires), self.memory.clone());
        let function = Virtio::new(wires, device, memory, &self.interrupts, self.access_platform)?;
        Ok(Place { function: Box::new(function), watch })
    }

    /// Makes a device; one that may wait is served by the loop that `own` gives.
    fn make(
        &self,
        device: &api::Device,
        from: &mut Descriptors,
        own: impl FnOnce() -> Result<Watch, Error>,
    ) -> Result<Place, Error> {
        if self.access_platform
            && matches!(device, api::Device::Vfio { .. } | api::Device::Fs { .. } | api::Device::Balloon)
        {
            return Err(Error::Invalid("a sealed machine has no device that reaches all of its memory".into()));
        }
        if let api::Device::Vfio { device_fd, by_iommufd, iommu } = device {
            if self.files.bytes() > 0 {
                return Err(Error::Invalid("a machine with files as memory takes no device of the host's".into()));
            }
            return self.pass(*device_fd, *by_iommufd, iommu.as_ref(), from);
        }
        if matches!(device, api::Device::Fs { .. }) && self.files.bytes() > 0 {
            return Err(Error::Invalid("a machine with files as memory takes no file system".into()));
        }
        let made = devices::make(device, from, self)?;
        self.place(made.device, if made.waits { own()? } else { self.main.clone() })
    }

    /// A device of the host's.
    fn pass(
        &self,
        device_fd: i32,
        by_iommufd: bool,
        iommu: Option<&api::Iommu>,
        from: &mut Descriptors,
    ) -> Result<Place, Error> {
        let device = vfio::Device::new(from.take(device_fd)?).map_err(Error::system("take a device of the host"))?;
        let mut passed = Passed::new(Box::new(device), Arc::clone(&self.wires), &self.interrupts, &self.numbers)?;
        let iommu = match iommu {
            Some(api::Iommu::Container { fd }) => Some(Iommu::Container(from.take(*fd)?)),
            Some(api::Iommu::Iommufd { fd, ioas }) => Some(Iommu::Iommufd(from.take(*fd)?, *ioas)),
            None => None,
        };
        let space = match iommu {
            Some(iommu) => self
                .reach
                .add(Box::new(iommu), by_iommufd)
                .map_err(Error::system("let a device of the host reach the guest"))?,
            None => self.reach.space(by_iommufd).ok_or_else(|| {
                Error::Invalid(
                    "no device of the host's has come before whose way to the guest's memory this one has".into(),
                )
            })?,
        };
        passed.reach(space);
        Ok(Place { function: Box::new(passed), watch: self.main.clone() })
    }

    /// Makes all devices. The loops beside the main one, too.
    fn make_all(&self, devices: &[api::Device], from: &mut Descriptors) -> Result<(Vec<Place>, Vec<Watch>), Error> {
        let (mut places, mut loops) = (Vec::new(), vec![self.later.clone()]);
        for device in devices {
            let place = self.make(device, from, Watch::new)?;
            if !place.watch.is(&self.main) {
                loops.push(place.watch.clone());
            }
            places.push(place);
        }
        Ok((places, loops))
    }
}

/// A thread for each loop that is not the main thread's.
fn serve_disks(shared: &Arc<Shared>, loops: Vec<Watch>, confined: bool) -> Result<(), Error> {
    for (number, watch) in loops.into_iter().enumerate() {
        let shared = Arc::clone(shared);
        let serve = move || {
            let served = if confined { jail::confine(Kind::Disk) } else { Ok(()) };
            if let Err(error) = served.and_then(|()| watch.run(&shared.bus, |_| true)) {
                shared.ended(api::Ended::Failed(error.to_string()));
            }
        };
        let thread = std::thread::Builder::new().name(format!("disk{number}")).stack_size(256 << 10);
        thread.spawn(serve).map_err(Error::system("start a disk's thread"))?;
    }
    Ok(())
}
